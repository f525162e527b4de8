"""Signals of a trainer process: a thread waits for them, so that a blocked main thread can't delay them."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from specbatch.errors import RunError

log = logging.getLogger(__name__)

DRAINING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""Signals that Slurm, submitit and terminals send before they kill."""


def watch(tell: Callable[[signal.Signals, int], None]) -> None:
    """Call ``tell`` with the number and the sender's process id of each signal in `DRAINING`.

    Must be called by the main thread before it starts other threads, which inherit the mask that blocks these signals.
    Threads that libraries started during their import may still receive one; then the sender is 0.
    """
    heard, hear = os.pipe()
    os.set_blocking(hear, False)
    signal.set_wakeup_fd(hear)
    for number in DRAINING:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, DRAINING)

    def listen() -> None:
        while True:
            info = signal.sigwaitinfo(DRAINING)
            tell(signal.Signals(info.si_signo), info.si_pid)

    def listen_for_others() -> None:
        while number := os.read(heard, 1):
            if number[0] in DRAINING:
                tell(signal.Signals(number[0]), 0)

    threading.Thread(target=listen, name="signals", daemon=True).start()
    threading.Thread(target=listen_for_others, name="signals-of-others", daemon=True).start()


def ask_to_stop(rendezvous: Path, attempt: int, why: str) -> None:
    """Ask the dispatcher to end the attempt after the current step. It tells all others."""
    from specbatch.dispatch.client import Client
    from specbatch.dispatch.connection_file import wait_for

    try:
        with contextlib.closing(Client(wait_for(rendezvous, attempt, timeout_s=30.0))) as client:
            client.drain(why)
        log.info("asked to stop why=%s", why)
    except RunError as error:
        log.error("could not ask the dispatcher to stop why=%s error=%s", why, error)
