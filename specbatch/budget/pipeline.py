"""How long a run takes, from its work and the rates of those who do it. Pure.

Engines and ranks work at the same time, each on devices of its own, so the slower side decides. Before the first step
engines compute its packs and the held-out ones, and nobody else has anything to do. Where the store does not hold two
steps, the two sides take turns. Snapshots are written beside training and the start of the components is not counted.

On a machine without GPU engines and ranks share the cores, so rates that were measured in a run (``--like``) hold for
runs of the same layout only.
"""

from __future__ import annotations

from dataclasses import dataclass

from specbatch.budget.rates import Rates
from specbatch.budget.work import Work


@dataclass(frozen=True)
class Layout:
    """Who works."""

    engines: int
    tensor_parallel: int
    ranks: int
    room_bytes: int
    """That the store holds."""
    evaluations: int

    @property
    def devices(self) -> int:
        """GPUs; processes on a machine without."""
        return self.engines * self.tensor_parallel + self.ranks


@dataclass(frozen=True)
class Times:
    """Seconds, and what follows from them."""

    engines_s: float
    """That all engines together need for everything that is trained."""
    ranks_s: float
    """That all ranks together need, evaluations included."""
    fill_s: float
    """Before the first step."""
    total_s: float
    overlap: bool
    """Whether both sides can work at the same time."""
    engines_per_rank: float
    """Engines that keep one rank busy and are kept busy by it."""
    engine_tokens_per_s: float
    """Of one engine."""
    trainer_tokens_per_s: float
    """Of all ranks."""
    device_hours: float


def times(work: Work, rates: Rates, layout: Layout) -> Times:
    """The model of the whole pipeline."""
    one_engine_s = work.engine_flops / rates.engine.flops_per_s
    one_rank_s = work.trainer_flops / rates.rank.flops_per_s
    evaluations_s = layout.evaluations * work.evaluation_flops / rates.rank.flops_per_s / layout.ranks
    engines_s, training_s = one_engine_s / layout.engines, one_rank_s / layout.ranks
    first = work.engine_flops_of(work.plan.packs(1)) + work.heldout_engine_flops
    fill_s = first / rates.engine.flops_per_s / layout.engines
    overlap = layout.room_bytes >= 2 * work.largest_step_bytes
    longest = max(engines_s, training_s) if overlap else engines_s + training_s
    total_s = fill_s + longest + evaluations_s
    return Times(
        engines_s=engines_s,
        ranks_s=training_s + evaluations_s,
        fill_s=fill_s,
        total_s=total_s,
        overlap=overlap,
        engines_per_rank=one_engine_s / one_rank_s,
        engine_tokens_per_s=work.captured_tokens / one_engine_s,
        trainer_tokens_per_s=work.tokens / training_s,
        device_hours=total_s * layout.devices / 3600,
    )
