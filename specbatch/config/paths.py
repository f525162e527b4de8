"""What a path in the configuration is relative to, and what is no path but a name on the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_FILE = re.compile(r"\.(jsonl?|ndjson|parquet|csv|txt|gz|zst|bz2|xz|zip)$")


def anchored(text: str, base: Path, hub: bool = False) -> str:
    """A path made absolute.

    Args:
        base: what it is relative to.
        hub: it may also be the name of a model or data set, and is left alone if it looks like one and nothing of
            that name is there.
    """
    path = Path(os.path.abspath(base / Path(text).expanduser()))
    if hub and not path.exists() and _HUB_NAME.fullmatch(text) and not _FILE.search(text):
        return text
    return str(path)
