"""Watches changes in a directory tree through the kernel, to count requests to a file system's metadata server."""

from __future__ import annotations

import ctypes
import os
import struct
import time
from pathlib import Path

CREATE, ATTRIB, MOVED_TO, DELETE = 0x100, 0x4, 0x80, 0x200


class Inotify:
    """Counts files made, renamed, removed, and changes of their attributes, below a directory as it is now."""

    def __init__(self, root: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK)
        self._names: dict[int, Path] = {}
        for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
            watch = libc.inotify_add_watch(self._fd, str(folder).encode(), CREATE | ATTRIB | MOVED_TO | DELETE)
            self._names[watch] = folder
        self.began = time.monotonic()
        self.seen: list[str] = []

    def look(self) -> float:
        """Take what happened since the last call. Returns requests a second since the beginning."""
        while True:
            try:
                data = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                break
            at = 0
            while at < len(data):
                watch, mask, _, length = struct.unpack_from("iIII", data, at)
                name = data[at + 16 : at + 16 + length].rstrip(b"\0").decode(errors="replace")
                self.seen.append(f"{mask:#x} {self._names.get(watch)}/{name}")
                at += 16 + length
        return len(self.seen) / (time.monotonic() - self.began)

    def close(self) -> None:
        """Watch no more."""
        os.close(self._fd)
