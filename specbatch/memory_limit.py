"""How much memory of its machine a process may use."""

from __future__ import annotations

from pathlib import Path

import psutil


def memory_limit() -> int:
    """Bytes of memory of this machine, or that Slurm or a container leaves this process of them."""
    limits = [int(psutil.virtual_memory().total)]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        folder = Path("/sys/fs/cgroup") / line.rpartition(":")[2].lstrip("/")
        for name in (folder, *folder.parents):
            path = name / "memory.max"
            if path.is_file() and (text := path.read_text().strip()).isdigit():
                limits.append(int(text))
    return min(limits)
