"""Files of rows for tests of the preparation."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from specbatch.config import Config

Settings = Callable[..., Config]
"""Type of the fixture `settings`."""
A1 = {
    "conversations": [
        {"from": "gpt", "value": "Sure."},
        {"from": "human", "value": "And?"},
        {"from": "gpt", "value": "Done."},
    ]
}
"""A conversation that the assistant begins."""


def lines(*rows: dict[str, Any]) -> bytes:
    """The content of a file with these rows."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
