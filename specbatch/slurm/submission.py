"""The record of a submission that is under way, so that a run is submitted once, by one process on any host."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specbatch.config import load_config
from specbatch.errors import UserError
from specbatch.known_runs import register
from specbatch.rundir import RunDir, read_json
from specbatch.slurm import commands
from specbatch.slurm.jobs import read_jobs, record_job
from specbatch.slurm.parts import component_count

LONGEST_S = 2 * commands.DEADLINE_S + commands.ATTEMPT_S
"""Longest time of a submission after it was recorded: search its job, submit it, and search again."""


@contextlib.contextmanager
def alone(run_dir: RunDir, before: float) -> Iterator[str]:
    """Hold the right to submit this run, which one process on any host has at a time.

    Args:
        before: when this process began to check the run, in seconds since 1970.

    Yields:
        the token by which the submission is found.

    Raises:
        UserError: another process has it, or has just submitted the run.
    """
    token = commands.new_token()
    mine = {"token": token, "time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
    if (job := unanswered(run_dir)) is not None:
        raise UserError(f"{run_dir.root}: was already submitted as job {job}")
    try:
        # Created exclusively: of two processes that try, one fails, also on network file systems.
        fd = os.open(run_dir.submission, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError as error:
        raise UserError(f"{run_dir.root}: is just being submitted by another process") from error
    with os.fdopen(fd, "w") as file:
        json.dump(mine, file)
    try:
        newer = [job.id for job in read_jobs(run_dir, "run") if job.submitted > before]
        if newer:
            raise UserError(f"{run_dir.root}: was submitted as job {newer[-1]} a moment ago")
        yield token
    except UserError:
        run_dir.submission.unlink()
        raise
    run_dir.submission.unlink()


def unanswered(run_dir: RunDir) -> int | None:
    """Return the job of an earlier submission that never got its id; None if there is none.

    Raises:
        UserError: that submission is still under way.
    """
    submission = _read(run_dir)
    if submission is None:
        return None
    job = commands.find(submission["token"])
    if job is not None:
        record_job(run_dir, job, size=component_count(load_config(run_dir.config)))
        register(run_dir)
    elif under_way(submission):
        raise UserError(
            f"{run_dir.root}: is just being submitted by process {submission['pid']} on {submission['host']}; "
            "`specbatch status` will show its job"
        )
    run_dir.submission.unlink(missing_ok=True)
    return job


def _read(run_dir: RunDir) -> dict[str, Any] | None:
    """Return the process that submits the run, or tried to; None if there is none. A new file may still be empty."""
    for _ in range(20):
        try:
            found: dict[str, Any] | None = read_json(run_dir.submission)
        except json.JSONDecodeError:
            time.sleep(0.1)
        else:
            return found
    run_dir.submission.unlink(missing_ok=True)
    return None


def under_way(submission: dict[str, Any]) -> bool:
    """Return whether the process that began a submission may still be working on it."""
    if "pid" not in submission or time.time() - submission["time"] > LONGEST_S:
        return False
    if submission["host"] != socket.gethostname():
        return True
    return submission["pid"] != os.getpid() and Path(f"/proc/{submission['pid']}").exists()
