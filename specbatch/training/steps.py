"""What every rank knows of an optimizer step before any of its data is there. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

from specbatch.plan import Pack

if TYPE_CHECKING:
    from specbatch.corpus import Corpus


@dataclass(frozen=True)
class StepFacts:
    """One step: the same on every rank, but for `packs`."""

    step: int
    packs: tuple[Pack, ...]
    """The packs that this rank trains, in order."""
    tokens: int
    """Tokens of all packs of all ranks."""
    counts: np.ndarray
    """int64 ``[K]``: columns of all packs of all ranks that enter the loss of each unrolled step."""
    weights: np.ndarray
    """float32 ``[K]``: what each unrolled step's summed cross-entropy is multiplied with, so that sums over packs
    and ranks are means over the step's loss tokens, weighted by unrolled step."""


class Dealt(Protocol):
    """Whoever knows which packs a step has (`specbatch.plan.Plan`)."""

    @property
    def packs_per_step(self) -> int: ...

    def assign(self, step: int, ranks: int) -> list[list[Pack]]: ...

    def tokens(self, pack: Pack) -> int: ...


class Steps:
    """The facts of each step.

    Args:
        count: numbers of columns that enter the loss of each unrolled step, from a sample's loss mask.
        step_decay: weight of an unrolled step's loss as a factor on the one before.
    """

    def __init__(
        self,
        plan: Dealt,
        corpus: Corpus,
        count: Callable[[np.ndarray], np.ndarray],
        *,
        step_decay: float,
        rank: int,
        ranks: int,
    ) -> None:
        self._plan, self._corpus, self._count = plan, corpus, count
        self._decay, self._rank, self._ranks = step_decay, rank, ranks
        self.facts = lru_cache(maxsize=16)(self._facts)

    @property
    def packs_per_rank(self) -> int:
        return self._plan.packs_per_step // self._ranks

    def _facts(self, step: int) -> StepFacts:
        dealt = self._plan.assign(step, self._ranks)
        packs = [pack for share in dealt for pack in share]
        masks = [self._corpus.sample(sample).loss_mask for pack in packs for sample in pack.samples]
        counts = np.stack([self._count(mask) for mask in masks]).sum(axis=0, dtype=np.int64)
        decay = self._decay ** np.arange(len(counts))
        weights = np.divide(decay, counts, out=np.zeros_like(decay), where=counts > 0)
        tokens = sum(self._plan.tokens(pack) for pack in packs)
        return StepFacts(step, tuple(dealt[self._rank]), tokens, counts, weights.astype(np.float32))
