"""Asks Slurm about all jobs at once: one squeue and one sacct in parallel, with a deadline for impatient people.

Nothing is retried: callers can ask again, and meanwhile there are the runs' own files.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from specbatch.slurm.commands import environment
from specbatch.slurm.states import (
    SACCT_FIELDS,
    SQUEUE_FORMAT,
    JobRow,
    JobState,
    job_state,
    newest,
    parse_sacct,
    parse_scontrol,
    parse_squeue,
)

DEADLINE_S = 2.0


@dataclass(frozen=True)
class SlurmJobs:
    """Slurm's answer."""

    queue: dict[int, list[JobRow]] = field(default_factory=dict)
    """Rows of jobs that are queued, running, or have just ended, by job."""
    past: dict[int, list[JobRow]] = field(default_factory=dict)
    """Rows of all attempts by job, if the cluster has accounting."""
    problem: str = ""
    """Why there is no answer; empty if there is one."""

    def alive(self, job: int) -> list[JobRow]:
        """Return the components of a job, or elements of an array, that are queued or running."""
        return [row for row in newest(self._rows(job)) if not row.over]

    def state(self, job: int, size: int) -> JobState | None:
        """Return the state of a job; None if Slurm does not know it, or did not answer."""
        return job_state(self._rows(job), size)

    def _rows(self, job: int) -> list[JobRow]:
        return self.queue.get(job) or self.past.get(job, [])


def query_jobs(jobs: Iterable[int], users: Iterable[int], deadline_s: float = DEADLINE_S) -> SlurmJobs:
    """Ask about jobs.

    Args:
        jobs: ids; if there are none, Slurm is not asked.
        users: numeric ids of those whose jobs these are.
    """
    ids = ",".join(map(str, sorted({*jobs})))
    if not ids:
        return SlurmJobs()
    # By user, because squeue answers a list of jobs by reading all jobs of the cluster, and refuses forgotten ones.
    squeue = [
        "squeue", "--noheader", "--all", "--array", "--states=all", f"--user={','.join(map(str, sorted({*users})))}",
        f"--format={SQUEUE_FORMAT}",
    ]  # fmt: skip
    sacct = ["sacct", "--allocations", "--duplicates", "--parsable2", f"--jobs={ids}", f"--format={SACCT_FIELDS}"]
    with ThreadPoolExecutor(2) as threads:
        queue = threads.submit(_rows, squeue, parse_squeue, deadline_s)
        past = threads.submit(_rows, sacct, parse_sacct, deadline_s)
        now, problem = queue.result()
        # Many clusters have no accounting, so an empty answer of sacct is not an error.
        before, _ = past.result()
    return SlurmJobs(_by_job(now), _by_job(before), problem)


def query_job(job: int, deadline_s: float = DEADLINE_S) -> list[JobRow]:
    """Return what ``scontrol show job`` says: even without accounting, restarts and why components ended."""
    return _rows(["scontrol", "show", "job", str(job)], parse_scontrol, deadline_s)[0]


def _rows(command: Sequence[str], parse: Callable[[str], list[JobRow]], deadline_s: float) -> tuple[list[JobRow], str]:
    """Return a command's rows, and why there are none."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=deadline_s,
            env=environment(),
        )
    except FileNotFoundError:
        return [], f"{command[0]}: not found on this machine"
    except subprocess.TimeoutExpired:
        return [], f"{command[0]} did not answer within {deadline_s:g} s"
    said = done.stderr.strip().splitlines()
    problem = f"{command[0]}: {said[-1] if said else f'exit code {done.returncode}'}" if done.returncode else ""
    return parse(done.stdout), problem


def _by_job(rows: Iterable[JobRow]) -> dict[int, list[JobRow]]:
    found: dict[int, list[JobRow]] = {}
    for row in rows:
        found.setdefault(row.job, []).append(row)
    return found
