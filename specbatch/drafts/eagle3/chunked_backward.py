"""Forward and backward of a pack's live columns, chunk by chunk.

Given the first step's keys and values, live columns are independent of each other. So the backward pass of a chunk runs
before the next chunk is computed: memory grows with the chunk, not with the pack, and nothing is computed twice.
Gradients of tensors that all chunks share are accumulated in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from specbatch.drafts.eagle3.column_chunks import ColumnChunk
from specbatch.drafts.loss import Gradients, Heads, distill, wider
from specbatch.drafts.summed_gradients import add_to, given_away, keep

Unroll = Callable[[ColumnChunk, Tensor, Tensor, Tensor], list[Tensor]]


class ChunkedBackward(torch.autograd.Function):
    """Computes the loss of all unrolled steps of all chunks, and its gradients."""

    @staticmethod
    def forward(
        ctx,
        unroll: Unroll,
        chunks: Iterable[ColumnChunk],
        heads: Heads,
        weights_K: Tensor,
        differentiate: bool,
        z_CH: Tensor,
        k_RGD: Tensor,
        v_RGD: Tensor,
        head_VH: Tensor,
        norm_H: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        """
        Args:
            unroll: computes the states of a chunk's columns after each unrolled step, from the chunk, their first
                states and the keys and values that they see.
            weights_K: weight of each unrolled step's summed cross-entropy.
            differentiate: whether there will be a backward pass.
            z_CH: states of all columns before the first step.
            k_RGD, v_RGD: keys and values of the first step.
            head_VH, norm_H: the draft's, as in ``heads``.
            parameters: the other parameters that ``unroll`` uses.

        Returns:
            the result of `loss.distill`. Only the sum of its first row may be differentiated.
        """
        result = torch.zeros(2, len(weights_K), dtype=wider(head_VH.dtype), device=head_VH.device)
        d_z, d_k, d_v = torch.zeros_like(z_CH), _zeros(k_RGD), _zeros(v_RGD)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        d_trained = [_zeros(parameter) for parameter in trained]
        d_head, d_norm = (_zeros(x) if x is not None and x.requires_grad else None for x in (head_VH, norm_H))
        gradients = Gradients(d_head, d_norm)
        for chunk in chunks:
            columns = chunk.columns.to(z_CH.device, non_blocking=True)
            given = (z_CH[columns], k_RGD[chunk.keys], v_RGD[chunk.keys])
            own = [x.detach().requires_grad_(differentiate) for x in given]
            with torch.set_grad_enabled(differentiate):
                states = unroll(chunk, *own)
            result += distill(states, chunk.loss_rows, heads, weights_K, gradients if differentiate else None)
            if differentiate:
                found = torch.autograd.grad(states, [*own, *trained], gradients.states, materialize_grads=True)
                gradients.states = []
                d_z[columns] = found[0]
                d_k[chunk.keys] += found[1]
                d_v[chunk.keys] += found[2]
                add_to(d_trained, found[3:])
                # As large as the layer, so freed before the next chunk needs its memory.
                del found
        of_parameters = iter(d_trained)
        totals = [
            d_z, d_k, d_v, d_head, d_norm,
            *(next(of_parameters) if parameter.requires_grad else None for parameter in parameters),
        ]  # fmt: skip
        keep(ctx, totals, (z_CH, k_RGD, v_RGD, head_VH, norm_H, *parameters))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_2K: Tensor):
        return None, None, None, None, None, *given_away(ctx, grad_2K)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=wider(x.dtype))
