"""The log of a component's process: one file for everything that it, its libraries and its children print."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

_TAIL_BYTES = 1 << 16
_LOOK_S = 60.0


def open_log(path: Path, name: str) -> None:
    """Redirect the output of this process to a file, and log one line per event under this name.

    SIGUSR1 adds the stacks of all threads, in case the process hangs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(fd, stream.fileno())
    os.close(fd)
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s {name} %(levelname)s %(message)s", stream=sys.stderr, force=True
    )
    faulthandler.register(signal.SIGUSR1, all_threads=True)


def keep_short(limit_bytes: int, *paths: Path) -> None:
    """Drop the older half of each log whenever it exceeds a size, in a thread, until this process ends.

    For logs that this process and its children append to. Lines that they write during the operation are lost.
    """

    def look() -> None:
        # Other threads handle signals.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            time.sleep(_LOOK_S)
            for path in paths:
                with contextlib.suppress(OSError):
                    drop_older_half(path, limit_bytes)

    threading.Thread(target=look, name="logs", daemon=True).start()


def drop_older_half(path: Path, limit_bytes: int) -> None:
    """Shorten a log that exceeds ``limit_bytes`` to its last half of that, from the beginning of a line.

    The file stays the same one, so processes that append to it continue.
    """
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size <= limit_bytes:
            return
        file.seek(size - limit_bytes // 2)
        file.readline()
        kept = file.read()
        file.seek(0)
        file.write(b"(older lines were dropped)\n" + kept)
        file.truncate()


def log_tail(path: Path, count: int, begin: int = 0) -> list[str]:
    """Return the last lines of a log, from at most its last 64 KiB; none if there is no such file.

    Args:
        begin: byte before which nothing is read.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            # A log that became shorter has dropped its older lines, so all of it may be new.
            file.seek(max(begin if begin <= size else 0, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return text.splitlines()[-count:]
