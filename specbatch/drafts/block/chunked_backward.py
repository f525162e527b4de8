"""Forward and backward of a pack's blocks, chunk by chunk.

Given the keys and values of the target's states, blocks are independent of each other. So the backward pass of a chunk
runs before the next chunk is computed: memory grows with the chunk, not with the number of blocks, and nothing is
computed twice. Gradients of tensors that all chunks share are accumulated in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from specbatch.drafts.block.blocks import BlockChunk
from specbatch.drafts.block.heads import BlockGradients
from specbatch.drafts.loss import wider
from specbatch.drafts.summed_gradients import add_gradients, given_away, keep


@dataclass(frozen=True)
class ChunkFunctions:
    """The functions that compute a chunk, and how its tensors are divided between them."""

    run: Callable[[BlockChunk, Sequence[Tensor]], Tensor]
    """Computes the states ``[M, H]`` of a chunk's slots that learn, from the keys and values of each layer that it
    sees."""
    loss: Callable[[BlockChunk, Tensor, BlockGradients | None], Tensor]
    """Computes the chunk's part of the result from these states (`specbatch.drafts.block.loss.block_loss`)."""
    keys: int
    """Number of tensors of keys and values, over all layers."""
    heads: int
    """Number of parameters that only `loss` reads."""


class BlockChunkedBackward(torch.autograd.Function):
    """Computes the loss of all chunks, and its gradients."""

    @staticmethod
    def forward(
        ctx, step: ChunkFunctions, chunks: Iterable[BlockChunk], terms: int, differentiate: bool, *tensors: Tensor
    ) -> Tensor:
        """
        Args:
            terms: ``T``.
            differentiate: whether there will be a backward pass.
            tensors: keys and values, then parameters that `ChunkFunctions.loss` reads, then those that
                `ChunkFunctions.run` reads.

        Returns:
            float ``[2, T]``. Only the sum of the first row may be differentiated.
        """
        shared, layers = tensors[: step.keys], tensors[step.keys + step.heads :]
        wide = wider(tensors[-1].dtype)
        result = torch.zeros(2, terms, dtype=wide, device=tensors[-1].device)
        totals = [torch.zeros_like(x, dtype=wide) for x in tensors] if differentiate else []
        of_shared, of_heads, of_layers = (
            totals[: step.keys], totals[step.keys :][: step.heads], totals[step.keys + step.heads :]
        )  # fmt: skip
        for chunk in chunks:
            seen = [x[chunk.keys].detach().requires_grad_(differentiate) for x in shared]
            with torch.set_grad_enabled(differentiate):
                states = step.run(chunk, seen)
            if not differentiate:
                result += step.loss(chunk, states, None)
                continue
            gradients = BlockGradients(list(of_heads), torch.empty_like(states))
            result += step.loss(chunk, states.detach(), gradients)
            sums = [*(total[chunk.keys] for total in of_shared), *of_layers]
            add_gradients(states, gradients.state_MH, [*seen, *layers], sums)
            del gradients, states
        keep(ctx, list(totals), tensors)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_2T: Tensor):
        return None, None, None, None, *given_away(ctx, grad_2T)
