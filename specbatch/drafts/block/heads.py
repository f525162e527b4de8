"""Computes logits from a block's states, and holds what its slots learn from.

Shapes: as in `specbatch.drafts.block.loss`; ``m`` of the ``M`` slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specbatch.drafts.fused import rms_norm
from specbatch.drafts.loss import LossRows, add_product, product, wider
from specbatch.target.logits import PLAIN, Logits


@dataclass(frozen=True)
class BlockHeads:
    """Weights that compute logits from states, for both models."""

    norm_H: Tensor
    """Weight of the draft's norm before the head."""
    eps: float
    target_VH: Tensor
    """The head, float32 or wider on a CPU."""
    last_PH: Tensor
    """The target's states after its final norm."""
    markov: tuple[Tensor, Tensor] | None
    """``[V, r]`` twice: the second times the first's row of the previous token is added to a slot's logits."""
    confidence: tuple[Tensor, Tensor] | None
    """Weight ``[1, H + r]`` and bias ``[1]``: estimate from a slot's normalised state, and that row, whether its
    proposal is accepted."""
    target_bias_V: Tensor | None = None
    """Bias of the target's head; engines do not add it to the draft's logits."""
    target_logits: Logits = PLAIN
    """Transformation of the target's logits before the softmax; engines do not apply it to the draft's."""

    @property
    def trained(self) -> list[Tensor]:
        """The trained tensors, in the order of `BlockGradients.heads`."""
        return [self.norm_H, *(self.markov or ()), *(self.confidence or ())]


@dataclass
class BlockGradients:
    """Gradients of the sum of the weighted losses."""

    heads: list[Tensor]
    """Gradients of `BlockHeads.trained`, accumulated in float32 or wider."""
    state_MH: Tensor
    """Gradient of the states, in their dtype."""


@dataclass(frozen=True)
class Learnt:
    """What the slots of a chunk learn from."""

    targets: tuple[LossRows, ...]
    """For each proposed token, the slots of the ``M`` that learn it, and the rows of the target's states to learn it
    from."""
    block_M: Tensor
    """int64: the block of each slot; slots of a block are adjacent, in the order of proposed tokens."""
    label_M: Tensor
    """int64: the token of the text."""
    before_M: Tensor
    """int64: the token before it."""


def inputs_of(state_MH: Tensor, learnt: Learnt, heads: BlockHeads, slots: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return normalised states ``[m, H]``, and the pair term's rows of the previous tokens ``[m, r]``."""
    pair = None if heads.markov is None else heads.markov[0][learnt.before_M[slots]]
    return rms_norm(state_MH[slots], heads.norm_H, heads.eps), pair


def logits_of(normal_mH: Tensor, pair_mr: Tensor | None, heads: BlockHeads, out_mV: Tensor | None = None) -> Tensor:
    """Return logits ``[m, V]``, float32 or wider.

    Args:
        out_mV: takes them, on a CPU.
    """
    logits = product(normal_mH, heads.target_VH.T, out_mV)
    if pair_mr is not None and heads.markov is not None:
        add_product(logits, pair_mr, heads.markov[1].T)
    return logits


def sure_of(normal_mH: Tensor, pair_mr: Tensor | None, heads: BlockHeads) -> Tensor | None:
    """Return the log-odds ``[m]`` that the proposals are accepted; None without a confidence head."""
    if heads.confidence is None:
        return None
    read = normal_mH if pair_mr is None else torch.cat([normal_mH, pair_mr], -1)
    weight, bias = heads.confidence
    return product(read, weight.T)[:, 0] + bias


def factor_of(state: Tensor) -> torch.dtype:
    """Return the dtype of the gradient of logits: on a GPU the factors' of matrix products, to which it is rounded
    once."""
    return state.dtype if state.device.type != "cpu" else wider(state.dtype)
