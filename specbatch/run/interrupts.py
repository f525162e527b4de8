"""Handles Ctrl-C: once, training stops after the current step, with a snapshot; twice, everything ends at once."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any


class Interrupts:
    """Counts requests to stop, from the user or elsewhere; a context manager.

    Args:
        how: how the run stops, for people.
    """

    def __init__(self, how: str = "after this step, with a snapshot") -> None:
        self.asked = 0
        self._told = f"\nspecbatch: stopping {how}; Ctrl-C again ends at once\n".encode()
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
            os.write(2, self._told)
