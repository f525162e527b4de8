"""Decides whether to restart something that died: as long as restarts lead to progress. Pure."""

from __future__ import annotations


class RestartPolicy:
    """Counts restarts since a step was last trained for the first time.

    Args:
        reached: highest step trained so far.
        most: allowed restarts without progress.
    """

    def __init__(self, reached: int, most: int) -> None:
        self._best, self._most = reached, most
        self.restarts = 0
        """Restarts since the last new highest step, including refused ones."""

    def again(self, reached: int) -> bool:
        """Return whether to restart; call it after each death with the highest step trained by then."""
        if reached > self._best:
            self._best, self.restarts = reached, 0
        self.restarts += 1
        return self.restarts <= self._most
