"""The logs of an attempt's components as one, in the order of time, and as they grow."""

from __future__ import annotations

import heapq
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from specbatch.errors import UserError
from specbatch.launch.details import log_folder
from specbatch.rundir import RunDir, read_json

TIME = re.compile(r"\W?(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:[.,]\d+)?)")
"""How lines of ours begin, and those of SGLang."""
FIRST_LINES = 20
"""Of all logs together, shown before new lines are followed."""
FIRST_BYTES = 1 << 16
"""Of each log, to find them in."""
POLL_S = 0.5


Show = Callable[[str, str], None]
"""Called with the name of the log and the line."""


def print_logs(run_dir: RunDir, which: str, show: Show) -> None:
    """All lines of the newest attempt, in the order of time.

    Args:
        which: a component, or one task of it as ``training-0``; all if empty.

    Raises:
        UserError: there is no such log.
    """
    chosen = _chosen(run_dir, which)
    if not chosen:
        raise UserError(f"{which or run_dir.root}: there is no such log; {_there(run_dir)}")
    for _, _, name, line in heapq.merge(*(_Tail(name, path).lines(whole=False) for name, path in chosen.items())):
        show(name, line)


def follow_logs(run_dir: RunDir, which: str, show: Show, *, poll_s: float = POLL_S) -> None:
    """The last lines of the newest attempt, and what comes, through later attempts; returns when the run has ended.

    Args: as `print_logs`.
    """
    attempt = max(run_dir.attempts(), default=0)
    tails = {name: _Tail(name, path, FIRST_BYTES) for name, path in _chosen(run_dir, which).items()}
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
                tails[name] = _Tail(name, path)


def _chosen(run_dir: RunDir, which: str) -> dict[str, Path]:
    """The logs of the newest attempt that are wanted, by name."""
    return {name: path for name, path in _paths(run_dir).items() if which in ("", name) or name.startswith(f"{which}-")}


def _paths(run_dir: RunDir) -> dict[str, Path]:
    attempts = run_dir.attempts()
    return {path.stem: path for path in sorted(log_folder(run_dir, attempts[-1]).glob("*.log"))} if attempts else {}


def _there(run_dir: RunDir) -> str:
    return f"of the newest attempt there are: {', '.join(_paths(run_dir)) or 'none yet'}"


def _new(tails: dict[str, _Tail]) -> list[tuple[str, str]]:
    """What was added to all logs, in the order of time."""
    return [(name, line) for _, _, name, line in heapq.merge(*(tail.lines() for tail in tails.values()))]


def _is_over(run_dir: RunDir) -> bool:
    """Whether nothing more can come. A stopped run of a job goes on in another attempt, unless it was cancelled."""
    status = read_json(run_dir.status)
    if status is None or status["attempt"] != max(run_dir.attempts(), default=0):
        return False
    goes_on = status["state"] == "stopped" and run_dir.jobs.is_dir() and not run_dir.cancelled.exists()
    return status["state"] in ("completed", "failed", "stopped") and not goes_on


class _Tail:
    """The whole lines of a file, and later those that were added to it.

    Args:
        back_bytes: of what is there, how much is read; all if None.
    """

    def __init__(self, name: str, path: Path, back_bytes: int | None = None) -> None:
        self._name = name
        self._file = path.open("rb")
        self._stamp = ""
        self._count = 0
        if back_bytes is not None and self._file.seek(0, os.SEEK_END) > back_bytes:
            self._file.seek(-back_bytes, os.SEEK_END)
            self._file.readline()
        elif back_bytes is not None:
            self._file.seek(0)

    def lines(self, *, whole: bool = True) -> Iterator[tuple[str, int, str, str]]:
        """Time, number, name of the log, and line. A line without a time has that of the line before: a traceback
        belongs to what it explains."""
        while True:
            at = self._file.tell()
            data = self._file.readline()
            if not data or (whole and not data.endswith(b"\n")):
                # It is being written, or will be.
                self._file.seek(at)
                return
            line = data.decode(errors="replace").rstrip("\n")
            found = TIME.match(line)
            if found:
                # With a comma or a point, a T or a blank: digits are what is compared.
                self._stamp = max(self._stamp, re.sub(r"\D", "", found[1]).ljust(20, "0"))
            self._count += 1
            yield self._stamp, self._count, self._name, line
