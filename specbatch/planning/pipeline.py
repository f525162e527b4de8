"""How long a run takes, from its work and the speeds of engines and ranks. Pure.

Engines and ranks work at the same time on separate devices, so the slower side decides. Before the first step the
engines compute its packs and the held-out ones while the ranks wait. If the store can't hold two steps, the two sides
take turns. Snapshots are written in parallel to training, and the start of the components is not counted. On a machine
without GPU, engines and ranks share the cores, so speeds that were measured in a run (``--like``) are valid only for
runs of the same layout.
"""

from __future__ import annotations

from dataclasses import dataclass

from specbatch.planning.rates import Rates
from specbatch.planning.work import PlannedWork


@dataclass(frozen=True)
class Deployment:
    """Engines, ranks and the room in the store."""

    engines: int
    tensor_parallel: int
    ranks: int
    room_bytes: int
    """Bytes that the store can hold."""
    evaluations: int
    nodes: int = 0
    """Nodes of the run's Slurm job; 0 if its configuration asks for no GPUs."""
    charge: float = 1.0
    """Factor by which the site charges for an hour of a node."""

    @property
    def devices(self) -> int:
        """Number of GPUs; of processes on a machine without GPUs."""
        return self.engines * self.tensor_parallel + self.ranks


@dataclass(frozen=True)
class Times:
    """Durations, and numbers derived from them."""

    engines_s: float
    """Seconds that all engines together need for everything that is trained."""
    ranks_s: float
    """Seconds that all ranks together need, evaluations included."""
    fill_s: float
    """Seconds before the first step."""
    total_s: float
    overlap: bool
    """Whether both sides can work at the same time."""
    engines_per_rank: float
    """Engines that keep one rank busy and are kept busy by it."""
    engine_tokens_per_s: float
    """Speed of one engine."""
    trainer_tokens_per_s: float
    """Speed of all ranks together."""
    device_hours: float


def times(work: PlannedWork, rates: Rates, layout: Deployment) -> Times:
    """Apply the model of the whole pipeline."""
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
