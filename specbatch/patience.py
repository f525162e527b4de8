"""Whether to start something again that died: as long as it helps. Pure."""

from __future__ import annotations


class Patience:
    """Counts restarts in whose course no step was trained that had not been trained before.

    Args:
        reached: highest step trained so far.
        most: restarts without progress.
    """

    def __init__(self, reached: int, most: int) -> None:
        self._best, self._most = reached, most
        self.restarts = 0
        """Since the last progress, those that were refused included."""

    def again(self, reached: int) -> bool:
        """Ask after each death, with the highest step trained by then."""
        if reached > self._best:
            self._best, self.restarts = reached, 0
        self.restarts += 1
        return self.restarts <= self._most
