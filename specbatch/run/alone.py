"""Ensures that one process at a time leads a run outside of Slurm; a second one gets an error that names the first."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator

from specbatch.errors import UserError
from specbatch.run.attempts import Attempt, read_attempt
from specbatch.rundir import RunDir, read_json, write_json
from specbatch.status_file import Status, read_status

SILENT_S = 60.0
"""Age of the status, in seconds, after which a run on another host counts as having no leader."""


ENDED = ("completed", "failed", "stopped")
"""States in which a head leaves the run."""


@contextlib.contextmanager
def alone(run_dir: RunDir) -> Iterator[None]:
    """Lead a run as the only process.

    Raises:
        UserError: another process leads it; with its host and pid.
    """
    import psutil

    own = {"host": socket.gethostname(), "pid": os.getpid(), "pid_began": psutil.Process().create_time()}
    refuse_second(run_dir)
    mine = run_dir.leader.with_name(f".{run_dir.leader.name}.{os.getpid()}")
    write_json(mine, own)
    try:
        while True:
            try:
                os.link(mine, run_dir.leader)  # of two that start at the same time, one finds the other's file
                break
            except FileExistsError:
                refuse_second(run_dir)
                run_dir.leader.unlink(missing_ok=True)
            except OSError:
                write_json(run_dir.leader, own)  # for a file system without links
                break
    finally:
        mine.unlink()
    try:
        yield
    finally:
        # Another process may have taken over while this one was cut off.
        if read_json(run_dir.leader) == own:
            run_dir.leader.unlink(missing_ok=True)


def refuse_second(run_dir: RunDir) -> None:
    """Refuse a run that another process leads now. Raises the same as `alone`."""
    leaders = [read_attempt(run_dir, max(run_dir.attempts(), default=0))]
    if (found := read_json(run_dir.leader)) is not None:
        leaders.append(Attempt(number=0, began=0.0, **found))
    for leader in leaders:
        if leader is None or leader.job or (leader.host == socket.gethostname() and leader.pid == os.getpid()):
            continue
        lives = leader.lives()
        if lives or (lives is None and _told_lately(run_dir)):
            raise UserError(
                f"{run_dir.root}: process {leader.pid} on {leader.host} leads this run now; let it end, or end it "
                f"by `specbatch cancel {run_dir.root}`"
            )


def _told_lately(run_dir: RunDir) -> bool:
    """Return whether a run that is led from another host has reported lately, and not that it is over."""
    status = read_status(run_dir.status) or Status()
    if not run_dir.leader.exists() and status.state in ENDED:
        return False
    newest = max((path.stat().st_mtime for path in (run_dir.status, run_dir.leader) if path.exists()), default=0.0)
    return time.time() - newest < SILENT_S
