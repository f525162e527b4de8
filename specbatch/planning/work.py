"""The work of a run: what its steps capture, store and train, exactly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from specbatch.config import Config
from specbatch.corpus import make_plan, planned_steps
from specbatch.drafts.base import algorithm_of
from specbatch.plan import Pack, Plan
from specbatch.planning.flops import active_weights, engine_flops
from specbatch.target import attention, read_target

if TYPE_CHECKING:
    from specbatch.corpus import Corpus


@dataclass(frozen=True)
class PlannedWork:
    """Totals over the steps that the run makes, unless stated otherwise."""

    plan: Plan
    steps: int
    ranks: int
    samples: int
    tokens: int
    loss_tokens: int
    captured_tokens: int
    """Tokens that engines compute, except held-out ones."""
    computed: str
    """The algorithm's name for what ``live`` counts."""
    live: tuple[int, ...]
    """Positions that are computed in full for each term of the loss."""
    bytes: int
    """Bytes of hidden states that are transferred."""
    largest_step_bytes: int
    full_token_bytes: int
    """Bytes of a token if each tensor has a row for it."""
    active_weights: int
    """Weights of the target that compute a token."""
    weight_format: str
    """How most of them are stored: `specbatch.planning.flops.ActiveWeights`."""
    experts: bool
    """Whether the target is a mixture of experts."""
    engine_flops: float
    trainer_flops: float
    heldout_packs: int
    heldout_tokens: int
    heldout_bytes: int
    heldout_engine_flops: float
    evaluation_flops: float
    """Operations of one evaluation."""
    _bytes_S: np.ndarray
    _engine_S: np.ndarray
    _trainer_S: np.ndarray

    @property
    def stored_bytes_S(self) -> np.ndarray:
        """Bytes that each sample occupies in the store: int64 ``[samples, then held-out samples]``."""
        return self._bytes_S

    def engine_flops_of(self, packs: Iterable[Pack]) -> float:
        """Return the operations of capturing these packs."""
        return float(self._engine_S[[sample for pack in packs for sample in pack.samples]].sum())

    def trainer_flops_of(self, packs: Iterable[Pack]) -> float:
        """Return the operations of training these packs."""
        return float(self._trainer_S[[sample for pack in packs for sample in pack.samples]].sum())

    def as_json(self) -> dict[str, Any]:
        """Return the numbers by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "plan" and not f.name.startswith("_")}


def work_of(config: Config, corpus: Corpus) -> PlannedWork:
    """Count the work of a run.

    Args:
        corpus: prepared, with its held-out data.
    """
    plan, target = make_plan(config, corpus), read_target(config.target.path)
    algorithm, active = algorithm_of(config, target), active_weights(target)
    contract, layers = algorithm.contract, attention(target)
    steps = planned_steps(config, plan)
    times_S, heldout = plan.times(steps), _samples(plan.heldout)
    held_S = np.zeros(times_S.size, dtype=bool)
    held_S[heldout] = True
    bytes_S = np.zeros(times_S.size, dtype=np.int64)
    engine_S, trainer_S = np.zeros(times_S.size), np.zeros(times_S.size)
    tokens = loss_tokens = captured = heldout_tokens = first = 0
    live_T, evaluation_flops = np.zeros(len(algorithm.terms), dtype=np.int64), 0.0
    for masks in corpus.masks(heldout=True):
        here = slice(first, first + len(masks.lengths_S))
        first = here.stop
        costs, times, held = algorithm.costs(masks), times_S[here], held_S[here]
        bytes_S[here] = costs.bytes_S(contract)
        engine_S[here] = engine_flops(layers, active.count, costs.captured_S)
        trainer_S[here] = costs.flops_S
        tokens += int(times @ masks.lengths_S)
        loss_tokens += int(times @ masks.loss_tokens_S)
        captured += int(times @ costs.captured_S)
        live_T += costs.computed_TS @ times
        heldout_tokens += int(masks.lengths_S[held].sum())
        evaluation_flops += float(costs.forward_flops_S[held].sum())
    return PlannedWork(
        plan=plan,
        steps=steps,
        ranks=config.training.ranks,
        samples=int(times_S.sum()),
        tokens=tokens,
        loss_tokens=loss_tokens,
        captured_tokens=captured,
        computed=algorithm.computed,
        live=tuple(live_T.tolist()),
        bytes=int(times_S @ bytes_S),
        largest_step_bytes=int(plan.step_sums(bytes_S, steps).max()),
        full_token_bytes=contract.bytes_per_token,
        active_weights=active.count,
        weight_format=active.format,
        experts=target.experts is not None,
        engine_flops=float(times_S @ engine_S),
        trainer_flops=float(times_S @ trainer_S),
        heldout_packs=len(plan.heldout),
        heldout_tokens=heldout_tokens,
        heldout_bytes=int(bytes_S[heldout].sum()),
        heldout_engine_flops=float(engine_S[heldout].sum()),
        evaluation_flops=evaluation_flops,
        _bytes_S=bytes_S,
        _engine_S=engine_S,
        _trainer_S=trainer_S,
    )


def _samples(packs: Iterable[Pack]) -> np.ndarray:
    return np.array([sample for pack in packs for sample in pack.samples], dtype=np.int64)
