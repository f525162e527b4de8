"""Which of a run's paths the compute nodes can't see, as far as that shows on the host that submits.

A path on a network file system is taken for shared. One in memory, or in a directory that every host has for itself,
is not. One on a disk of this host may be exported to the nodes: nobody here can tell.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from specbatch.config import Config
from specbatch.errors import UserError

OWN_DIRS = ("/tmp", "/var/tmp", "/dev", "/run", "/var/run", "/proc", "/sys")
"""Directories that every host has for itself."""
IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})
ON_DISK = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "reiserfs", "overlay", "squashfs"})


def check_places(config: Config) -> list[str]:
    """Check the paths that are used on compute nodes.

    Returns:
        warnings about those that are on this host's disks.

    Raises:
        UserError: nodes can't see one of them, or it is not there.
    """
    unsure: list[str] = []
    shared = [Path(folder).expanduser().resolve() for folder in config.slurm.shared_dirs]
    mounts = _mounts()
    for key, path in _places(config):
        real = path.resolve()
        kind = next(mounts[str(folder)] for folder in (real, *real.parents) if str(folder) in mounts)
        if any(real.is_relative_to(folder) for folder in shared) or kind not in ON_DISK | IN_MEMORY:
            continue
        own = next((folder for folder in OWN_DIRS if real.is_relative_to(folder)), None)
        if kind in IN_MEMORY or own:
            where = f"below {own}" if own else f"in memory ({kind})"
            raise UserError(
                f"{key}: {path} is {where}, which each host has for itself: compute nodes don't see it; give a path "
                "on a file system that they share, or, if they do see it, set slurm.shared_dirs: "
                f"[{own or real.parent}]"
            )
        unsure.append(f"{key} ({path})")
    if not unsure:
        return []
    return [
        f"on this host's own disk: {', '.join(unsure)}; if the compute nodes do not see it there, the job will fail; "
        "if they do, name its directory in slurm.shared_dirs"
    ]


def _places(config: Config) -> Iterator[tuple[str, Path]]:
    """Paths that nodes use, by the key that names them."""
    from specbatch.corpus.prepare import cache_root
    from specbatch.target import locate

    yield "run.dir", Path(config.run.dir)
    yield "target.path", locate(config.target.path)
    for key, names in (("data.train", config.data.train), ("data.heldout", config.data.heldout)):
        yield from ((key, Path(name)) for name in names if os.path.isabs(name) and os.path.exists(name))
    yield "data.cache_dir", cache_root(config)
    for name in ("head", "inference", "training"):
        settings = getattr(config.slurm, name)
        python = Path(settings.python or sys.executable)
        if settings.launch or not python.is_absolute():
            continue
        if not python.exists():
            raise UserError(
                f"slurm.{name}.python: there is no {python}; give the path of a Python with specbatch in it"
            )
        # A virtual environment's python is a link to the system's: what it needs lies beside the link.
        yield f"slurm.{name}.python", python.parent


def _mounts() -> dict[str, str]:
    """File systems by where they are mounted."""
    found = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split(" ")
        found[re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), point)] = kind
    return found
