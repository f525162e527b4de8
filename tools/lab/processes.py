"""Processes that outlive the command that started them, identified by pid and start time, since pids are reused."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tools.lab.errors import LabError


class Started(NamedTuple):
    """A started process."""

    pid: int
    start: str
    """Start time in clock ticks since boot, from /proc."""

    def alive(self) -> bool:
        """Return whether it still runs; a zombie does not."""
        return started_at(self.pid) == self.start

    def children(self) -> list[int]:
        """Return the pids of its children."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal that ends it, and wait until it and its children are gone."""
        if not self.alive():
            return
        family = [self.pid, *self.children()]
        os.kill(self.pid, number)
        wait_until(f"process {self.pid} ends", lambda: all(started_at(pid) is None for pid in family))
        with contextlib.suppress(ChildProcessError):  # the child of another process, which reaps it
            os.waitpid(self.pid, os.WNOHANG)


def start(argv: list[str], log: Path, environment: dict[str, str], *, tied: bool = False) -> Started:
    """Start a process in a separate session, and append its output to ``log``.

    Args:
        tied: kill it when this process ends, for whatever reason.
    """
    prefix = ["setpriv", "--pdeathsig", "KILL"] if tied else []
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*prefix, *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd="/",
            env=environment,
        )
    process.returncode = 0  # so that subprocess does not warn that it still runs
    start = started_at(process.pid)
    if start is None:
        raise LabError(f"{argv[0]} ended at once; see {log}")
    return Started(process.pid, start)


def started_at(pid: int) -> str | None:
    """Return the start time of a running process; None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]


def output(*argv: str | Path, environment: dict[str, str] | None = None, timeout_s: float = 120) -> str:
    """Return a command's output.

    Raises:
        LabError: it failed; with its message.
    """
    done = subprocess.run(
        list(map(str, argv)), text=True, capture_output=True, env=environment, timeout=timeout_s, check=False
    )
    if done.returncode:
        raise LabError(f"{' '.join(map(str, argv))}: exit {done.returncode}\n{done.stderr or done.stdout}")
    return done.stdout


def succeeds(*argv: str | Path, environment: dict[str, str] | None = None) -> bool:
    """Return whether a command succeeds."""
    return subprocess.run(list(map(str, argv)), capture_output=True, env=environment, check=False).returncode == 0


def wait_until(what: str, true: Callable[[], bool], timeout_s: float = 60) -> None:
    """Wait for a condition.

    Raises:
        LabError: it has not become true in time.
    """
    until = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > until:
            raise LabError(f"{what}: not after {timeout_s:.0f} s")
        time.sleep(0.05)
