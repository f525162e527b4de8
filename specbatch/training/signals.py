"""Signals of a trainer process: a thread waits for them, so that a blocked main thread can't hold them up."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from specbatch.errors import RunError

log = logging.getLogger(__name__)

DRAINING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""What Slurm, submitit and terminals send before they kill."""
_PR_SET_PDEATHSIG = 1


def watch(tell: Callable[[signal.Signals, int], None]) -> None:
    """Call ``tell`` with the number and the sender's process id of each signal in `DRAINING`.

    Must be called by the main thread, before threads of ours are started: they inherit what they must not hear.
    Threads that libraries started while they were imported may hear it all the same; then the sender is 0.
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
    """Tell the dispatcher that the attempt should end at the next step's boundary. All else follows from that."""
    from specbatch.dispatch.client import Client
    from specbatch.dispatch.rendezvous import wait_for

    try:
        with contextlib.closing(Client(wait_for(rendezvous, attempt, timeout_s=30.0))) as client:
            client.drain(why)
        log.info("asked to stop why=%s", why)
    except RunError as error:
        log.error("could not ask the dispatcher to stop why=%s error=%s", why, error)


def die_with_parent() -> None:
    """Have the kernel end this process when the agent that started it is gone, however that came."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
