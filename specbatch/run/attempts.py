"""The attempts of a run: how each began, and its last known state.

`begin_attempt` is called by whoever starts an attempt: the foreground process of ``specbatch run``, or the head's
script in a job. Everything else here reads.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import asdict, dataclass, field

from specbatch.rundir import RunDir, read_json, write_json
from specbatch.status_file import Status, read_status, write_status


@dataclass(frozen=True)
class Attempt:
    """How an attempt began."""

    number: int
    began: float
    """Seconds since 1970."""
    host: str
    pid: int
    """Process on ``host`` that leads it: ``specbatch run``, or the job's script."""
    pid_began: float
    """Start time of that process, since pids are reused."""
    job: int = 0
    """The Slurm job; 0 without Slurm."""
    restart: int = 0
    """Number of times that Slurm had restarted the job."""
    nodes: dict[str, list[str]] = field(default_factory=dict)
    """Nodes of each component."""

    def lives(self) -> bool | None:
        """Return whether the process that leads it exists; None if that can't be seen from this host."""
        if self.host != socket.gethostname():
            return None
        import psutil

        try:
            process = psutil.Process(self.pid)
            ended = process.status() == psutil.STATUS_ZOMBIE
            return not ended and abs(process.create_time() - self.pid_began) < 1
        except psutil.NoSuchProcess:
            return False


def begin_attempt(
    run_dir: RunDir,
    number: int,
    *,
    job: int = 0,
    restart: int = 0,
    nodes: dict[str, list[str]] | None = None,
    pid: int | None = None,
) -> Attempt:
    """Record that an attempt begins, and keep the last status of the previous one.

    Args:
        pid: process on this host that leads it. Default: this one.
    """
    import psutil

    _keep_status(run_dir)
    attempt = Attempt(
        number=number,
        began=time.time(),
        host=socket.gethostname(),
        pid=pid or os.getpid(),
        pid_began=psutil.Process(pid).create_time(),
        job=job,
        restart=restart,
        nodes=nodes or {},
    )
    write_json(run_dir.began(number), asdict(attempt))
    return attempt


def read_attempt(run_dir: RunDir, number: int) -> Attempt | None:
    """Return how an attempt began; None if that was not recorded."""
    found = read_json(run_dir.began(number))
    return None if found is None else Attempt(**found)


def last_status(run_dir: RunDir, number: int) -> Status | None:
    """Return the last status that the head wrote in an attempt; None if it wrote none."""
    kept = read_status(run_dir.last_status(number))
    if kept is not None:
        return kept
    newest = read_status(run_dir.status)
    return newest if newest is not None and newest.attempt == number else None


def _keep_status(run_dir: RunDir) -> None:
    """Copy the status of the previous attempt, which the next head will overwrite."""
    status = read_status(run_dir.status)
    if status is not None and status.attempt and not run_dir.last_status(status.attempt).exists():
        write_status(run_dir.last_status(status.attempt), status)
