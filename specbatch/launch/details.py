"""What is told of one run and not of all: its components and nodes, what its attempts came to, and what broke it."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specbatch.launch.history import last_status, read_attempt
from specbatch.launch.marks import Mark, failed_marks
from specbatch.launch.slurm.ask import Answer
from specbatch.launch.slurm.states import Row, end_of
from specbatch.launch.standing import Files, Standing
from specbatch.rundir import RunDir

TAIL_LINES = 12
TAIL_BYTES = 1 << 14
PARTS = {
    (1, 0): "all components",
    (2, 0): "head and training",
    (2, 1): "inference",
    (3, 0): "head",
    (3, 1): "inference",
    (3, 2): "training",
}
"""What is in each component of a job, by the number of its components."""
FINAL = ("completed", "stopped", "failed")


@dataclass(frozen=True)
class Component:
    """A component of the run's job, or engines that joined it from another."""

    name: str
    job: int
    state: str
    """Slurm's word."""
    why: str
    partition: str
    nodes: str


@dataclass(frozen=True)
class Past:
    """An attempt, times in seconds since 1970."""

    number: int
    job: int
    restart: int
    began: float | None
    ended: float | None
    """When it was last heard of; None while it goes on."""
    step: int | None
    """Steps that were trained by then."""
    state: str
    why: str
    nodes: dict[str, list[str]]


@dataclass(frozen=True)
class Failure:
    """What broke a run."""

    component: str
    """With its task, as in the names of logs."""
    why: str
    log: str
    lines: list[str]
    """The last ones of the log."""


def components(files: Files, answer: Answer) -> list[Component]:
    """What Slurm has of the run: components of its jobs that are queued or run, and added engines."""
    return [
        Component(_component(row, job.kind, job.size), job.id, row.state, row.reason, row.partition, row.nodes)
        for job in files.jobs
        for row in answer.alive(job.id)
    ]


def attempts(files: Files, answer: Answer, state: Standing) -> list[Past]:
    """All attempts so far, the first one first."""
    going = state.state in ("starting", "running", "stopping")
    return [_past(files, answer, number, going and number == files.attempts[-1]) for number in files.attempts]


def failure(files: Files, state: Standing) -> Failure | None:
    """Which component of the newest attempt broke it; None if the run has not failed."""
    if state.state not in ("failed", "gone", "stuck") or not files.attempts:
        return None
    number = files.attempts[-1]
    marks = failed_marks(files.run_dir, number)
    first = next((mark for mark in marks if mark.component != "head"), marks[0] if marks else None)
    mark = first or Mark("head", 0, state.why)
    log = files.run_dir.component_log(number, mark.component, mark.task)
    return Failure(f"{mark.component}-{mark.task}", mark.why.splitlines()[0], str(log), tail(log))


def tail(path: Path, count: int = TAIL_LINES) -> list[str]:
    """The last lines of a log; none if there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return text.splitlines()[-count:]


def _component(row: Row, kind: str, size: int) -> str:
    if kind == "engines":
        return f"added engine {row.index}"
    return PARTS.get((size, row.index), f"component {row.index}")


def _past(files: Files, answer: Answer, number: int, going: bool) -> Past:
    attempt, last = read_attempt(files.run_dir, number), last_status(files.run_dir, number)
    row = _row(answer, attempt.job, attempt.restart) if attempt and attempt.job else None
    state, why = _end(last, row, going)
    heard = datetime.datetime.fromisoformat(last["updated"]).timestamp() if last else None
    return Past(
        number=number,
        job=attempt.job if attempt else 0,
        restart=attempt.restart if attempt else 0,
        began=attempt.began if attempt else None,
        ended=None if going else (row.ended if row and row.ended else heard),
        step=last["step"] if last else None,
        state=state,
        why=why,
        nodes=attempt.nodes if attempt else {},
    )


def _end(last: dict[str, Any] | None, row: Row | None, going: bool) -> tuple[str, str]:
    if going:
        return (last["state"] if last else "starting"), ""
    if last is not None and last["state"] in FINAL:
        return last["state"], last["why"]
    return "killed", end_of(row) if row is not None and row.over else ""


def _row(answer: Answer, job: int, restart: int) -> Row | None:
    """What Slurm says of the leader in an attempt: accounts have a row for each start."""
    leaders = [row for row in answer.past.get(job, []) if row.index == 0]
    starts = sorted(leaders, key=lambda row: row.submitted or 0.0)
    return starts[restart] if restart < len(starts) else None


def log_folder(run_dir: RunDir, number: int) -> Path:
    """Where an attempt's components log."""
    return run_dir.component_log(number, "head", 0).parent
