"""One Slurm cluster for all tests here: real daemons, on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.lab import Lab


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """A cluster of twenty-two nodes. A test that breaks a node brings it back."""
    # Not below pytest's own folder, which is private, nor in /tmp, which hosts have each for themselves.
    with tempfile.TemporaryDirectory(prefix="slurmlab-", dir="/var/lib", ignore_cleanup_errors=True) as folder:
        cluster = Lab(Path(folder) / "lab", tied=True)
        Path(folder).chmod(0o755)
        cluster.up(22)
        yield cluster
        cluster.down()
