"""Finds paths of a run that compute nodes can't see, as far as the submitting host can tell.

A path on a network file system counts as shared. A path in memory, or in a directory that is local on every host, does
not. A disk of this host may be exported to the nodes, which can't be seen from here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from specbatch.config import Config
from specbatch.errors import UserError
from specbatch.mounts import IN_MEMORY, file_system
from specbatch.slurm.parts import parts_of
from specbatch.slurm.steps import other_root

OWN_DIRS = ("/tmp", "/var/tmp", "/dev", "/run", "/var/run", "/proc", "/sys")
"""Directories that are local on every host."""
ON_DISK = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "reiserfs", "overlay", "squashfs"})


def check_shared_paths(config: Config, further: Mapping[str, Path] | None = None) -> list[str]:
    """Check the paths that are used on compute nodes.

    Args:
        further: paths that the configuration does not name, by the option that does.

    Returns:
        warnings about those that are on this host's disks.

    Raises:
        UserError: nodes can't see one of them, or it does not exist.
    """
    return _check(config, [*_places(config), *(further or {}).items()])


def check_image_folders(config: Config, folders: Iterable[Path]) -> list[str]:
    """Check the directories of images, which engines read. Returns and raises the same as `check_shared_paths`."""
    return _check(config, [("data.images", folder) for folder in folders])


def _check(config: Config, places: Iterable[tuple[str, Path]]) -> list[str]:
    unsure: list[str] = []
    shared = [Path(folder).expanduser().resolve() for folder in config.slurm.shared_dirs]
    seen: set[Path] = set()
    for key, path in places:
        real = path.resolve()
        if real in seen or (key != "run.dir" and real.is_relative_to(Path(config.run.dir).resolve())):
            continue
        seen.add(real)
        kind = file_system(real)
        if any(real.is_relative_to(folder) for folder in shared) or kind not in ON_DISK | IN_MEMORY:
            continue
        own = next((folder for folder in OWN_DIRS if real.is_relative_to(folder)), None)
        if kind in IN_MEMORY or own:
            where = f"below {own}" if own else f"in memory ({kind})"
            raise UserError(
                f"{key}: {path} is {where}, which is local to each host, so compute nodes don't see it; give a path "
                "on a shared file system or, if they do see it, set slurm.shared_dirs: "
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
    """Yield the paths that nodes use, with the keys that name them."""
    from specbatch.corpus.prepare import cache_root
    from specbatch.target import locate

    yield "run.dir", Path(config.run.dir)
    yield "target.path", locate(config.target.path)
    for key, names in (("data.train", config.data.train), ("data.heldout", config.data.heldout)):
        yield from ((key, Path(name)) for name in names if os.path.isabs(name) and os.path.exists(name))
    yield "data.cache_dir", cache_root(config)
    yield from ((f"evaluate.sets.{name}", Path(path)) for name, path in config.evaluate.sets.items())
    if config.draft.init_from:
        yield "draft.init_from", Path(config.draft.init_from)
    for name in (part.name for part in reversed(parts_of(config))):
        settings = getattr(config.slurm, name)
        python = Path(settings.python or sys.executable)
        if other_root(settings):
            if name == "head":
                # The job's script, which is in no container.
                yield "the Python that submits", Path(sys.executable).parent
            continue
        if not python.is_absolute():
            continue
        if not python.exists():
            raise UserError(
                f"slurm.{name}.python: there is no {python}; give the path of a Python with specbatch installed"
            )
        # A virtual environment's python is a link to the system's; its packages are next to the link.
        yield f"slurm.{name}.python", python.parent
