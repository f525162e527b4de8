"""Clusters for tests: real daemons, on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from tools.lab import Lab


def cluster(nodes: int, **slurm: str) -> Iterator[Lab]:
    """Value of a fixture: a cluster that is removed afterwards.

    Args:
        slurm: further settings of its slurm.conf.
    """
    # Not below pytest's own folder, which is private, nor in /tmp, which hosts have each for themselves.
    with tempfile.TemporaryDirectory(prefix="slurmlab-", dir="/var/lib", ignore_cleanup_errors=True) as folder:
        lab = Lab(Path(folder) / "lab", tied=True)
        Path(folder).chmod(0o755)
        lab.up(nodes, slurm=slurm)
        yield lab
        lab.down()
