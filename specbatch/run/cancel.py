"""Ends a run for good, with a snapshot or at once. It stays ended until its user resumes it.

First the run directory is marked. From then on no other attempt of the run is started, whatever Slurm does
with its jobs in the meantime.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

from specbatch.dispatch.client import Client
from specbatch.dispatch.connection_file import wait_for
from specbatch.errors import RunError, UserError
from specbatch.run.attempts import Attempt, read_attempt
from specbatch.rundir import RunDir, write_json
from specbatch.slurm.commands import scancel
from specbatch.slurm.jobs import Job, read_jobs
from specbatch.slurm.query import SlurmJobs, query_jobs
from specbatch.slurm.states import Condition
from specbatch.status_file import is_complete, read_status
from specbatch.timestamps import timestamp

ASK_S = 20.0
DRAIN_S = 5.0
END_S = 15.0
"""Seconds that a local run may take to end at once."""
WHY = "cancelled by its user"


def cancel(run_dir: RunDir, *, at_once: bool) -> str:
    """Cancel a run.

    Args:
        at_once: end without a snapshot.

    Returns:
        a description of what will happen.

    Raises:
        UserError: the run is complete, or runs on another machine without Slurm.
        RunError: Slurm could not be reached, or refused.
    """
    if is_complete(run_dir):
        raise UserError(f"{run_dir.root}: the run is complete; there is nothing to cancel")
    write_json(run_dir.cancelled, {"time": timestamp(), "at_once": at_once})
    jobs = [job for job in read_jobs(run_dir) if job.kind != "evaluation"]
    return _cancel_jobs(run_dir, jobs, at_once) if jobs else _cancel_local(run_dir, at_once)


def _cancel_jobs(run_dir: RunDir, jobs: list[Job], at_once: bool) -> str:
    answer = query_jobs((job.id for job in jobs), {run_dir.root.stat().st_uid}, ASK_S)
    if answer.problem:
        raise RunError(
            f"{run_dir.root}: the run will not be started again, but its job keeps running: {answer.problem}"
        )
    alive = [job for job in jobs if answer.alive(job.id)]
    running = [job for job in alive if job.kind == "run" and _runs(answer, job)]
    # First the jobs that would start when the running one ends, and added engines: the current step already has all its
    # packs.
    others = [job for job in alive if job not in running]
    if others:
        scancel(*(str(job.id) for job in reversed(others)))
    said = [f"job {job.id} {'of added engines ' if job.kind == 'engines' else ''}is cancelled" for job in others]
    for job in running:
        if not at_once and _drain(run_dir, job):
            said.append(f"job {job.id} ends {_how(run_dir)}")
        else:
            scancel(str(job.id))
            said.append(f"job {job.id} ends at once")
    return "; ".join(said) or "it has no running or queued jobs"


def _runs(answer: SlurmJobs, job: Job) -> bool:
    state = answer.state(job.id, job.size)
    return state is not None and state.condition is Condition.RUNNING


def _drain(run_dir: RunDir, job: Job) -> bool:
    """Ask the running attempt to stop; return false if it has not begun, and so has nothing to save.

    If the head can't be reached from here, a signal to the job's tasks does the same: each task that gets it asks.
    """
    number = max(run_dir.attempts(), default=0)
    attempt = read_attempt(run_dir, number)
    if attempt is None or attempt.job != job.id or not run_dir.rendezvous(number).exists():
        return False
    try:
        with contextlib.closing(
            Client(wait_for(run_dir.rendezvous(number), number, 0.0), deadline_s=DRAIN_S)
        ) as client:
            client.drain(WHY)
    except RunError:
        scancel("--signal=USR2", str(job.id))
    return True


def _how(run_dir: RunDir) -> str:
    """Return how an attempt ends that is asked to stop: when, and with what."""
    status = read_status(run_dir.status)
    answering = status is not None and status.stage == "answering"
    return "with the answers so far" if answering else "after the current step, with a snapshot"


def _cancel_local(run_dir: RunDir, at_once: bool) -> str:
    attempt = read_attempt(run_dir, max(run_dir.attempts(), default=0))
    lives = attempt.lives() if attempt else False
    if attempt is None or lives is False:
        return "it is not running, and only `specbatch resume` will start it again"
    if lives is None:
        raise UserError(f"{run_dir.root}: the run is on {attempt.host}; cancel it there")
    os.kill(attempt.pid, signal.SIGTERM)
    if not at_once:
        return f"it ends {_how(run_dir)}"
    _insist(attempt)
    return "it has ended"


def _insist(attempt: Attempt) -> None:
    """Send a second signal, which means "at once"; two signals at the same time would count as one."""
    until = time.monotonic() + END_S
    while attempt.lives():
        if time.monotonic() > until:
            raise RunError(f"process {attempt.pid} did not end within {END_S:.0f} s")
        time.sleep(0.3)
        with contextlib.suppress(ProcessLookupError):
            os.kill(attempt.pid, signal.SIGTERM)
