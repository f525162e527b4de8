"""What a run will take, before anything is queued: the model behind ``specbatch plan``.

- `samples`: tokens, rows and live columns of each sample, exact;
- `flops`: operations by formula, with their sources;
- `work`: what the steps of a run add up to;
- `rates`: how fast that is done, as given, measured or assumed;
- `pipeline`: how long it takes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from specbatch.budget.pipeline import Layout, Times, times
from specbatch.budget.rates import Known, Rates, rates
from specbatch.budget.work import Work, work_of
from specbatch.config import Config
from specbatch.target import capture_contract, read_target
from specbatch.training.budget import trainer_memory

__all__ = ["Budget", "Known", "budget"]


@dataclass(frozen=True)
class Budget:
    """What a run takes."""

    work: Work
    rates: Rates
    layout: Layout
    times: Times
    rank_bytes: dict[str, int]
    """GPU memory of a trainer rank at its peak, by kind."""
    warnings: list[str]

    def as_json(self) -> dict[str, Any]:
        """All numbers, by the names of their fields."""
        plan = self.work.plan
        return {
            "work": self.work.as_json(),
            "plan": {**plan.fingerprint, "steps": plan.steps},
            "rates": asdict(self.rates),
            "layout": {**asdict(self.layout), "devices": self.layout.devices},
            "times": asdict(self.times),
            "rank_bytes": self.rank_bytes,
            "warnings": self.warnings,
        }


def budget(config: Config, known: Known) -> Budget:
    """Prepare the corpus, check all that a run is checked for, and work out what it takes.

    Raises:
        UserError: the run could not work; for one, if a step needs more bytes than the store holds.
    """
    from specbatch.checks import check, check_plan, store_room
    from specbatch.corpus import corpus_of, prepare

    warnings = check(config, new_run=False)
    corpus, target = corpus_of(prepare(config)), read_target(config.target.path)
    work = work_of(config, corpus)
    warnings += check_plan(config, work.plan, corpus, capture_contract(config, target))
    found = rates(known, work, config.inference.tensor_parallel)
    every = config.training.evaluate_interval_steps
    layout = Layout(
        engines=config.inference.engines,
        tensor_parallel=config.inference.tensor_parallel,
        ranks=config.training.ranks,
        room_bytes=store_room(config)[0],
        evaluations=-(-work.steps // every) if every else 0,
    )
    return Budget(work, found, layout, times(work, found, layout), trainer_memory(config, target), warnings)
