"""The attempts of a run: what each began with, and how it stood when it was last seen.

`begin_attempt` is called by whoever starts an attempt: the foreground process of ``specbatch run``, or the head's
script in a job. Everything else here reads.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from specbatch.rundir import RunDir, read_json, write_json


@dataclass(frozen=True)
class Attempt:
    """What an attempt began with."""

    number: int
    began: float
    """Seconds since 1970."""
    host: str
    pid: int
    """The process that leads it, on ``host``: that of ``specbatch run``, or the job's script."""
    pid_began: float
    """When that process began: a pid is used again."""
    job: int = 0
    """The Slurm job; 0 without Slurm."""
    restart: int = 0
    """How often Slurm had restarted the job."""
    nodes: dict[str, list[str]] = field(default_factory=dict)
    """Of each component."""

    def lives(self) -> bool | None:
        """Whether the process that leads it is there; None if that can't be seen from this host."""
        if self.host != socket.gethostname():
            return None
        import psutil

        try:
            return abs(psutil.Process(self.pid).create_time() - self.pid_began) < 1
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
    """Write down that an attempt begins, and keep how the one before stood.

    Args:
        pid: the process on this host that leads it; this one if not given.
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
    """What an attempt began with; None if nobody wrote it down."""
    found = read_json(run_dir.began(number))
    return None if found is None else Attempt(**found)


def last_status(run_dir: RunDir, number: int) -> dict[str, Any] | None:
    """The head's last words in an attempt, as in ``status.json``; None if it had none."""
    kept: dict[str, Any] | None = read_json(run_dir.last_status(number))
    if kept is not None:
        return kept
    newest: dict[str, Any] | None = read_json(run_dir.status)
    return newest if newest is not None and newest["attempt"] == number else None


def _keep_status(run_dir: RunDir) -> None:
    """The next head will write over it."""
    status = read_json(run_dir.status)
    if status is not None and not run_dir.last_status(status["attempt"]).exists():
        write_json(run_dir.last_status(status["attempt"]), status)
