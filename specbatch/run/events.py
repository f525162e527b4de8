"""The log of events of an attempt."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from specbatch.timestamps import timestamp


class Events:
    """Writes the attempt's ``events.jsonl``: one line per event, from any thread."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1)
        self._lock = threading.Lock()

    def write(self, event: str, /, **facts: Any) -> None:
        """Add a line."""
        with self._lock:
            self._file.write(json.dumps({"time": timestamp(), "event": event, **facts}) + "\n")

    def close(self) -> None:
        self._file.close()
