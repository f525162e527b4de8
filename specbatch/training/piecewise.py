"""Forward and backward of a pack's live columns, piece by piece.

After the first step's keys and values, live columns have nothing to do with each other. So what the backward pass of a
few of them needs is used up before the next are computed: memory grows with the piece, not with the pack, and nothing
is computed twice. The gradients of what all pieces share are added up in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from specbatch.training.drafts.pieces import Piece
from specbatch.training.loss import Gradients, Heads, distill, wider

Unroll = Callable[[Piece, Tensor, Tensor, Tensor], list[Tensor]]


class Piecewise(torch.autograd.Function):
    """The loss of all unrolled steps of all pieces."""

    @staticmethod
    def forward(
        ctx,
        unroll: Unroll,
        pieces: Iterable[Piece],
        heads: Heads,
        weights_K: Tensor,
        differentiate: bool,
        z_CH: Tensor,
        k_RGD: Tensor,
        v_RGD: Tensor,
        head_VH: Tensor,
        norm_H: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        """
        Args:
            unroll: from a piece, its columns' states and the keys and values that they see, to their states after
                each unrolled step.
            weights_K: weight of each unrolled step's summed cross-entropy.
            differentiate: whether there will be a backward pass.
            z_CH: states of all columns before the first step.
            k_RGD, v_RGD: the first step's.
            head_VH, norm_H: of the draft, as in ``heads``.
            parameters: the others that ``unroll`` uses.

        Returns:
            as `loss.distill`, of which only the sum of the first row may be differentiated.
        """
        result = torch.zeros(2, len(weights_K), dtype=wider(head_VH.dtype), device=head_VH.device)
        d_z, d_k, d_v = torch.zeros_like(z_CH), _zeros(k_RGD), _zeros(v_RGD)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        d_trained = [_zeros(parameter) for parameter in trained]
        d_head, d_norm = (_zeros(x) if x.requires_grad else None for x in (head_VH, norm_H))
        gradients = Gradients(d_head, d_norm)
        for piece in pieces:
            columns = piece.columns.to(z_CH.device, non_blocking=True)
            given = (z_CH[columns], k_RGD[piece.keys], v_RGD[piece.keys])
            own = [x.detach().requires_grad_(differentiate) for x in given]
            with torch.set_grad_enabled(differentiate):
                states = unroll(piece, *own)
            result += distill(states, piece.landings, heads, weights_K, gradients if differentiate else None)
            if differentiate:
                found = torch.autograd.grad(states, [*own, *trained], gradients.states, materialize_grads=True)
                gradients.states = []
                d_z[columns] = found[0]
                d_k[piece.keys] += found[1]
                d_v[piece.keys] += found[2]
                _add(d_trained, found[3:])
                # As large as the layer: not to be held beside what the next piece needs.
                del found
        of_parameters = iter(d_trained)
        ctx.found = [
            d_z, d_k, d_v, d_head, d_norm,
            *(next(of_parameters) if parameter.requires_grad else None for parameter in parameters),
        ]  # fmt: skip
        ctx.dtypes = [x.dtype for x in (z_CH, k_RGD, v_RGD, head_VH, norm_H, *parameters)]
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_2K: Tensor):
        grad = grad_2K[0, 0]
        # Not waited for: a device goes on with the next pack, and stops there if this is wrong.
        torch._assert_async((grad_2K[0] == grad).all(), "only the sum of the weighted losses may be differentiated")
        found, ctx.found = ctx.found, None
        if found is None:
            raise ValueError("the gradient can be taken only once: it is scaled where it lies")
        # Given away, not copied: what arrives first becomes the parameter's gradient.
        given: list[Tensor | None] = []
        while found:
            total = found.pop(0)
            given.append(None if total is None else total.mul_(grad).to(ctx.dtypes[len(given)]))
        del total
        return None, None, None, None, None, *given


def _add(totals: Iterable[Tensor], parts: Iterable[Tensor]) -> None:
    """To each total its part. A function, so that no name keeps the last part."""
    for total, part in zip(totals, parts, strict=True):
        total += part


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=wider(x.dtype))
