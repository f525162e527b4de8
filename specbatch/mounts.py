"""What kind of file system a path is on."""

from __future__ import annotations

import re
from pathlib import Path

IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})


def file_system(path: Path) -> str:
    """The kind of the file system that holds a path, which need not be there: ``tmpfs``, ``lustre``."""
    real, mounts = path.resolve(), _mounts()
    return next(mounts[str(folder)] for folder in (real, *real.parents) if str(folder) in mounts)


def _mounts() -> dict[str, str]:
    """File systems by where they are mounted."""
    found = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split(" ")
        found[re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), point)] = kind
    return found
