"""How a run stands: what its own files say, and what Slurm says about its jobs, made one. Reads and asks, no more."""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specbatch.launch.history import Attempt, last_status, read_attempt
from specbatch.launch.slurm.ask import Answer
from specbatch.launch.slurm.jobs import Job, read_jobs
from specbatch.launch.slurm.states import Condition, JobState, Row
from specbatch.rundir import RunDir, read_json

SILENT_S = 60.0
"""A head writes the status several times a second: one that did not for so long is not there, or cut off."""
RECENT_STEPS = 10
TAIL_BYTES = 1 << 15


@dataclass(frozen=True)
class Files:
    """What a run's directory says."""

    run_dir: RunDir
    name: str
    jobs: list[Job]
    attempts: list[int]
    attempt: Attempt | None
    """The newest, if it was written down how it began."""
    status: dict[str, Any] | None
    """The head's, of whatever attempt wrote last."""
    cancelled: bool
    rows: list[dict[str, Any]]
    """The metrics of the last steps."""

    @property
    def current(self) -> dict[str, Any] | None:
        """The status, if it is the newest attempt's."""
        newest = self.attempts[-1] if self.attempts else None
        return self.status if self.status is not None and self.status["attempt"] == newest else None


@dataclass(frozen=True)
class Standing:
    """One run, for people and for scripts; times in seconds."""

    run: str
    """The run directory."""
    name: str
    state: str
    """new, pending, starting, running, stopping, stopped, completed, failed, cancelled, stuck or gone."""
    stage: str
    step: int
    steps: int
    tokens_per_s: float | None
    loss: float | None
    attempt: int
    job: int
    """The Slurm job that it waits for, runs in or ran in; 0 without Slurm."""
    used_s: float | None
    """Since the present attempt began."""
    left_s: float | None
    """Of the job's time limit."""
    to_go_s: float | None
    """Until the last step, at the speed of the last ones."""
    node_hours: float | None
    """Of all attempts."""
    engines: int
    """Engines that are ready."""
    why: str
    updated: str


def read_files(run_dir: RunDir) -> Files:
    """Everything that the list of runs needs of a run's directory."""
    attempts = run_dir.attempts()
    return Files(
        run_dir,
        _name(run_dir),
        read_jobs(run_dir),
        attempts,
        read_attempt(run_dir, attempts[-1]) if attempts else None,
        read_json(run_dir.status),
        run_dir.cancelled.exists(),
        _last_rows(run_dir.metrics),
    )


def standing(files: Files, answer: Answer, now: float) -> Standing:
    """How a run stands.

    Args:
        answer: Slurm's, about the jobs of this run at least.
        now: seconds since 1970.
    """
    job, slurm = _job(files, answer)
    state, why = _state(files, answer, job, slurm, now)
    status = files.status or {}
    going = state in ("starting", "running", "stopping")
    used, left = _used(files, slurm, now) if going else (None, None)
    rows, speed = files.rows, None
    if rows:
        seconds = max(sum(row["seconds"] for row in rows), 1e-9)
        speed = seconds / len(rows)
    step, steps = status.get("step", 0), status.get("steps", 0)
    current = files.current or {}
    return Standing(
        run=str(files.run_dir.root),
        name=files.name,
        state=state,
        stage=current.get("stage", "") if state == "running" else "",
        step=step,
        steps=steps,
        tokens_per_s=sum(row["tokens"] for row in rows) / seconds if rows else None,
        loss=rows[-1]["loss"] if rows else None,
        attempt=files.attempts[-1] if files.attempts else 0,
        job=job.id if job else 0,
        used_s=used,
        left_s=left,
        to_go_s=speed * (steps - step) if speed is not None and going and steps else None,
        node_hours=_node_hours(files, answer, now),
        engines=sum(engine["state"] == "ready" for engine in current.get("engines", [])) if going else 0,
        why=why,
        updated=status.get("updated", ""),
    )


def _job(files: Files, answer: Answer) -> tuple[Job | None, JobState | None]:
    """The job that matters: the first that has not ended, since successors wait for it; else the last."""
    jobs = [job for job in files.jobs if job.kind == "run"]
    states = [(job, answer.state(job.id, job.size)) for job in jobs]
    for job, state in states:
        if state is not None and state.condition is not Condition.OVER:
            return job, state
    return states[-1] if states else (None, None)


def _state(files: Files, answer: Answer, job: Job | None, slurm: JobState | None, now: float) -> tuple[str, str]:
    """The state, and why it is that."""
    current = files.current
    if files.status is not None and files.status["state"] == "completed":
        return "completed", ""
    if job is None:
        return _local_state(files, now)
    condition = slurm.condition if slurm else None
    if files.cancelled and condition in (None, Condition.OVER, Condition.PENDING, Condition.STUCK):
        return "cancelled", current["why"] if current else "before it began"
    if slurm is None:
        if answer.problem:
            return (current["state"] if current else "pending"), (current["why"] if current else "")
        return _forgotten(files, job, now)
    if condition is Condition.PENDING:
        return "pending", slurm.why
    if condition is Condition.STUCK:
        return "stuck", slurm.why
    if condition is Condition.RUNNING:
        if current is None or _is_old(files, job, slurm):
            return "starting", slurm.why
        return current["state"], current["why"] or slurm.why
    if condition is Condition.ENDING:
        return "stopping", current["why"] if current else slurm.why
    return _ended(files, job, slurm)


def _ended(files: Files, job: Job, slurm: JobState) -> tuple[str, str]:
    """What became of a run whose job is over, and that no other job goes on with."""
    current = files.current
    if current is not None and current["state"] in ("failed", "stopped"):
        return current["state"], current["why"]
    if slurm.word == "CANCELLED":
        return "cancelled", f"job {job.id}: {slurm.why}"
    return "failed", f"job {job.id}: {slurm.why}"


def _forgotten(files: Files, job: Job, now: float) -> tuple[str, str]:
    """Of a run whose job Slurm does not know, or no more."""
    current = files.current
    if current is None:
        # sbatch has answered, and the queue's copy that squeue reads may be a second older.
        return ("pending", "") if now - job.submitted < SILENT_S else ("gone", f"Slurm does not know job {job.id}")
    if current["state"] in ("running", "stopping") and _silence(current, now) > SILENT_S:
        return "gone", f"Slurm does not know job {job.id} any more, and the head's last word is of {current['updated']}"
    return current["state"], current["why"]


def _local_state(files: Files, now: float) -> tuple[str, str]:
    """Of a run without Slurm."""
    current, attempt = files.current, files.attempt
    if current is not None and current["state"] not in ("running", "stopping"):
        return ("cancelled" if files.cancelled else current["state"]), current["why"]
    if attempt is None:
        return "new", "it has not been started"
    lives = attempt.lives()
    silent = current is not None and _silence(current, now) > SILENT_S
    if lives is False or (lives is None and silent):
        if files.cancelled:
            return "cancelled", "ended at once"
        return "gone", f"its process on {attempt.host} has ended without a word"
    return (current["state"], current["why"]) if current else ("starting", "")


def _is_old(files: Files, job: Job, slurm: JobState) -> bool:
    """Whether the newest attempt that has spoken is of an earlier job, or of an earlier start of this one."""
    attempt, started = files.attempt, slurm.leader.started
    if attempt is None or attempt.job == 0:
        return False
    return attempt.job != job.id or (started is not None and attempt.began < started - 5)


def _silence(status: dict[str, Any], now: float) -> float:
    return now - datetime.datetime.fromisoformat(status["updated"]).timestamp()


def _used(files: Files, slurm: JobState | None, now: float) -> tuple[float | None, float | None]:
    """Seconds that the attempt has had, and that its job's time limit leaves it."""
    if slurm is not None:
        used, limit = slurm.leader.used_s, slurm.leader.limit_s
        return used, None if limit is None else max(0.0, limit - used)
    return (now - files.attempt.began if files.attempt else None), None


def _node_hours(files: Files, answer: Answer, now: float) -> float | None:
    """From the accounts if there are any, else from what each attempt wrote down; None if nobody knows.

    Added engines are counted as well where Slurm knows of them.
    """
    if not files.jobs:
        ran = [_span(files.run_dir, number, now) for number in files.attempts]
        return sum(seconds for seconds, _ in ran) / 3600 if ran else None
    seconds = 0.0
    unknown = True
    for job in files.jobs:
        rows = _merged(answer.past.get(job.id, []), answer.queue.get(job.id, []))
        unknown = unknown and not rows
        seconds += sum(row.used_s * row.node_count for row in rows)
    if not unknown and answer.past:
        return seconds / 3600
    of_files = [_span(files.run_dir, number, now) for number in files.attempts]
    return sum(span * nodes for span, nodes in of_files) / 3600 if of_files or not answer.problem else None


def _merged(past: Sequence[Row], queue: Sequence[Row]) -> list[Row]:
    """All attempts once: of the last one, the queue knows better how long it runs."""
    newest = {(row.index, row.submitted): row for row in past}
    newest.update({(row.index, row.submitted): row for row in queue})
    return list(newest.values())


def _span(run_dir: RunDir, number: int, now: float) -> tuple[float, int]:
    """Seconds of an attempt, as far as it was heard of, and how many nodes it had."""
    attempt, last = read_attempt(run_dir, number), last_status(run_dir, number)
    if attempt is None or last is None:
        return 0.0, 1
    heard = datetime.datetime.fromisoformat(last["updated"]).timestamp()
    return max(0.0, min(heard, now) - attempt.began), len({node for of in attempt.nodes.values() for node in of}) or 1


def _name(run_dir: RunDir) -> str:
    """``run.name``, without reading all of the configuration: there may be hundreds of runs."""
    with run_dir.config.open(encoding="utf-8", errors="replace") as file:
        found = re.search(r"^run:\n(?:  .*\n)*?  name: (.+)$", file.read(4096), re.M)
    return (found[1].strip("'\"") if found else "") or run_dir.root.name


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """The last steps' metrics; the last line may be half written."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
            if size > TAIL_BYTES:
                lines = lines[1:]
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines[-RECENT_STEPS:] if line.endswith(b"}")]
