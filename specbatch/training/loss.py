"""The loss of all unrolled steps, forward and backward in one pass over the target positions.

The target's distribution at a position is computed once and serves every unrolled step that lands there.
Positions are taken in chunks, so that nothing of size tokens times vocabulary is ever held, and gradients
of logits are used up where they are made. Softmax and loss are in float32 or wider: in bfloat16 the gradient,
a difference of two probabilities, is mostly rounding once the draft is good.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 1 << 21
"""Most logits of one chunk of target positions: 8 MiB of float32, and as much for each unrolled step."""


class DistillationLoss(torch.autograd.Function):
    """Weighted cross-entropy between the target's and the draft's next-token distributions."""

    @staticmethod
    def forward(
        ctx,
        state_NH: Tensor,
        head_VH: Tensor,
        last_PH: Tensor,
        target_head_VH: Tensor,
        target_N: Tensor,
        step_N: Tensor,
        weights_K: Tensor,
    ) -> Tensor:
        """
        Args:
            state_NH: the draft's normalised states, rows of all unrolled steps.
            head_VH: the draft's head.
            last_PH: the target's states after its final norm.
            target_head_VH: the target's head, rows of the draft's vocabulary.
            target_N: int64, which of the ``P`` positions each row learns from.
            step_N: int64, unrolled step of each row.
            weights_K: weight of each unrolled step's summed cross-entropy.

        Returns:
            float ``[2, K]``: weighted summed cross-entropy of each step, and how often the most likely tokens
            of both distributions are the same. Only the sum of the first row may be differentiated.
        """
        wide = torch.promote_types(state_NH.dtype, torch.float32)
        order = torch.argsort(target_N, stable=True)
        sorted_target = target_N[order]
        result = torch.zeros(2, len(weights_K), dtype=wide, device=state_NH.device)
        weight_N = weights_K.to(wide)[step_N]
        d_state = torch.zeros_like(state_NH)
        d_head = torch.zeros(head_VH.shape, dtype=wide, device=head_VH.device)
        size = max(1, CHUNK_LOGITS // head_VH.shape[0])
        starts = torch.arange(0, last_PH.shape[0] + size, size, device=order.device)
        edges = torch.searchsorted(sorted_target, starts).tolist()
        for chunk, (first, end) in enumerate(pairwise(edges)):
            if first == end:
                continue
            row = order[first:end]
            states = last_PH[chunk * size : (chunk + 1) * size].to(target_head_VH.dtype)
            p_all = (states @ target_head_VH.T).to(wide).softmax(-1)
            p = p_all[target_N[row] - chunk * size]
            state = state_NH[row]
            log_q = (state @ head_VH.T).to(wide).log_softmax(-1)
            cross_entropy = -(p * log_q).sum(-1)
            correct = p_all.argmax(-1)[target_N[row] - chunk * size] == log_q.argmax(-1)
            result[0].index_add_(0, step_N[row], cross_entropy * weight_N[row])
            result[1].index_add_(0, step_N[row], correct.to(wide))
            d_logits = log_q.exp_().sub_(p).mul_(weight_N[row, None]).to(state.dtype)
            d_state[row] = d_logits @ head_VH
            d_head.add_(d_logits.T @ state)
        ctx.save_for_backward(d_state, d_head.to(head_VH.dtype))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_2K: Tensor):
        grad = grad_2K[0, 0]
        if not torch.equal(grad_2K[0], grad.expand_as(grad_2K[0])):
            raise ValueError("only the sum of the weighted losses may be differentiated")
        d_state, d_head = ctx.saved_tensors
        return d_state * grad.to(d_state.dtype), d_head * grad.to(d_head.dtype), None, None, None, None, None
