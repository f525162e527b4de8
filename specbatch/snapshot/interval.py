"""Decides when the next snapshot is due, if that depends on time. Pure: its owner passes all times.

The first rank decides for all: its decision is part of the sums that ranks exchange at each step anyway.
"""

from __future__ import annotations

import math

FIRST_S = 60.0
"""Seconds until the first snapshot, when its cost is still unknown."""
PRIOR_BETWEEN_FAILURES_S = 86400.0
"""Assumed seconds between two failures, until one has happened."""
MOST_WRITING = 0.1
"""Largest share of time that may be spent on writing snapshots, which slows down training."""


class SnapshotInterval:
    """The time between snapshots: given, or the optimum.

    The latter is Young's first-order optimum, as in Daly, "A higher order estimate of the optimum checkpoint interval
    for restart dumps" (2006): the square root of twice the cost of a snapshot times the time between failures.

    Args:
        seconds: seconds between two snapshots; None for the optimum.
        failures: number of times that the run has gone back to a snapshot.
        ran_s: seconds that it has run.
    """

    def __init__(self, seconds: float | None, *, failures: int = 0, ran_s: float = 0.0) -> None:
        self._given_s = seconds
        self.between_failures_s = (PRIOR_BETWEEN_FAILURES_S + ran_s) / (1 + failures)
        """Mean of the observed times between failures, including one assumed day without failure."""
        self._cost_s: float | None = None
        self._write_s = 0.0
        self._last: float | None = None

    @property
    def interval_s(self) -> float:
        """Seconds between two snapshots, as estimated now."""
        if self._given_s is not None:
            return self._given_s
        if self._cost_s is None:
            return FIRST_S
        return max(math.sqrt(2 * self._cost_s * self.between_failures_s), self._write_s / MOST_WRITING)

    def due(self, now: float) -> bool:
        """Return whether a snapshot should follow the step that ends now. The time starts with the first call.

        Args:
            now: seconds of a monotonic clock.
        """
        if self._last is None:
            self._last = now
        return now - self._last >= self.interval_s

    def begun(self, now: float) -> None:
        """Record that a snapshot, due or not, has begun."""
        self._last = now

    def measured(self, cost_s: float, write_s: float) -> None:
        """Record the cost of the newest snapshot: seconds that training waited, and until it was on disk."""
        self._cost_s, self._write_s = max(cost_s, 1e-3), write_s
