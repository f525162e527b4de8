"""The results of a step, summed over packs and ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.components.loss import BaseLoss
from torchtitan.components.metrics import MetricsProcessor

from specbatch.drafts.base import Term
from specbatch.training.feed.steps import StepFacts


class DraftLoss(BaseLoss):
    """Sums what the draft's forward pass returns, and keeps the parts, which torchtitan would discard."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        pass

    def __init__(self, config: Config, **unused: Any) -> None:
        self.packs: list[Tensor] = []
        """Weighted losses and right proposals of each pack since the start of the step: float ``[2, T]`` each."""

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **unused: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """
        Args:
            pred: ``[2, T]``. The first row is weighted such that its sum over packs and ranks is the loss.
        """
        self.packs.append(pred.detach())
        return pred[0].sum(), {}


class StepMetrics(MetricsProcessor):
    """torchtitan's metrics of every step, kept for `specbatch.training.trainer` to report."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        pass

    grad_norm: float
    """Norm of the gradients before clipping."""
    learning_rate: float

    def should_log(self, step: int) -> bool:
        return True

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        self.grad_norm = grad_norm
        self.learning_rate = next(rate for name, rate in (extra_metrics or {}).items() if name.startswith("lr/"))
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()


@dataclass(frozen=True)
class StepSums:
    """Sums over all packs of all ranks."""

    weighted: Tensor
    """Weighted losses of the terms, whose sum is the step's loss: float64 ``[T]``."""
    right: Tensor
    """How often the draft was right, for each term: float64 ``[T]``."""
    waited_s: float
    """Longest time that a rank waited for data."""
    void: int
    """Packs that trained as zero."""
    snapshot_due: bool
    """Whether a snapshot should follow, as the first rank says."""


def gather(packs: list[Tensor], waited_s: float, void: int, *, snapshot_due: bool = False) -> StepSums:
    """Add up over ranks in the order of ranks, so that the result is reproducible.

    Args:
        packs: float ``[2, T]`` for each of this rank's packs.
        snapshot_due: whether a snapshot should follow the step; only the first rank's value counts.
    """
    local = torch.stack(packs).double().sum(0).flatten()
    mine = torch.cat([local, local.new_tensor([waited_s, void, snapshot_due])])
    of_ranks = gather_numbers(mine)
    total = of_ranks.sum(0).cpu()
    weighted, right = total[:-3].view(2, -1)
    return StepSums(weighted, right, float(of_ranks[:, -3].max()), int(total[-2]), bool(of_ranks[0, -1]))


def gather_numbers(mine: Tensor) -> Tensor:
    """Return the numbers of all ranks, ``[ranks, n]``, in the order of ranks, so that sums are reproducible.

    Args:
        mine: ``[n]``.
    """
    of_ranks = mine.new_empty(dist.get_world_size() * mine.numel())
    dist.all_gather_single(of_ranks, mine)
    return of_ranks.view(-1, mine.numel())


def metrics_line(
    facts: StepFacts,
    sums: StepSums,
    *,
    terms: Sequence[Term],
    grad_norm: float,
    learning_rate: float,
    seconds: float,
    snapshot_s: float = 0.0,
    evaluation: dict[str, Any] | None = None,
    skipped: str = "",
) -> dict[str, Any]:
    """Return the line of a step in the metrics file.

    ``loss`` is the minimised value: the weighted sum of the means of its ``terms``. ``losses`` and ``accuracy`` are the
    plain means of each term, null if a term had no positions. ``seconds`` counts from the end of the previous step;
    ``wait_s`` is the part of it that the rank with the longest wait waited for data, and ``snapshot_s``, if present,
    the part that it waited for the snapshot of the previous step. ``evaluation`` is present if an evaluation
    (`specbatch.training.heldout`) followed the step; its seconds are not part of the step's. ``skipped`` is present if
    the step changed nothing, and says why; values that are not finite are null then.
    """
    seen = facts.counts > 0
    losses = [_number(float(x) / float(facts.shares[k])) if seen[k] else None for k, x in enumerate(sums.weighted)]
    accuracy = [float(x) / int(facts.counts[k]) if seen[k] else None for k, x in enumerate(sums.right)]
    return {
        "step": facts.step,
        "loss": _number(float(sums.weighted.sum())),
        "terms": [term.name for term in terms],
        "losses": losses,
        "accuracy": accuracy,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "tokens": facts.tokens,
        "loss_tokens": int(facts.counts[0]),
        "void_packs": sums.void,
        "seconds": seconds,
        "wait_s": sums.waited_s,
        "tokens_per_s": facts.tokens / seconds,
        **({"snapshot_s": snapshot_s} if snapshot_s else {}),
        **({"evaluation": evaluation} if evaluation else {}),
        **({"skipped": skipped} if skipped else {}),
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
