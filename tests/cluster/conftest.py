"""One Slurm cluster for all tests here: real daemons, on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.lab import Lab


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """A cluster of six nodes. A test that breaks a node brings it back."""
    # Not below pytest's own folder, which is private: the cluster's user must reach its home.
    with tempfile.TemporaryDirectory(prefix="slurmlab-", ignore_cleanup_errors=True) as folder:
        cluster = Lab(Path(folder) / "lab", tied=True)
        Path(folder).chmod(0o755)
        cluster.up()
        yield cluster
        cluster.down()
