"""Elementwise operations that a GPU should do in one pass over memory: compiled there, run as written elsewhere.

The code as written is the reference: tests compile each function for the CPU and compare. Sizes are dynamic, so that
packs of all sizes share one compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

# Sizes of one, packs where nothing learns, and sizes that happen to be equal cause separate compilations: a dozen for
# one function. Beyond its limit torch would run the rest uncompiled, and attention would allocate all scores.
torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)

LK_DECAY = 3
"""How fast LK-lambda moves away from cross-entropy as acceptance grows: the authors' value."""

P = ParamSpec("P")
R = TypeVar("R")


class Fused(Generic[P, R]):
    """A function of tensors, which is compiled if the first tensor is on a GPU."""

    def __init__(self, eager: Callable[P, R]) -> None:
        self.eager = eager
        self.compiled: Callable[P, R] = torch.compile(eager, dynamic=True)
        """The compiled function; compilation happens in the first call."""
        self.__doc__ = eager.__doc__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        return (self.compiled if first.is_cuda else self.eager)(*args, **kwargs)


@Fused
def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Compute the root mean square norm (arXiv:1910.07467) over the last dimension, with statistics in float32 or
    wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight_H


@Fused
def rotate(x_NHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding (arXiv:2104.09864) to halves, as Llama does.

    Args:
        cos, sin: ``[N, 1, D / 2]``, float32 or wider, in which products are computed, too.
    """
    first, second = x_NHD.to(cos.dtype).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x_NHD.dtype)


@Fused
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute ``silu(gate) · up`` (arXiv:2002.05202)."""
    return torch.nn.functional.silu(gate) * up


@Fused
def compare(logits_NV: Tensor, truth_NV: Tensor, likely_N: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the cross-entropy against a distribution, and its gradient, which takes the place of the logits. Its
    results can't be differentiated.

    Args:
        logits_NV: the draft's logits, float32 or wider; overwritten.
        truth_NV: the target's distribution.
        likely_N: the target's most likely token, int64.
        weight: scalar weight of each row's cross-entropy.

    Returns:
        the weighted cross-entropy of each row; whether that token is the draft's most likely one, too; and the gradient
        of the logits.
    """
    # In place: on a CPU, memory for each intermediate result would take longer than its arithmetic, and torch's softmax
    # is several times faster than its exponential.
    logits_NV -= logits_NV.amax(-1, keepdim=True)
    right_N = logits_NV.gather(-1, likely_N[:, None])[:, 0] == 0
    expected_N = (truth_NV * logits_NV).sum(-1)
    q_NV = torch.softmax(logits_NV, -1, out=logits_NV)
    # The most likely token has logit zero, so its probability is one over the softmax's denominator.
    loss_N = -q_NV.amax(-1).log() - expected_N
    return loss_N * weight, right_N, q_NV.mul_(weight).addcmul_(truth_NV, weight, value=-1)


@Fused
def compare_by_acceptance(
    logits_NV: Tensor, truth_NV: Tensor, likely_N: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Do the same as `compare` for the loss LK-alpha (arXiv:2602.23881): the negative logarithm of ``a``, the
    probability that a sampled proposal is accepted, which is the overlap of both distributions."""
    log_q = logits_NV.log_softmax(-1)
    accepted_N1, slope_NV = _acceptance(log_q.exp(), truth_NV)
    return -accepted_N1[:, 0].log() * weight, _is_likely(log_q, likely_N), slope_NV / accepted_N1 * -weight


@Fused
def compare_by_both(
    logits_NV: Tensor, truth_NV: Tensor, likely_N: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Do the same as `compare` for the loss LK-lambda (arXiv:2602.23881): ``l`` times the cross-entropy plus ``1 - l``
    times the probability ``1 - a`` that a sampled proposal is rejected, with ``l = exp(-3 a)`` for each position."""
    log_q = logits_NV.log_softmax(-1)
    q = log_q.exp()
    accepted_N1, slope_NV = _acceptance(q, truth_NV)
    share_N1 = (-LK_DECAY * accepted_N1).exp()
    loss_N = -share_N1[:, 0] * (truth_NV * log_q).sum(-1) + (1 - share_N1[:, 0]) * (1 - accepted_N1[:, 0])
    slope_NV = share_N1 * (q - truth_NV) - (1 - share_N1) * slope_NV
    return loss_N * weight, _is_likely(log_q, likely_N), slope_NV * weight


def _is_likely(logits_NV: Tensor, token_N: Tensor) -> Tensor:
    """Return whether a token is the most likely one of each row; several tokens may be."""
    return logits_NV.gather(-1, token_N[:, None])[:, 0] == logits_NV.amax(-1)


def _acceptance(q_NV: Tensor, truth_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probability ``[N, 1]`` that a proposal sampled from ``q`` is accepted, and its gradient by the
    logits."""
    below_NV = torch.where(q_NV < truth_NV, q_NV, 0)
    accepted_N1 = torch.minimum(q_NV, truth_NV).sum(-1, keepdim=True).clamp(min=torch.finfo(q_NV.dtype).tiny)
    return accepted_N1, below_NV - q_NV * below_NV.sum(-1, keepdim=True)
