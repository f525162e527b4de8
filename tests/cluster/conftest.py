"""Provides one Slurm cluster for the tests in this folder."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator

import pytest

from tests.cluster.clusters import cluster
from tools.lab import Lab, LabError


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """A cluster of twenty-seven nodes. A test that breaks a node brings it back."""
    yield from cluster(27)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that failed tells what Slurm says of its nodes and what its controller logged last."""
    report = yield
    lab = getattr(item, "funcargs", {}).get("lab")
    if report.failed and isinstance(lab, Lab):
        # A cluster that no longer answers is not to hide what failed.
        with contextlib.suppress(LabError, OSError):
            log = (lab.folder / "log" / "slurmctld.log").read_text().splitlines()
            report.sections.append(("slurmctld", "\n".join(log[-150:])))
            report.sections.append(("nodes", lab.run("sinfo", "-N", "-p", "cpu", "-o", "%N %T %C %E")))
            report.sections.append(("jobs", lab.run("squeue", "-o", "%i %T %r %N")))
    return report
