"""What each sample of a corpus costs: tokens, rows, live columns. Exact, from the loss masks.

The same is said of one sample by `specbatch.capture.CaptureContract.rows` and `specbatch.training.drafts.pack.locate`;
here it is worked out for many at once, so that a corpus of millions takes seconds.

Shapes: ``S`` samples, ``K`` unrolled steps, ``N`` tokens of many samples one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from specbatch.corpus import Corpus

BATCH = 4096
"""Samples that are looked at together."""


@dataclass(frozen=True)
class SampleCosts:
    """int64, of each sample."""

    tokens_S: np.ndarray
    loss_tokens_S: np.ndarray
    captured_S: np.ndarray
    """Tokens that an engine computes: up to the last one whose states are read."""
    columns_S: np.ndarray
    """Rows of ``aux``: columns that give the first unrolled step a key and a value."""
    targets_S: np.ndarray
    """Rows of ``last``."""
    live_KS: np.ndarray
    """Columns that each unrolled step computes in full."""
    learning_KS: np.ndarray
    """Columns of each unrolled step that enter the loss."""
    pairs_KS: np.ndarray
    """Pairs of a query and a key that it sees, in each unrolled step."""

    def joined(self, *others: SampleCosts) -> SampleCosts:
        """These samples, and behind them those of others."""
        names = [field.name for field in fields(self)]
        return SampleCosts(*(np.concatenate([getattr(part, name) for part in (self, *others)], -1) for name in names))


def sample_costs(corpus: Corpus, ttt_steps: int) -> SampleCosts:
    """Look at all samples of a corpus."""
    parts: list[SampleCosts] = []
    for first in range(0, len(corpus), BATCH):
        mask_N, lengths = corpus.loss_masks(first, min(first + BATCH, len(corpus)))
        parts.append(costs_of(mask_N, lengths, ttt_steps))
    return parts[0].joined(*parts[1:])


def costs_of(mask_N: np.ndarray, lengths: np.ndarray, ttt_steps: int) -> SampleCosts:
    """The costs of samples that stand one after the other.

    Args:
        mask_N: bool, loss masks.
        lengths: int ``[S]``, at least 1 each.
    """
    ends = np.cumsum(lengths)
    starts = ends - lengths
    position_N = np.arange(len(mask_N)) - np.repeat(starts, lengths)
    left_N = np.repeat(lengths, lengths) - 1 - position_N
    # The target's distribution at a position is learnt if the token after it is a loss token.
    target_N = _shifted(mask_N, 1) & (left_N >= 1) & (position_N >= 1)
    learning_KN = np.stack([_shifted(target_N, 1 + k) & (left_N >= 1 + k) for k in range(ttt_steps)])
    live_KN = np.logical_or.accumulate(learning_KN[::-1])[::-1]
    own_keys_K1 = np.arange(ttt_steps)[:, None]
    pairs_KN = live_KN * (position_N + 1 + own_keys_K1)

    def total(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values.astype(np.int64), starts, axis=-1)

    columns_S = np.maximum.reduceat(np.where(target_N, position_N, 0), starts)
    return SampleCosts(
        tokens_S=np.asarray(lengths, dtype=np.int64),
        loss_tokens_S=total(mask_N),
        captured_S=np.where(columns_S > 0, columns_S + 1, 0),
        columns_S=columns_S,
        targets_S=total(target_N),
        live_KS=total(live_KN),
        learning_KS=total(learning_KN),
        pairs_KS=total(pairs_KN),
    )


def _shifted(values_N: np.ndarray, by: int) -> np.ndarray:
    """What stands ``by`` places later, False beyond the end."""
    return np.concatenate([values_N[by:], np.zeros(min(by, len(values_N)), dtype=bool)])
