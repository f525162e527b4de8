"""What every rank knows about an optimizer step before any of its data arrives. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from specbatch.drafts.base import Algorithm
from specbatch.drafts.masks import Masks, SampleId
from specbatch.plan import Pack, PackPlan

if TYPE_CHECKING:
    from specbatch.corpus import Corpus


@dataclass(frozen=True)
class StepFacts:
    """Facts about one step: the same on every rank, except `packs`."""

    step: int
    packs: tuple[Pack, ...]
    """The packs that this rank trains, in order."""
    tokens: int
    """Tokens of all packs of all ranks."""
    counts: np.ndarray
    """Positions that enter each term of the loss, over all packs of all ranks: int64 ``[T]``."""
    shares: np.ndarray
    """Factor of each term's mean in the loss: float64 ``[T]``."""
    weights: np.ndarray
    """Factor of each term's sum, such that sums over packs and ranks are the loss: float32 ``[T]``."""


class Steps:
    """Returns the facts of each step.

    Args:
        algorithm: gives the terms of the loss.
    """

    def __init__(
        self,
        plan: PackPlan,
        corpus: Corpus,
        algorithm: Algorithm,
        *,
        rank: int,
        ranks: int,
    ) -> None:
        self._plan, self._corpus, self._algorithm = plan, corpus, algorithm
        self._rank, self._ranks = rank, ranks
        self.facts = lru_cache(maxsize=16)(self._facts)

    @property
    def packs_per_rank(self) -> int:
        return self._plan.packs_per_step // self._ranks

    def _facts(self, step: int) -> StepFacts:
        dealt = self._plan.assign(step, self._ranks)
        packs = [pack for share in dealt for pack in share]
        samples = [SampleId(pack.epoch, sample) for pack in packs for sample in pack.samples]
        masks = Masks.of([self._corpus.sample(sample.sample).loss_mask for sample in samples], samples)
        counts = self._algorithm.counts(masks).sum(axis=-1, dtype=np.int64)
        shares = self._algorithm.shares(counts)
        weights = np.divide(shares, counts, out=np.zeros_like(shares), where=counts > 0)
        tokens = sum(self._plan.tokens(pack) for pack in packs)
        return StepFacts(step, tuple(dealt[self._rank]), tokens, counts, shares, weights.astype(np.float32))
