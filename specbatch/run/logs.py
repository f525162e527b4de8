"""Merges the logs of an attempt's components in the order of time, and follows them."""

from __future__ import annotations

import heapq
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from specbatch.errors import UserError
from specbatch.run.status_details import log_folder
from specbatch.rundir import RunDir
from specbatch.slurm.jobs import read_jobs
from specbatch.status_file import read_status

TIME = re.compile(r"\W?(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:[.,]\d+)?)")
"""Matches the timestamp at the beginning of lines of specbatch and SGLang."""
FIRST_LINES = 20
"""Number of lines, over all logs, that are shown before new ones are followed."""
FIRST_BYTES = 1 << 16
"""Bytes at the end of each log in which these lines are searched."""
POLL_S = 0.5
JOB_LOGS = ("job", "engines", "evaluate")
"""Logs of job scripts, in the run directory itself."""
JOB_BEGINS = rb"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d specbatch: job \d+, restart \d+"
"""Matches the first line that a job's script prints."""


Show = Callable[[str, str], None]
"""Called with the name of the log and the line."""


def print_logs(run_dir: RunDir, which: str, show: Show) -> None:
    """Show all lines of the newest attempt, in the order of time.

    Args:
        which: a component, or one of its tasks such as ``training-0``; all if empty.

    Raises:
        UserError: there is no such log.
    """
    chosen = _chosen(run_dir, which)
    if not chosen:
        raise UserError(f"{which or run_dir.root}: there is no such log; {_there(run_dir)}")
    for _, _, name, line in heapq.merge(*(_tail(name, path).lines(whole=False) for name, path in chosen.items())):
        show(name, line)


def follow_logs(run_dir: RunDir, which: str, show: Show, *, poll_s: float = POLL_S) -> None:
    """Show the last lines of the newest attempt, and new ones, also of later attempts; returns when the run has ended.

    Args:
        which, show: as for `print_logs`.
    """
    attempt = max(run_dir.attempts(), default=0)
    tails = {name: _tail(name, path, FIRST_BYTES) for name, path in _chosen(run_dir, which).items()}
    for name, line in _new(tails)[-FIRST_LINES:]:
        show(name, line)
    if not tails:
        show("", f"waiting for {which or 'the first'} log; {_there(run_dir)}")
    while True:
        over = _is_over(run_dir)
        for name, line in _new(tails):
            show(name, line)
        newest = max(run_dir.attempts(), default=0)
        if newest != attempt:
            show("", f"attempt {newest}")
            attempt, tails = newest, {}
        else:
            if over:
                return
            time.sleep(poll_s)
        for name, path in _chosen(run_dir, which).items():
            if name not in tails:
                tails[name] = _tail(name, path)


def _chosen(run_dir: RunDir, which: str) -> dict[str, Path]:
    """Return the requested logs of the newest attempt, by name."""
    return {name: path for name, path in _paths(run_dir).items() if which in ("", name) or name.startswith(f"{which}-")}


def _paths(run_dir: RunDir) -> dict[str, Path]:
    attempts = run_dir.attempts()
    found = {path.stem: path for path in sorted(log_folder(run_dir, attempts[-1]).glob("*.log"))} if attempts else {}
    jobs = {name: run_dir.root / f"{name}.log" for name in JOB_LOGS}
    return found | {name: path for name, path in jobs.items() if path.exists()}


def _tail(name: str, path: Path, back_bytes: int | None = None) -> _Tail:
    """Open a log at its beginning, without the output of earlier attempts' jobs."""
    return _Tail(name, path, back_bytes, last_job(path) if name in JOB_LOGS else 0)


def last_job(path: Path) -> int:
    """Return the offset of the newest job's first line in the log that all jobs of a run share."""
    begins = [found.start() for found in re.finditer(JOB_BEGINS, path.read_bytes())]
    return begins[-1] if begins else 0


def _there(run_dir: RunDir) -> str:
    return f"logs of the newest attempt: {', '.join(_paths(run_dir)) or 'none yet'}"


def _new(tails: dict[str, _Tail]) -> list[tuple[str, str]]:
    """Return the lines that were added to all logs, in the order of time."""
    return [(name, line) for _, _, name, line in heapq.merge(*(tail.lines() for tail in tails.values()))]


def _is_over(run_dir: RunDir) -> bool:
    """Return whether no more lines can come. A stopped run of a job continues in another attempt, unless cancelled."""
    status = read_status(run_dir.status)
    if status is None or status.attempt != max(run_dir.attempts(), default=0):
        return False
    goes_on = status.state == "stopped" and bool(read_jobs(run_dir, "run")) and not run_dir.cancelled.exists()
    return status.state in ("completed", "failed", "stopped") and not goes_on


class _Tail:
    """Reads the complete lines of a file, and later those that were added to it.

    Args:
        back_bytes: bytes at the end of the existing content that are read; None for all.
        begin: byte before which nothing is read.
    """

    def __init__(self, name: str, path: Path, back_bytes: int | None = None, begin: int = 0) -> None:
        self._name = name
        self._file = path.open("rb")
        self._stamp = ""
        self._count = 0
        end = self._file.seek(0, os.SEEK_END)
        if back_bytes is not None and end - begin > back_bytes:
            self._file.seek(-back_bytes, os.SEEK_END)
            self._file.readline()
        else:
            self._file.seek(begin)

    def lines(self, *, whole: bool = True) -> Iterator[tuple[str, int, str, str]]:
        """Yield time, number, name of the log, and line. A line without a time, as in a traceback, has that of the
        previous line."""
        if os.fstat(self._file.fileno()).st_size < self._file.tell():
            # The log became too long, and its older lines were dropped.
            self._file.seek(0)
        while True:
            at = self._file.tell()
            data = self._file.readline()
            if not data or (whole and not data.endswith(b"\n")):
                # The line is not complete yet.
                self._file.seek(at)
                return
            line = data.decode(errors="replace").rstrip("\n")
            found = TIME.match(line)
            if found:
                # Separators differ, so only digits are compared.
                self._stamp = max(self._stamp, re.sub(r"\D", "", found[1]).ljust(20, "0"))
            self._count += 1
            yield self._stamp, self._count, self._name, line
