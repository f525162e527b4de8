"""Ask Slurm about all jobs at once: one squeue and one sacct, side by side, and no longer than a person likes to wait.

Nothing is tried twice: who wants to know again asks again, and meanwhile there are the runs' own files.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from specbatch.launch.slurm.commands import environment
from specbatch.launch.slurm.states import (
    SACCT_FIELDS,
    SQUEUE_FORMAT,
    JobState,
    Row,
    job_state,
    newest,
    parse_sacct,
    parse_scontrol,
    parse_squeue,
)

DEADLINE_S = 2.0


@dataclass(frozen=True)
class Answer:
    """What Slurm said."""

    queue: dict[int, list[Row]] = field(default_factory=dict)
    """By job: what is queued, runs, or ended a moment ago."""
    past: dict[int, list[Row]] = field(default_factory=dict)
    """By job: all its attempts, where the cluster keeps account."""
    problem: str = ""
    """Why there is no answer; empty if there is one."""

    def alive(self, job: int) -> list[Row]:
        """What of a job is queued or runs: its components, or elements of an array."""
        return [row for row in newest(self._rows(job)) if not row.over]

    def state(self, job: int, size: int) -> JobState | None:
        """How a job stands; None if Slurm does not know it, or gave no answer."""
        return job_state(self._rows(job), size)

    def _rows(self, job: int) -> list[Row]:
        return self.queue.get(job) or self.past.get(job, [])


def ask(jobs: Iterable[int], users: Iterable[int], deadline_s: float = DEADLINE_S) -> Answer:
    """Ask about jobs.

    Args:
        jobs: ids; if there are none, Slurm is not asked.
        users: numeric ids of those whose jobs these are.
    """
    ids = ",".join(map(str, sorted({*jobs})))
    if not ids:
        return Answer()
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
        # Many clusters keep no account: that sacct has nothing to say is no problem.
        before, _ = past.result()
    return Answer(_by_job(now), _by_job(before), problem)


def ask_closely(job: int, deadline_s: float = DEADLINE_S) -> list[Row]:
    """What ``scontrol show job`` says: how often it was restarted, and of a dead component why, without accounting."""
    return _rows(["scontrol", "show", "job", str(job)], parse_scontrol, deadline_s)[0]


def _rows(command: Sequence[str], parse: Callable[[str], list[Row]], deadline_s: float) -> tuple[list[Row], str]:
    """What a command said, and why it said nothing."""
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
        return [], f"{command[0]}: there is no such command on this machine"
    except subprocess.TimeoutExpired:
        return [], f"{command[0]} did not answer within {deadline_s:g} s"
    said = done.stderr.strip().splitlines()
    problem = f"{command[0]}: {said[-1] if said else f'exit code {done.returncode}'}" if done.returncode else ""
    return parse(done.stdout), problem


def _by_job(rows: Iterable[Row]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(row.job, []).append(row)
    return found
