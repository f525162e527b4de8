"""Makes paths of a configuration absolute, and tells paths from names on the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*){0,2}(:[^/\\]+)?")
"""A name on the hub; for a data set with a subset and a split."""
_FILE = re.compile(r"\.(jsonl?|ndjson|parquet|csv|txt|gz|zst|bz2|xz|zip)$")


def anchored(text: str, base: Path, hub: bool = False) -> str:
    """Return a path made absolute.

    Args:
        base: directory that it is relative to.
        hub: it may also be the name of a model or data set; it is unchanged if it looks like one and no such file
            exists.
    """
    path = Path(os.path.abspath(base / Path(text).expanduser()))
    if hub and not path.exists() and _HUB_NAME.fullmatch(text) and not _FILE.search(text):
        return text
    return str(path)
