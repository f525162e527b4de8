"""The log of a component's process: everything that it, its libraries and its children print goes into one file."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
from pathlib import Path


def open_log(path: Path, name: str) -> None:
    """Send the output of this process there from now on, and log one line an event under this name.

    SIGUSR1 adds the stacks of all threads: for when nothing moves.
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
