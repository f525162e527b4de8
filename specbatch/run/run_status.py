"""The state of a run, from its own files and Slurm's answers about its jobs. Only reads and asks; changes nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from specbatch.metrics_lines import MetricsLine, recent_metrics
from specbatch.run.attempts import Attempt, last_status, read_attempt
from specbatch.run.exit_records import read_exit_record
from specbatch.rundir import RunDir
from specbatch.slurm.jobs import Job, read_jobs
from specbatch.slurm.query import SlurmJobs
from specbatch.slurm.states import Condition, JobRow, JobState
from specbatch.status_file import Status, read_status
from specbatch.timestamps import seconds_of

SILENT_S = 60.0
"""Age of the status, in seconds, after which its head counts as gone or cut off; heads write it every ten seconds at
least."""
RECENT_STEPS = 10
FINAL = ("completed", "stopped", "failed")
"""States in which a head leaves its attempt."""


@dataclass(frozen=True)
class RunFiles:
    """The content of a run's directory."""

    run_dir: RunDir
    name: str
    jobs: list[Job]
    attempts: list[int]
    attempt: Attempt | None
    """The newest attempt, if its beginning was recorded."""
    status: Status | None
    """The last status that a head wrote, in any attempt."""
    cancelled: bool
    rows: list[MetricsLine]
    """The metrics of the last steps."""

    @property
    def current(self) -> Status | None:
        """The status, if it belongs to the newest attempt, or to the time before the first one."""
        newest = self.attempts[-1] if self.attempts else 0
        return self.status if self.status is not None and self.status.attempt == newest else None

    @property
    def only_measures(self) -> bool:
        """Whether there is no run, only a draft that a job measures."""
        return self.status is None and not self.attempts and {job.kind for job in self.jobs} == {"evaluation"}


@dataclass(frozen=True)
class RunStatus:
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
    """Seconds since the current attempt began."""
    left_s: float | None
    """Seconds until the job's time limit."""
    to_go_s: float | None
    """Seconds until the last step, at the speed of the latest ones."""
    node_hours: float | None
    """Node-hours of all attempts; None if unknown."""
    engines: int
    """Number of ready engines."""
    why: str
    updated: str


def read_files(run_dir: RunDir) -> RunFiles:
    """Read everything from a run's directory that the list of runs needs."""
    attempts = run_dir.attempts()
    return RunFiles(
        run_dir,
        _name(run_dir),
        read_jobs(run_dir),
        attempts,
        read_attempt(run_dir, attempts[-1]) if attempts else None,
        read_status(run_dir.status),
        run_dir.cancelled.exists(),
        recent_metrics(run_dir.metrics, RECENT_STEPS),
    )


def run_status(files: RunFiles, answer: SlurmJobs, now: float) -> RunStatus:
    """Return the state of a run.

    Args:
        answer: Slurm's answer, which covers at least the jobs of this run.
        now: seconds since 1970.
    """
    job, slurm = _job(files, answer)
    state, why = _state(files, answer, job, slurm, now)
    status = files.status or Status()
    going = state in ("starting", "running", "stopping")
    used, left = _used(files, slurm, now) if going else (None, None)
    rows, speed = files.rows, None
    if rows:
        seconds = max(sum(row.seconds for row in rows), 1e-9)
        speed = seconds / len(rows)
    step, steps = status.step, status.steps
    current = files.current or Status()
    return RunStatus(
        run=str(files.run_dir.root),
        name=files.name,
        state=state,
        stage=current.stage if state == "running" else "",
        step=step,
        steps=steps,
        tokens_per_s=sum(row.tokens for row in rows) / seconds if rows else None,
        loss=rows[-1].loss if rows else None,
        attempt=files.attempts[-1] if files.attempts else 0,
        job=job.id if job else 0,
        used_s=used,
        left_s=left,
        to_go_s=speed * (steps - step) if speed is not None and going and steps else None,
        node_hours=_node_hours(files, answer, now),
        engines=sum(engine.state == "ready" for engine in current.engines) if going else 0,
        why=why,
        updated=status.updated,
    )


def measurement(files: RunFiles, answer: SlurmJobs, now: float) -> tuple[str, str]:
    """State of the newest job that measures a draft, as that of a run, and the reason; empty if there is none."""
    jobs = [job for job in files.jobs if job.kind == "evaluation"]
    if not jobs:
        return "", ""
    job, result = jobs[-1], files.run_dir.evaluation
    if result.exists() and result.stat().st_mtime >= job.submitted:
        return "completed", ""
    state = answer.state(job.id, job.size)
    if state is None and (answer.problem or now - job.submitted < SILENT_S):
        return "pending", ""
    if state is None:
        return "failed", f"job {job.id} left no result"
    if state.condition is Condition.OVER:
        return ("cancelled" if state.word == "CANCELLED" else "failed"), f"job {job.id} left no result: {state.why}"
    return ("running" if state.condition is Condition.RUNNING else "pending"), state.why


def _job(files: RunFiles, answer: SlurmJobs) -> tuple[Job | None, JobState | None]:
    """Return the relevant job: the first that has not ended, since successors wait for it; else that of the attempt
    that said how it ended, since its successor was called off; else the last."""
    jobs = [job for job in files.jobs if job.kind == "run"]
    states = [(job, answer.state(job.id, job.size)) for job in jobs]
    for job, state in states:
        if state is not None and state.condition is not Condition.OVER:
            return job, state
    if files.attempt is not None and files.current is not None and files.current.state in FINAL:
        states = [each for each in states if each[0].id == files.attempt.job] or states
    return states[-1] if states else (None, None)


def _state(files: RunFiles, answer: SlurmJobs, job: Job | None, slurm: JobState | None, now: float) -> tuple[str, str]:
    """Return the state, and the reason for it."""
    current = files.current
    if files.status is not None and files.status.state == "completed":
        return "completed", ""
    if job is None and files.only_measures:
        return measurement(files, answer, now)
    if job is None:
        return _local_state(files, now)
    condition = slurm.condition if slurm else None
    if files.cancelled and condition in (None, Condition.OVER, Condition.PENDING, Condition.STUCK):
        return "cancelled", current.why if current else "before it began"
    if slurm is None:
        if answer.problem:
            return (current.state if current else "pending"), (current.why if current else "")
        return _forgotten(files, job, now)
    if condition is Condition.PENDING:
        return "pending", "; ".join(filter(None, [_before(files, job), slurm.why]))
    if condition is Condition.STUCK:
        return "stuck", slurm.why
    if condition is Condition.RUNNING:
        if current is None or _is_old(files, job, slurm):
            return "starting", slurm.why
        if (then := _goes_on(files, answer, job)) and current.state == "failed":
            return "stopping", f"{current.why}; it will be retried in job {then}"
        return current.state, current.why or slurm.why
    if condition is Condition.ENDING:
        why = current.why if current else slurm.why
        then = _goes_on(files, answer, job)
        return "stopping", f"{why}; it will continue in job {then}".removeprefix("; ") if then else why
    return _ended(files, job, slurm)


def _goes_on(files: RunFiles, answer: SlurmJobs, job: Job) -> int:
    """Return the id of the job that waits for the end of another one to continue the run; 0 if there is none, or it
    will be cancelled."""
    number = files.attempts[-1] if files.attempts else 0
    head = read_exit_record(files.run_dir, number, "head", 0) if number else None
    if files.cancelled or (head is not None and head.failed and not head.again):
        return 0
    return next((other.id for other in files.jobs if other.after == job.id and answer.alive(other.id)), 0)


def _before(files: RunFiles, job: Job) -> str:
    """Return why a waiting job exists: how the previous attempt ended, or that the data is prepared first."""
    if job.after and any(other.id == job.after and other.kind == "data" for other in files.jobs):
        return f"waits for job {job.after} to prepare the data"
    if files.current is None or not job.after:
        return ""
    state, why = files.current.state, files.current.why
    if state not in ("failed", "stopped"):
        return f"continues after attempt {files.attempts[-1]}"
    what = "will be retried" if state == "failed" else "continues"
    return f"{what} in job {job.id}: attempt {files.attempts[-1]} {state}: {why}".removesuffix(": ")


def _ended(files: RunFiles, job: Job, slurm: JobState) -> tuple[str, str]:
    """Return state and reason of a run whose job has ended and that no other job continues."""
    current = files.current
    if current is not None and current.state in ("failed", "stopped"):
        return current.state, current.why
    if not files.attempts and _before(files, job):
        return "failed", f"job {job.after} did not finish preparing the data: `specbatch logs` may say why"
    if slurm.word == "CANCELLED":
        return "cancelled", f"job {job.id}: {slurm.why}"
    return "failed", f"job {job.id}: {slurm.why}"


def _forgotten(files: RunFiles, job: Job, now: float) -> tuple[str, str]:
    """Return state and reason of a run whose job Slurm does not know, or no longer knows."""
    current = files.current
    if current is None:
        # sbatch has answered, but the copy of the queue that squeue reads may be a second older.
        return ("pending", "") if now - job.submitted < SILENT_S else ("gone", f"Slurm does not know job {job.id}")
    if current.state in ("running", "stopping") and _silence(current, now) > SILENT_S:
        return "gone", f"Slurm no longer knows job {job.id}, and the head last reported at {current.updated}"
    return current.state, current.why


def _local_state(files: RunFiles, now: float) -> tuple[str, str]:
    """Return state and reason of a run without Slurm."""
    current, attempt = files.current, files.attempt
    if current is not None and current.state not in ("running", "stopping"):
        return ("cancelled" if files.cancelled else current.state), current.why
    if attempt is None:
        return "new", "it has not been started"
    lives = attempt.lives()
    silent = current is not None and _silence(current, now) > SILENT_S
    if lives is False or (lives is None and silent):
        if files.cancelled:
            return "cancelled", "ended at once"
        return "gone", f"its process on {attempt.host} was killed"
    return (current.state, current.why) if current else ("starting", "")


def _is_old(files: RunFiles, job: Job, slurm: JobState) -> bool:
    """Return whether the newest attempt that has reported is of an earlier job, or an earlier start of this one."""
    attempt, started = files.attempt, slurm.leader.started
    if attempt is None or attempt.job == 0:
        return False
    if attempt.job != job.id or started is None:
        return attempt.job != job.id
    # The clock of its node may be behind. A head that has written since the start is that start's.
    written = files.current.updated if files.current is not None else ""
    wrote = seconds_of(written) if written else attempt.began
    return max(attempt.began, wrote) < started - 5


def _silence(status: Status, now: float) -> float:
    return now - seconds_of(status.updated)


def _used(files: RunFiles, slurm: JobState | None, now: float) -> tuple[float | None, float | None]:
    """Return the seconds since the attempt began, and until its job's time limit."""
    if slurm is not None:
        used, limit = slurm.leader.used_s, slurm.leader.limit_s
        return used, None if limit is None else max(0.0, limit - used)
    return (now - files.attempt.began if files.attempt else None), None


def _node_hours(files: RunFiles, answer: SlurmJobs, now: float) -> float | None:
    """Return node-hours from Slurm's accounting if there is any, else from records of each attempt; None if unknown.

    Added engines are included if Slurm knows them.
    """
    jobs = [job for job in files.jobs if job.kind != "evaluation"]
    if not jobs:
        ran = [_span(files.run_dir, number, now) for number in files.attempts]
        return sum(seconds for seconds, _ in ran) / 3600 if ran else None
    seconds = 0.0
    unknown = True
    for job in jobs:
        rows = _merged(answer.past.get(job.id, []), answer.queue.get(job.id, []))
        unknown = unknown and not rows
        seconds += sum(row.used_s * row.node_count for row in rows)
    if not unknown and answer.past:
        return seconds / 3600
    of_files = [_span(files.run_dir, number, now) for number in files.attempts]
    return sum(span * nodes for span, nodes in of_files) / 3600 if of_files or not answer.problem else None


def _merged(past: Sequence[JobRow], queue: Sequence[JobRow]) -> list[JobRow]:
    """Merge rows, each attempt once; the queue's row is more recent for the last one."""
    newest = {(row.index, row.submitted): row for row in past}
    newest.update({(row.index, row.submitted): row for row in queue})
    return list(newest.values())


def _span(run_dir: RunDir, number: int, now: float) -> tuple[float, int]:
    """Return the seconds of an attempt, up to its last sign of life, and its number of nodes."""
    attempt, last = read_attempt(run_dir, number), last_status(run_dir, number)
    if attempt is None or last is None:
        return 0.0, 1
    heard = seconds_of(last.updated)
    return max(0.0, min(heard, now) - attempt.began), len({node for of in attempt.nodes.values() for node in of}) or 1


def _name(run_dir: RunDir) -> str:
    """Return ``run.name`` without parsing the configuration, since there may be hundreds of runs."""
    with run_dir.config.open(encoding="utf-8", errors="replace") as file:
        found = re.search(r"^run:\n(?:  .*\n)*?  name: (.+)$", file.read(4096), re.M)
    return (found[1].strip("'\"") if found else "") or run_dir.root.name
