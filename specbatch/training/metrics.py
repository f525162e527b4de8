"""What a step gave, summed over packs and ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.components.loss import BaseLoss
from torchtitan.components.metrics import MetricsProcessor

from specbatch.training.steps import StepFacts


class UnrolledLoss(BaseLoss):
    """The sum of what the draft's forward pass returns; keeps the parts, which torchtitan would throw away."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        pass

    def __init__(self, config: Config, **unused: Any) -> None:
        self.packs: list[Tensor] = []
        """Float ``[2, K]`` for each pack since the start of the step: weighted losses, and right proposals."""

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **unused: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """
        Args:
            pred: ``[2, K]``, of which the first row is weighted so that its sum over packs and ranks is the loss.
        """
        self.packs.append(pred.detach())
        return pred[0].sum(), {}


class StepMetrics(MetricsProcessor):
    """torchtitan's, asked at every step, and kept for `specbatch.training.trainer` to report."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        pass

    grad_norm: float
    """Before clipping."""
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
    """float64 ``[K]``: weighted losses of the unrolled steps; their sum is the step's loss."""
    right: Tensor
    """float64 ``[K]``: how often the draft's most likely token was the target's."""
    waited_s: float
    """Longest time that a rank stood still for want of data."""
    void: int
    """Packs that trained as zero."""
    snapshot_due: bool
    """What the first rank says."""


def gather(packs: list[Tensor], waited_s: float, void: int, *, snapshot_due: bool = False) -> StepSums:
    """Add up over ranks, in the order of ranks, so that the result is the same every time.

    Args:
        packs: float ``[2, K]`` for each of this rank's packs.
        snapshot_due: whether the step should be followed by a snapshot; only the first rank is listened to.
    """
    local = torch.stack(packs).double().sum(0).flatten()
    mine = torch.cat([local, local.new_tensor([waited_s, void, snapshot_due])])
    of_ranks = of_all_ranks(mine)
    total = of_ranks.sum(0).cpu()
    weighted, right = total[:-3].view(2, -1)
    return StepSums(weighted, right, float(of_ranks[:, -3].max()), int(total[-2]), bool(of_ranks[0, -1]))


def of_all_ranks(mine: Tensor) -> Tensor:
    """``[ranks, n]``: the numbers of all ranks, in their order; sums over them are the same every time.

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
    step_decay: float,
    grad_norm: float,
    learning_rate: float,
    seconds: float,
    snapshot_s: float = 0.0,
    evaluation: dict[str, Any] | None = None,
    skipped: str = "",
) -> dict[str, Any]:
    """The line of a step.

    ``loss`` is what was minimised: the sum of the unrolled steps' mean cross-entropies, each weighted by
    ``step_decay`` to the power of its number. ``losses`` and ``accuracy`` are the plain means of each unrolled step,
    null where a step had nothing to learn from. ``seconds`` is since the end of the step before, ``wait_s`` the part of
    it that the rank that waited longest stood still for want of data, ``snapshot_s``, where it is told, the part
    that it stood still for the snapshot of the step before. ``evaluation`` is there after steps that were followed by
    one (`specbatch.training.heldout`), whose seconds are its own. ``skipped`` is there where a step changed nothing,
    and says why; what is no number is null then.
    """
    seen = facts.counts > 0
    losses = [_number(float(x) / step_decay**k) if seen[k] else None for k, x in enumerate(sums.weighted)]
    accuracy = [float(x) / int(facts.counts[k]) if seen[k] else None for k, x in enumerate(sums.right)]
    return {
        "step": facts.step,
        "loss": _number(float(sums.weighted.sum())),
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
