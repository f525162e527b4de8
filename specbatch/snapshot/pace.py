"""When the next snapshot is due, where that is a matter of time. Pure but for what its owner tells it.

The first rank asks and all follow: its answer travels with the sums that ranks exchange at each step anyway.
"""

from __future__ import annotations

import math

FIRST_S = 60.0
"""Until the first snapshot nobody knows what one takes."""
PRIOR_BETWEEN_FAILURES_S = 86400.0
"""What is taken for the time between two failures as long as none was seen."""
MOST_WRITING = 0.1
"""Most of the time that the disk may be busy with snapshots: they slow training down while they are written."""


class Pace:
    """Time between snapshots: given, or what costs least.

    The latter is Young's first-order optimum, as in Daly, "A higher order estimate of the optimum checkpoint interval
    for restart dumps" (2006): the square root of twice what a snapshot costs by what lies between two failures.

    Args:
        seconds: between two snapshots; None: as costs least.
        failures: how often the run had to go back to a snapshot so far.
        ran_s: how long it ran until now.
    """

    def __init__(self, seconds: float | None, *, failures: int = 0, ran_s: float = 0.0) -> None:
        self._given_s = seconds
        self.between_failures_s = (PRIOR_BETWEEN_FAILURES_S + ran_s) / (1 + failures)
        """The mean of what was seen, with one time of a day without failure before it."""
        self._cost_s: float | None = None
        self._write_s = 0.0
        self._last: float | None = None

    @property
    def interval_s(self) -> float:
        """Seconds between two snapshots, by what is known now."""
        if self._given_s is not None:
            return self._given_s
        if self._cost_s is None:
            return FIRST_S
        return max(math.sqrt(2 * self._cost_s * self.between_failures_s), self._write_s / MOST_WRITING)

    def due(self, now: float) -> bool:
        """Whether a snapshot should follow the step that ends now; the time runs from the first question.

        Args:
            now: seconds on any clock that only goes forward.
        """
        if self._last is None:
            self._last = now
        return now - self._last >= self.interval_s

    def begun(self, now: float) -> None:
        """A snapshot, due or not, is being made."""
        self._last = now

    def measured(self, cost_s: float, write_s: float) -> None:
        """What the newest snapshot took: seconds that training stood still, and until it was on disk."""
        self._cost_s, self._write_s = max(cost_s, 1e-3), write_s
