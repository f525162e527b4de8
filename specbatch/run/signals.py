"""Signal handlers that only report the signal to a given function."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

from specbatch.training.process.signals import DRAINING


def on_signal(tell: Callable[[str], None]) -> None:
    """Call ``tell`` with a reason, in a separate thread, for each signal that asks to stop.

    A handler runs between two arbitrary instructions of the main thread, where no lock may be taken.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        threading.Thread(target=tell, args=(f"signal {name}",), name=f"on-{name}", daemon=True).start()

    for number in DRAINING:
        signal.signal(number, handle)
