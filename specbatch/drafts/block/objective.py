"""What a slot of a block learns: a mixture of losses, and its gradient.

Shapes: ``N`` slots, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specbatch.drafts.fused import Fused


@dataclass(frozen=True)
class Objective:
    """Weights of the parts of the loss."""

    token: float = 0.0
    """Weight of ``-log q(t)``."""
    distribution: float = 0.0
    """Weight of ``KL(p ‖ q)``."""
    distance: float = 0.0
    """Weight of ``Σ |q - p|``."""
    d_pace: bool = False
    """Whether slots are weighted by D-PACE (arXiv:2605.18810)."""


@Fused
def compare(
    logits_NV: Tensor,
    truth_NV: Tensor,
    label_N: Tensor,
    weight_N: Tensor,
    objective: Objective,
    acceptance: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Compute the mixture of losses of each slot, and its gradient.

    Args:
        logits_NV: the draft's logits, float32 or wider.
        truth_NV: the target's distribution.
        label_N: the token of the text.
        weight_N: weight of each slot.
        acceptance: whether to compute the probability of acceptance.

    Returns:
        the weighted loss, with cross-entropy instead of the divergence, which differs by a constant; the most likely
        token of each slot; the probability that a token sampled from the draft is accepted; the gradient of the logits.
    """
    token, distribution, distance = objective.token, objective.distribution, objective.distance
    log_q = logits_NV.log_softmax(-1)
    guess = log_q.argmax(-1)
    loss_N = torch.zeros_like(weight_N)
    if token:
        loss_N = loss_N - token * log_q.gather(1, label_N[:, None])[:, 0]
    if distribution:
        loss_N = loss_N - distribution * torch.linalg.vecdot(truth_NV, log_q)
    q = log_q.exp_()
    accepted = sign = None
    if distance or acceptance:
        off = q - truth_NV
        apart_N = off.abs().sum(-1)
        accepted = 1 - apart_N / 2
        if distance:
            loss_N = loss_N + distance * apart_N
            sign = off.sign_()
            sign = sign.sub_(torch.linalg.vecdot(q, sign)[:, None])
    slope = q if sign is None else q * (distance * sign + (token + distribution))
    if sign is None and token + distribution != 1:
        slope = slope * (token + distribution)
    if distribution:
        slope = slope - truth_NV if distribution == 1 else slope.sub(truth_NV, alpha=distribution)
    if token:
        slope = slope.scatter_add(1, label_N[:, None], torch.full_like(slope[:, :1], -token))
    return loss_N * weight_N, guess, accepted, slope.mul_(weight_N[:, None])
