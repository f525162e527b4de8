"""Curves with fewer points that hide nothing: a bucket of steps keeps its mean, minimum and maximum.

The idea is that of M4 (Jugel et al., VLDB 2014): a curve drawn from the extremes of each bucket covers the same pixels
as one drawn from all values. The mean is kept as well, because it is what one reads from a noisy curve. Pure.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

MOST = 1000
"""Buckets of a run if there are at most `WHOLE` runs."""
WHOLE = 2
LEAST = 60


@dataclass(frozen=True)
class Buckets:
    """Consecutive steps, cut into buckets of equal size but for the last; ``N`` of them."""

    first_N: np.ndarray
    """int64, index of each bucket's first step."""
    end_N: np.ndarray
    """int64, index after each bucket's last step."""

    def __len__(self) -> int:
        return len(self.first_N)

    @property
    def whole(self) -> bool:
        """Whether each bucket is a single step."""
        return bool((self.end_N - self.first_N <= 1).all())

    def mean(self, values_S: np.ndarray) -> np.ndarray:
        """Float ``[N]``: means of the known values; NaN where there are none."""
        known_S = np.isfinite(values_S)
        sums = self._reduce(np.add, np.where(known_S, values_S, 0.0))
        counts = self._reduce(np.add, known_S.astype(np.float64))
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums / counts

    def least(self, values_S: np.ndarray) -> np.ndarray:
        """Float ``[N]``: minima of the known values."""
        return self._reduce(np.fmin, values_S)

    def greatest(self, values_S: np.ndarray) -> np.ndarray:
        """Float ``[N]``: maxima of the known values."""
        return self._reduce(np.fmax, values_S)

    def last(self, values_S: np.ndarray) -> np.ndarray:
        """``[N]``: the value at each bucket's last step."""
        return values_S[self.end_N - 1]

    def _reduce(self, operation: np.ufunc, values_S: np.ndarray) -> np.ndarray:
        if not len(self):
            return np.empty(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            result: np.ndarray = operation.reduceat(values_S, self.first_N)
        return result


def buckets(steps: int, most: int) -> Buckets:
    """Cut steps into at most ``most`` buckets."""
    size = max(1, -(-steps // most))
    first = np.arange(0, steps, size, dtype=np.int64)
    return Buckets(first, np.minimum(first + size, steps))


def most_buckets(runs: int) -> int:
    """Number of buckets that each of several runs may have, so that a page stays small."""
    return MOST if runs <= WHOLE else max(LEAST, MOST * WHOLE // runs)
