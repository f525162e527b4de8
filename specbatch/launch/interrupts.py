"""What Ctrl-C does: once, training stops after the present step, with a snapshot; twice, everything ends at once."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any


class Interrupts:
    """Counts how often the user, or whoever else, asked to stop; a context manager.

    Args:
        end: raise KeyboardInterrupt, which has to be waited for in the main thread, when it was asked twice.
    """

    def __init__(self, *, end: bool = False) -> None:
        self.asked = 0
        self._end = end
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1
        if self.asked == 1:
            os.write(2, b"\nspecbatch: stopping after this step, with a snapshot; Ctrl-C again ends at once\n")
        elif self._end:
            raise KeyboardInterrupt
