"""Elementwise work that a GPU should do in one pass over memory: compiled there, run as written elsewhere.

What is written is the reference: tests compile each of these functions for the CPU and compare. Sizes are dynamic, so
that packs of all sizes share one compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

# Sizes of one, whether anything learns, and sizes that happened to be the same make compilations of their own: a dozen
# of one function. Beyond its limit torch would run the others uncompiled, and attention would hold all scores.
torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)

P = ParamSpec("P")
R = TypeVar("R")


class Fused(Generic[P, R]):
    """A function of tensors, the first of which says where it runs."""

    def __init__(self, eager: Callable[P, R]) -> None:
        self.eager = eager
        self.compiled: Callable[P, R] = torch.compile(eager, dynamic=True)
        """Compiles when it is first called."""
        self.__doc__ = eager.__doc__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        return (self.compiled if first.is_cuda else self.eager)(*args, **kwargs)


@Fused
def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Root mean square norm (arXiv:1910.07467) over the last dimension, with statistics in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight_H


@Fused
def rotate(x_NHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864) of halves, as Llama does it.

    Args:
        cos, sin: float ``[N, 1, D / 2]``, float32 or wider; the products are, too.
    """
    first, second = x_NHD.to(cos.dtype).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x_NHD.dtype)


@Fused
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up`` (arXiv:2002.05202)."""
    return torch.nn.functional.silu(gate) * up


@Fused
def compare(logits_NV: Tensor, truth_NV: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy against a distribution, and its gradient.

    Args:
        logits_NV: the draft's, float32 or wider.
        truth_NV: the target's distribution.
        weight: float, no dimensions: of each row's cross-entropy.

    Returns:
        the weighted cross-entropy and the most likely token of each row, and the gradient of the logits.
    """
    log_q = logits_NV.log_softmax(-1)
    cross_entropy_N = -(truth_NV * log_q).sum(-1) * weight
    return cross_entropy_N, log_q.argmax(-1), (log_q.exp() - truth_NV) * weight
