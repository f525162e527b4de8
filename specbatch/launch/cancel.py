"""End a run for good: with a snapshot, or at once. It stays ended until its user resumes it.

The mark in the run directory comes first. From then on nobody starts another attempt of the run, whatever Slurm does
with its jobs in the meantime.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import time

from specbatch.dispatch.client import Client
from specbatch.dispatch.rendezvous import wait_for
from specbatch.errors import RunError, UserError
from specbatch.launch.history import Attempt, read_attempt
from specbatch.launch.slurm.ask import Answer, ask
from specbatch.launch.slurm.commands import scancel
from specbatch.launch.slurm.jobs import Job, read_jobs
from specbatch.launch.slurm.states import Condition
from specbatch.rundir import RunDir, read_json, write_json

ASK_S = 20.0
DRAIN_S = 5.0
END_S = 15.0
"""How long a local run may take to end at once."""
WHY = "cancelled by its user"


def cancel(run_dir: RunDir, *, at_once: bool) -> str:
    """Cancel a run.

    Args:
        at_once: without a snapshot.

    Returns:
        what will happen, in words.

    Raises:
        UserError: the run is complete, or runs on another machine without Slurm.
        RunError: Slurm could not be asked, or did not do it.
    """
    status = read_json(run_dir.status) or {}
    if status.get("state") == "completed":
        raise UserError(f"{run_dir.root}: the run is complete: there is nothing to cancel")
    time_now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json(run_dir.cancelled, {"time": time_now, "at_once": at_once})
    jobs = read_jobs(run_dir)
    return _cancel_jobs(run_dir, jobs, at_once) if jobs else _cancel_local(run_dir, at_once)


def _cancel_jobs(run_dir: RunDir, jobs: list[Job], at_once: bool) -> str:
    answer = ask((job.id for job in jobs), {run_dir.root.stat().st_uid}, ASK_S)
    if answer.problem:
        raise RunError(f"{run_dir.root}: nobody will start this run again, but what runs goes on: {answer.problem}")
    alive = [job for job in jobs if answer.alive(job.id)]
    running = [job for job in alive if job.kind == "run" and _runs(answer, job)]
    # Those first that would start when the running one ends, and the engines: the step that is being trained has
    # all its packs.
    others = [job for job in alive if job not in running]
    if others:
        scancel(*(str(job.id) for job in reversed(others)))
    said = [f"job {job.id} {'of added engines ' if job.kind == 'engines' else ''}is cancelled" for job in others]
    for job in running:
        if not at_once and _drain(run_dir, job):
            said.append(f"job {job.id} ends after the present step, with a snapshot")
        else:
            scancel(str(job.id))
            said.append(f"job {job.id} ends at once")
    return "; ".join(said) or "none of its jobs is alive"


def _runs(answer: Answer, job: Job) -> bool:
    state = answer.state(job.id, job.size)
    return state is not None and state.condition is Condition.RUNNING


def _drain(run_dir: RunDir, job: Job) -> bool:
    """Ask the running attempt to stop; False if it has not begun, and has nothing to save.

    Where the head can't be reached from here, a signal to the job's tasks does the same: whoever hears it asks.
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


def _cancel_local(run_dir: RunDir, at_once: bool) -> str:
    attempt = read_attempt(run_dir, max(run_dir.attempts(), default=0))
    lives = attempt.lives() if attempt else False
    if attempt is None or lives is False:
        return "it does not run; nobody will start it again but you, with `specbatch resume`"
    if lives is None:
        raise UserError(f"{run_dir.root}: the run is on {attempt.host}: cancel it there")
    os.kill(attempt.pid, signal.SIGTERM)
    if not at_once:
        return "it ends after the present step, with a snapshot"
    _insist(attempt)
    return "it has ended"


def _insist(attempt: Attempt) -> None:
    """A second signal means at once; two that come together would be one."""
    until = time.monotonic() + END_S
    while attempt.lives():
        if time.monotonic() > until:
            raise RunError(f"process {attempt.pid} did not end within {END_S:.0f} s")
        time.sleep(0.3)
        with contextlib.suppress(ProcessLookupError):
            os.kill(attempt.pid, signal.SIGTERM)
