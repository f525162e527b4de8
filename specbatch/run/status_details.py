"""Details of a single run: its components and nodes, the results of its attempts, and the cause of a failure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from specbatch.process_log import log_tail
from specbatch.run.attempts import last_status, read_attempt
from specbatch.run.exit_records import ExitRecord, failed_exit_records
from specbatch.run.run_status import FINAL, RunFiles, RunStatus
from specbatch.rundir import JOB_LOG, RunDir
from specbatch.slurm.jobs import Job
from specbatch.slurm.query import SlurmJobs
from specbatch.slurm.states import WAITING, JobRow, end_of
from specbatch.status_file import Status
from specbatch.timestamps import seconds_of

TAIL_LINES = 12
PARTS = {
    (1, 0): "all components",
    (2, 0): "head and training",
    (2, 1): "inference",
    (3, 0): "head",
    (3, 1): "inference",
    (3, 2): "training",
}
"""Contents of each component of a job, by the number of its components."""


@dataclass(frozen=True)
class ComponentStatus:
    """A component of the run's job, or engines that joined it from another."""

    name: str
    job: int
    state: str
    """Slurm's word."""
    why: str
    partition: str
    nodes: str


@dataclass(frozen=True)
class PastAttempt:
    """An attempt, times in seconds since 1970."""

    number: int
    job: int
    restart: int
    began: float | None
    ended: float | None
    """Time of its last sign of life; None while it is running."""
    step: int | None
    """Steps trained until then."""
    state: str
    why: str
    nodes: dict[str, list[str]]


@dataclass(frozen=True)
class Failure:
    """The cause of a run's failure."""

    component: str
    """Name of the component with its task, as in the names of logs."""
    why: str
    log: str
    lines: list[str]
    """The last lines of its log."""


def components(files: RunFiles, answer: SlurmJobs) -> list[ComponentStatus]:
    """Return the run's components in Slurm: those of queued or running jobs, and added engines."""
    alone = _head_alone(files.run_dir)
    return [
        ComponentStatus(_component(row, job, alone), job.id, row.state, row.reason, row.partition, row.nodes)
        for job in files.jobs
        for row in answer.alive(job.id)
    ]


def attempts(files: RunFiles, answer: SlurmJobs, state: RunStatus) -> list[PastAttempt]:
    """Return all attempts so far, in order."""
    going = state.state in ("starting", "running", "stopping")
    return [_past(files, answer, number, going and number == files.attempts[-1]) for number in files.attempts]


def failure(files: RunFiles, state: RunStatus) -> Failure | None:
    """Return which component of the newest attempt failed; None if the run has not failed.

    If no component has a log, the output of the job itself is used.
    """
    if state.state not in ("failed", "gone", "stuck"):
        return None
    job_log = files.run_dir.root / JOB_LOG
    if not files.attempts:
        lines = log_tail(job_log, TAIL_LINES)
        return Failure("job", "", str(job_log), lines) if lines else None
    number = files.attempts[-1]
    records = failed_exit_records(files.run_dir, number)
    first = next((record for record in records if record.component != "head"), records[0] if records else None)
    record = first or ExitRecord("head", 0, state.why)
    log = files.run_dir.component_log(number, record.component, record.task)
    if not log.exists() and job_log.exists():
        log = job_log
    return Failure(
        f"{record.component}-{record.task}", (record.why.splitlines() or [""])[0], str(log), log_tail(log, TAIL_LINES)
    )


def _head_alone(run_dir: RunDir) -> bool:
    """Return whether a job of two components has no training next to the head, since the run only answers prompts."""
    with run_dir.config.open(encoding="utf-8", errors="replace") as file:
        return bool(re.search(r"^  goal: answers$", file.read(4096), re.M))


def _component(row: JobRow, job: Job, alone: bool) -> str:
    if job.kind == "engines":
        return f"added engine {row.index}"
    if job.kind == "evaluation":
        return "measures a draft"
    lonely = alone and (job.size, row.index) == (2, 0)
    part = "head" if lonely else PARTS.get((job.size, row.index), f"component {row.index}")
    if job.after and row.state in WAITING:
        return f"continues when job {job.after} ends ({part})"
    return part


def _past(files: RunFiles, answer: SlurmJobs, number: int, going: bool) -> PastAttempt:
    attempt, last = read_attempt(files.run_dir, number), last_status(files.run_dir, number)
    row = _row(answer, attempt.job, attempt.restart) if attempt and attempt.job else None
    state, why = _end(last, row, going)
    heard = seconds_of(last.updated) if last else None
    return PastAttempt(
        number=number,
        job=attempt.job if attempt else 0,
        restart=attempt.restart if attempt else 0,
        began=attempt.began if attempt else None,
        ended=None if going else (row.ended if row and row.ended else heard),
        step=last.step if last else None,
        state=state,
        why=why,
        nodes=attempt.nodes if attempt else {},
    )


def _end(last: Status | None, row: JobRow | None, going: bool) -> tuple[str, str]:
    if going:
        return (last.state if last else "starting"), ""
    if last is not None and last.state in FINAL:
        return last.state, last.why
    return "killed", end_of(row) if row is not None and row.over else ""


def _row(answer: SlurmJobs, job: int, restart: int) -> JobRow | None:
    """Return Slurm's row of an attempt's first component; the accounting has a row for each start."""
    leaders = [row for row in answer.past.get(job, []) if row.index == 0]
    starts = sorted(leaders, key=lambda row: row.submitted or 0.0)
    return starts[restart] if restart < len(starts) else None


def log_folder(run_dir: RunDir, number: int) -> Path:
    """Return the folder with the logs of an attempt's components."""
    return run_dir.component_log(number, "head", 0).parent
