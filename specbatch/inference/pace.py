"""Computes how many packs an engine must hold so that it never waits for one. Pure: no clock, no I/O.

After SGLang has computed a pack, the engine still holds it while its rows are copied, checksummed and put, it is
reported as stored, and the next one is claimed and sent. For that time it needs packs in hand besides the one that is
computed. So a faster engine needs more packs: packs in hand = 1 + rate x turnaround / tokens of a pack. With too few
packs the measured rate is too low, but it rises with each added pack, so the number grows until the engine itself is
the limit.
"""

from __future__ import annotations

import math
from collections import deque

LEAST_IN_FLIGHT, MOST_IN_FLIGHT = 2, 32
TURNAROUND_S = 0.5
"""Seconds allowed for everything except the computation of a pack: several times the time measured over TCP."""
WINDOW_S = 10.0
"""Seconds over which the rate is measured."""


class Pace:
    """The rate of one engine, and the packs that it should hold.

    Args:
        fixed: packs in hand, independent of the rate; None for as many as needed.
        tokens_per_pack: most tokens of a pack.
    """

    def __init__(self, fixed: int | None, tokens_per_pack: int) -> None:
        self.fixed, self.tokens_per_pack = fixed, tokens_per_pack
        self._seen: deque[tuple[float, int]] = deque()
        self._sum = 0

    def computed(self, tokens: int, now: float) -> None:
        """Record the tokens of samples whose rows were stored since the last call.

        Args:
            now: seconds of a monotonic clock.
        """
        self._seen.append((now, tokens))
        self._sum += tokens
        while now - self._seen[0][0] > WINDOW_S:
            self._sum -= self._seen.popleft()[1]

    @property
    def tokens_per_s(self) -> float:
        """Return the rate over the window; 0 until a tenth of it has passed."""
        if not self._seen:
            return 0.0
        first, tokens = self._seen[0]
        seconds = self._seen[-1][0] - first
        return (self._sum - tokens) / seconds if seconds >= WINDOW_S / 10 else 0.0

    @property
    def wanted(self) -> int:
        """Return the number of packs to have in hand."""
        if self.fixed is not None:
            return self.fixed
        ahead = math.ceil(self.tokens_per_s * TURNAROUND_S / self.tokens_per_pack)
        return min(MOST_IN_FLIGHT, max(LEAST_IN_FLIGHT, 1 + ahead))

    @property
    def most(self) -> int:
        """Return the largest value that `wanted` can have."""
        return self.fixed or MOST_IN_FLIGHT
