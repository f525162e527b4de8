"""The process that a local run belongs to, and with which it ends."""

from __future__ import annotations

import os

import psutil

from specbatch.errors import RunError


def owner() -> psutil.Process | None:
    """Return the foreground process of a local run; None for the head of a job.

    Raises:
        RunError: it is gone already.
    """
    pid = os.environ.get("SPECBATCH_OWNER")
    try:
        return psutil.Process(int(pid)) if pid else None
    except psutil.NoSuchProcess as error:
        raise RunError("the process that started this run is gone") from error
