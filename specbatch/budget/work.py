"""The work of a run: what its steps capture, store and train, exactly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from specbatch.budget.flops import active_weights, draft_flops, engine_flops
from specbatch.budget.samples import sample_costs
from specbatch.capture import BYTES_PER_VALUE
from specbatch.config import Config
from specbatch.corpus import make_plan, planned_steps
from specbatch.plan import Pack, Plan
from specbatch.target import capture_contract, read_target
from specbatch.training.budget import draft_shape

if TYPE_CHECKING:
    from specbatch.corpus import Corpus


@dataclass(frozen=True)
class Work:
    """All numbers are of the steps that the run makes, unless they say otherwise."""

    plan: Plan
    steps: int
    ranks: int
    samples: int
    tokens: int
    loss_tokens: int
    captured_tokens: int
    """That engines compute; the held-out ones come in addition."""
    live: tuple[int, ...]
    """Columns that each unrolled step computes in full."""
    bytes: int
    """That travel."""
    largest_step_bytes: int
    full_token_bytes: int
    """Of a token of which every row is stored."""
    engine_flops: float
    trainer_flops: float
    heldout_packs: int
    heldout_tokens: int
    heldout_bytes: int
    heldout_engine_flops: float
    evaluation_flops: float
    """Of one evaluation."""
    _engine_S: np.ndarray
    _trainer_S: np.ndarray

    def engine_flops_of(self, packs: Iterable[Pack]) -> float:
        """Of capturing these packs."""
        return float(self._engine_S[[sample for pack in packs for sample in pack.samples]].sum())

    def trainer_flops_of(self, packs: Iterable[Pack]) -> float:
        """Of training these packs."""
        return float(self._trainer_S[[sample for pack in packs for sample in pack.samples]].sum())

    def as_json(self) -> dict[str, Any]:
        """The numbers by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "plan" and not f.name.startswith("_")}


def work_of(config: Config, corpus: Corpus) -> Work:
    """Count the work of a run.

    Args:
        corpus: prepared, with its held-out data.
    """
    plan, target = make_plan(config, corpus), read_target(config.target.path)
    contract = capture_contract(config, target)
    steps = planned_steps(config, plan)
    costs = sample_costs(corpus, config.draft.ttt_steps)
    if plan.heldout and corpus.heldout is not None:
        costs = costs.joined(sample_costs(corpus.heldout, config.draft.ttt_steps))
    shape = draft_shape(config, target)
    bytes_S = BYTES_PER_VALUE * (contract.widths["aux"] * costs.columns_S + contract.widths["last"] * costs.targets_S)
    engine_S = engine_flops(target, active_weights(target), costs.captured_S)
    trainer_S = draft_flops(shape, costs)
    evaluation_S = draft_flops(shape, costs, backward=False)
    of_steps = [_samples(plan.packs(step)) for step in range(1, steps + 1)]
    times_S = np.bincount(np.concatenate(of_steps), minlength=costs.tokens_S.size)
    heldout = _samples(plan.heldout)
    return Work(
        plan=plan,
        steps=steps,
        ranks=config.training.ranks,
        samples=int(times_S.sum()),
        tokens=int(times_S @ costs.tokens_S),
        loss_tokens=int(times_S @ costs.loss_tokens_S),
        captured_tokens=int(times_S @ costs.captured_S),
        live=tuple(int(times_S @ live_S) for live_S in costs.live_KS),
        bytes=int(times_S @ bytes_S),
        largest_step_bytes=max(int(bytes_S[samples].sum()) for samples in of_steps),
        full_token_bytes=BYTES_PER_VALUE * sum(contract.widths.values()),
        engine_flops=float(times_S @ engine_S),
        trainer_flops=float(times_S @ trainer_S),
        heldout_packs=len(plan.heldout),
        heldout_tokens=int(costs.tokens_S[heldout].sum()),
        heldout_bytes=int(bytes_S[heldout].sum()),
        heldout_engine_flops=float(engine_S[heldout].sum()),
        evaluation_flops=float(evaluation_S[heldout].sum()),
        _engine_S=engine_S,
        _trainer_S=trainer_S,
    )


def _samples(packs: Iterable[Pack]) -> np.ndarray:
    return np.array([sample for pack in packs for sample in pack.samples], dtype=np.int64)
