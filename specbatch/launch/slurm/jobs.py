"""The Slurm jobs of a run, as its directory knows them: one small file a job, written by whoever submitted it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Literal

from specbatch.rundir import RunDir, read_json, write_json

Kind = Literal["run", "engines"]


@dataclass(frozen=True)
class Job:
    """A job that was submitted for a run."""

    id: int
    """Of the array, or of the first component."""
    kind: Kind = "run"
    """The run itself, or engines that join it."""
    submitted: float = 0.0
    """Seconds since 1970."""
    size: int = 1
    """Components of a run's job; elements of an array of engines."""
    after: int = 0
    """The job whose end it waits for; 0: none."""


def record_job(run_dir: RunDir, job: int, *, kind: Kind = "run", size: int = 1, after: int = 0) -> None:
    """Remember a job. Twice is once: a job that was submitted by hand records itself when it starts."""
    path = run_dir.jobs / f"{job}.json"
    if not path.exists():
        write_json(path, asdict(Job(job, kind, time.time(), size, after)))


def read_jobs(run_dir: RunDir, kind: Kind | None = None) -> list[Job]:
    """The run's jobs, as they were submitted."""
    jobs = [Job(**read_json(path)) for path in run_dir.jobs.glob("[0-9]*.json")]
    return sorted((job for job in jobs if kind in (None, job.kind)), key=lambda job: (job.submitted, job.id))
