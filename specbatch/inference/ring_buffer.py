"""Allocates pieces of one buffer that are freed in the same order. It accesses no memory itself."""

from __future__ import annotations

import threading
from collections import deque

ALIGNMENT = 512


class RingBuffer:
    """Allocates pieces of a buffer of ``size`` bytes; the oldest one is freed first. Thread-safe."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._live: deque[tuple[int, int]] = deque()
        self._changed = threading.Condition()

    def take(self, nbytes: int, timeout_s: float = 0.0) -> int | None:
        """Allocate a piece of at least ``nbytes`` > 0.

        Args:
            timeout_s: seconds to wait for room.

        Returns:
            its offset, a multiple of `ALIGNMENT`; None if there is no room in time.

        Raises:
            ValueError: the piece is larger than the ring.
        """
        if nbytes > self.size:
            raise ValueError(f"{nbytes} bytes do not fit into a ring of {self.size}")
        with self._changed:
            if not self._changed.wait_for(lambda: self._fit(nbytes) is not None, timeout_s):
                return None
            offset = self._fit(nbytes)
            assert offset is not None
            self._live.append((offset, nbytes))
            return offset

    def give_back(self) -> None:
        """Free the piece that was allocated first."""
        with self._changed:
            self._live.popleft()
            self._changed.notify_all()

    def _fit(self, nbytes: int) -> int | None:
        if not self._live:
            return 0
        oldest = self._live[0][0]
        last, length = self._live[-1]
        end = -(-(last + length) // ALIGNMENT) * ALIGNMENT
        if last >= oldest:
            if end + nbytes <= self.size:
                return end
            return 0 if nbytes <= oldest else None
        return end if end + nbytes <= oldest else None
