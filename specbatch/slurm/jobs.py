"""Records the Slurm jobs of a run in its directory: one small file per job, written by whoever submits it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Literal

from specbatch.rundir import RunDir, read_json, write_json

Kind = Literal["run", "engines", "data", "evaluation"]


@dataclass(frozen=True)
class Job:
    """A job that was submitted for a run."""

    id: int
    """Id of the array, or of the first component."""
    kind: Kind = "run"
    """The purpose of the job: the run itself, engines that join it, its data's preparation, or its draft's
    measurement."""
    submitted: float = 0.0
    """Seconds since 1970."""
    size: int = 1
    """Number of components of a run's job, or of elements of an array of engines."""
    after: int = 0
    """Job whose end it waits for: another one of the run, or that of its data; 0 for none."""


def record_job(run_dir: RunDir, job: int, *, kind: Kind = "run", size: int = 1, after: int = 0) -> None:
    """Record a job. Recording it twice has no effect: a job that was submitted by hand records itself at its start."""
    path = run_dir.jobs / f"{job}.json"
    if not path.exists():
        write_json(path, asdict(Job(job, kind, time.time(), size, after)))


def read_jobs(run_dir: RunDir, kind: Kind | None = None) -> list[Job]:
    """Return the run's jobs, in order of submission."""
    jobs = [Job(**read_json(path)) for path in run_dir.jobs.glob("[0-9]*.json")]
    return sorted((job for job in jobs if kind in (None, job.kind)), key=lambda job: (job.submitted, job.id))
