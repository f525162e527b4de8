"""Estimates what a run will take before anything is queued: the model behind ``specbatch plan``.

- `samples`: what each sample costs, by the draft's algorithm;
- `flops`: operations of the target by formula, with their sources;
- `work`: totals over the steps of a run;
- `rates`: speeds, as given, measured or assumed;
- `pipeline`: durations.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from specbatch.config import Config
from specbatch.drafts.base import algorithm_of
from specbatch.planning.pipeline import Deployment, Times, times
from specbatch.planning.rates import Known, Rates, rates
from specbatch.planning.work import PlannedWork, work_of
from specbatch.target import read_target

__all__ = ["Budget", "Known", "budget", "deployment"]


@dataclass(frozen=True)
class Budget:
    """Estimates of all resources of a run."""

    work: PlannedWork
    rates: Rates
    layout: Deployment
    times: Times
    draft: list[str]
    """Size of the draft, in the algorithm's words."""
    rank_bytes: dict[str, int]
    """GPU memory of a trainer rank at its peak, by kind."""
    warnings: list[str]

    def as_json(self) -> dict[str, Any]:
        """All numbers, keyed by the names of their fields."""
        plan = self.work.plan
        return {
            "work": self.work.as_json(),
            "plan": {**plan.fingerprint, "steps": plan.steps},
            "rates": asdict(self.rates),
            "layout": {**asdict(self.layout), "devices": self.layout.devices},
            "times": asdict(self.times),
            "draft": self.draft,
            "rank_bytes": self.rank_bytes,
            "warnings": self.warnings,
        }


def budget(config: Config, known: Known) -> Budget:
    """Prepare the corpus, make all checks of a run, and estimate what it takes.

    Raises:
        UserError: the run can't work, for example because a step needs more bytes than the store holds.
    """
    from specbatch.checks import check, check_plan
    from specbatch.corpus import corpus_of, prepare

    # A job runs on machines other than the one on which it is planned.
    warnings = check(config, new_run=False, here=not _queued(config))
    corpus, algorithm = corpus_of(prepare(config)), algorithm_of(config, read_target(config.target.path))
    work = work_of(config, corpus)
    warnings += check_plan(config, work.plan, corpus, algorithm, work.stored_bytes_S)
    found, layout = rates(known, work, config), deployment(config, work.steps)
    took = times(work, found, layout)
    return Budget(work, found, layout, took, algorithm.description(), algorithm.memory(), warnings)


def deployment(config: Config, steps: int) -> Deployment:
    """Return the engines, ranks and room of a run of so many steps."""
    from specbatch.room import store_room

    slurm, every = config.slurm, config.training.evaluate_interval_steps
    return Deployment(
        engines=config.inference.engines,
        tensor_parallel=config.inference.tensor_parallel,
        ranks=config.training.ranks,
        room_bytes=store_room(config)[0],
        evaluations=-(-steps // every) if every else 0,
        nodes=(slurm.head_on == "own") + slurm.inference.nodes + slurm.training.nodes if _queued(config) else 0,
        charge=slurm.charge,
    )


def _queued(config: Config) -> bool:
    """Return whether the run is a job that asks for GPUs."""
    return bool(config.slurm.inference.gpus_per_node or config.slurm.training.gpus_per_node)
