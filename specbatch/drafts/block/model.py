"""DFlash and DSpark: a few decoder layers that fill a block of masked slots in one pass, over the target's states.

Position ``j`` of the text gives one row, the same for every layer:

    c_j = RMSNorm_hidden(W_fc [A^1_j; …; A^F_j])           A^i: outputs of F layers of the target

The block of an anchor ``a``, the newest token, has slots ``s = 0 … B - 1`` at the positions ``a + s``. The first holds
the anchor's embedding, the others that of the mask token. A layer (Qwen3's: RMSNorm over each head of queries and keys
before they are rotated):

    h = RMSNorm_in(x)
    x = x + W_o · softmax(q kᵀ / √D) v     queries of h at a + s; keys and values of c_j for every j < a of the
                                           sample, and of h of the block's own slots, later ones too
    x = x + MLP(RMSNorm_post(x))

and ``logits = W_head · RMSNorm(x)`` with the target's embedding and head. ``j < a`` because the target has not seen the
newest token yet. DFlash's slot ``s >= 1`` proposes the token at its own position ``a + s``, DSpark's slot ``s`` the
next one, so that the anchor's slot proposes as well. DSpark adds ``W_2 W_1[t]`` to the logits, where ``t`` is the token
before the proposed one (in training, that of the text), and estimates the acceptance by
``σ(w · [RMSNorm(x); W_1[t]] + b)``.

Nothing else of the sequence is computed, and blocks are independent of each other: they are trained chunk by chunk
(`chunked_backward`).

Shapes: ``R`` rows of a pack, ``n`` blocks, ``N = n · B`` slots, ``M`` slots that learn, ``H`` width, ``K`` tokens that
a block proposes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specbatch.drafts.attention import OwnKeys, PrefixMask, attend
from specbatch.drafts.block.anchors import Draw
from specbatch.drafts.block.blocks import BlockChunk, Blocks, locate
from specbatch.drafts.block.chunked_backward import BlockChunkedBackward, ChunkFunctions
from specbatch.drafts.block.heads import BlockGradients, BlockHeads, Learnt
from specbatch.drafts.block.loss import block_loss
from specbatch.drafts.block.memory import BlockShape
from specbatch.drafts.block.objective import Objective
from specbatch.drafts.first_weights import FIRST_SCALE, balance_inputs
from specbatch.drafts.fused import rotate
from specbatch.drafts.layers import MLP, RMSNorm
from specbatch.drafts.loss import wider
from specbatch.drafts.memory import Recomputation
from specbatch.drafts.module import DraftModule
from specbatch.drafts.pack import PackTensors
from specbatch.drafts.rope import Rope
from specbatch.target.logits import PLAIN, Logits


@dataclass(frozen=True)
class BlockSettings:
    """Shape and settings of a draft."""

    shape: BlockShape
    rms_norm_eps: float
    rope: Rope
    mask_token_id: int
    draw: Draw
    objective: Objective
    target_logits: Logits = PLAIN
    """Transformation of the target's logits before the softmax."""
    slots_at_once: int = 256
    """Slots whose activations are in memory at once."""
    recompute: Recomputation = "none"
    """The same as ``training.recompute``."""

    @property
    def draft_ids(self) -> Sequence[int]:
        """All token ids of the target: the draft has the target's vocabulary."""
        return range(self.shape.vocab)


class BlockAttention(nn.Module):
    """Projections of a layer's attention."""

    def __init__(self, settings: BlockSettings) -> None:
        super().__init__()
        shape = settings.shape
        self.width = shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, shape.query, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.key, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.key, bias=False)
        self.o_proj = nn.Linear(shape.query, shape.hidden, bias=False)
        self.q_norm = RMSNorm(self.width, settings.rms_norm_eps)
        self.k_norm = RMSNorm(self.width, settings.rms_norm_eps)

    def queries(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Return rotated queries ``[N, heads, head_dim]``."""
        return rotate(self.q_norm(self._heads(self.q_proj, x)), *rotation)

    def keys(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return rotated keys, and values, ``[N, kv_heads, head_dim]``."""
        return rotate(self.k_norm(self._heads(self.k_proj, x)), *rotation), self._heads(self.v_proj, x)

    def _heads(self, projection: nn.Linear, x: Tensor) -> Tensor:
        return projection(x).unflatten(-1, (-1, self.width))


class BlockLayer(nn.Module):
    """A decoder layer, with the names that engines load."""

    def __init__(self, settings: BlockSettings) -> None:
        super().__init__()
        shape, eps = settings.shape, settings.rms_norm_eps
        self.input_layernorm = RMSNorm(shape.hidden, eps)
        self.self_attn = BlockAttention(settings)
        self.post_attention_layernorm = RMSNorm(shape.hidden, eps)
        self.mlp = MLP(shape.hidden, shape.intermediate)


class MarkovHead(nn.Module):
    """The term for pairs of tokens."""

    def __init__(self, vocab: int, rank: int) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab, rank)
        self.markov_w2 = nn.Linear(rank, vocab, bias=False)


class ConfidenceHead(nn.Module):
    """The estimate of acceptance."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 1)


class BlockModule(DraftModule):
    """The draft and its loss (`specbatch.drafts.base.Module`).

    Parameters have the names of published checkpoints. The target's embedding and head are attached, not owned.
    """

    def __init__(self, settings: BlockSettings) -> None:
        super().__init__(settings.rope, settings.recompute)
        self.settings = settings
        shape, eps = settings.shape, settings.rms_norm_eps
        self.fc = nn.Linear(shape.aux_layers * shape.hidden, shape.hidden, bias=False)
        self.hidden_norm = RMSNorm(shape.hidden, eps)
        self.layers = nn.ModuleList(BlockLayer(settings) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, eps)
        if shape.markov_rank:
            self.markov_head = MarkovHead(shape.vocab, shape.markov_rank)
        if shape.confidence:
            self.confidence_head = ConfidenceHead(shape.hidden + shape.markov_rank)
        self.slots_at_once = settings.slots_at_once

    def _first_value(self, name: str, shape: torch.Size, embedding: Tensor) -> Tensor | None:
        """The last norm is the target's scale of logits times `FIRST_SCALE`; the term for pairs of tokens and the
        estimates start at zero."""
        if name == "norm.weight":
            return torch.full(shape, FIRST_SCALE * self.settings.target_logits.scale)
        zero = name in ("markov_head.markov_w2.weight", "confidence_head.proj.bias")
        return torch.zeros(shape) if zero else None

    def calibrate(self, mean_square: Mapping[str, Tensor]) -> None:
        """Implement `specbatch.drafts.base.Module.calibrate`."""
        balance_inputs(self.fc.weight, mean_square["aux"])

    def forward(self, pack: PackTensors, weights: Tensor) -> Tensor:
        """Implement `specbatch.drafts.base.Module.forward`."""
        blocks = locate(pack, self.settings.draw, self.settings.shape.proposals)
        heads = self._heads(pack)
        shared = self._context(pack, blocks)
        head_ids = {id(parameter) for parameter in heads.trained}
        # The projection of the target's states is differentiated once, after all chunks.
        inner = [p for p in self.layers.parameters() if id(p) not in head_ids]
        step = ChunkFunctions(
            run=partial(self._run, pack),
            loss=partial(self._loss, pack, heads, weights),
            keys=len(shared),
            heads=len(heads.trained),
        )
        chunks, differentiate = self._chunks(blocks), torch.is_grad_enabled()
        return BlockChunkedBackward.apply(step, chunks, len(weights), differentiate, *shared, *heads.trained, *inner)

    @torch.no_grad()
    def evaluate(self, pack: PackTensors, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Implement `specbatch.drafts.base.Module.evaluate`. If a proposal depends on the previous one, the text's
        token is used for that: it is the same while proposals are accepted, and later ones are ignored."""
        blocks = locate(pack, self.settings.draw, self.settings.shape.proposals)
        heads, shared = self._heads(pack), self._context(pack, blocks)
        result = torch.zeros(2, len(weights), dtype=wider(self.norm.weight.dtype), device=weights.device)
        tokens = (self.settings.shape.proposals, len(pack.input_ids))
        proposed = torch.full(tokens, -1, dtype=torch.int64, device=pack.input_ids.device)
        for chunk in self._chunks(blocks):
            states = self._run(pack, chunk, [x[chunk.keys] for x in shared])
            guess = torch.empty(len(states), dtype=torch.int64, device=states.device)
            result += self._loss(pack, heads, weights, chunk, states, None, guess)
            proposal, token = chunk.proposal_M, chunk.token_n[chunk.block_M]
            proposed[proposal.to(proposed.device), token.to(proposed.device)] = guess
        return result, proposed

    def _chunks(self, blocks: Blocks) -> Any:
        shape = self.settings.shape
        return blocks.cut(max(1, self.slots_at_once // shape.block_size), shape.block_size, shape.first_slot)

    def _heads(self, pack: PackTensors) -> BlockHeads:
        assert self.target_head is not None
        dtype = self.norm.weight.dtype
        on_cpu = self.target_head.device.type == "cpu"
        markov = confidence = None
        if self.settings.shape.markov_rank:
            markov = (self.markov_head.markov_w1.weight, self.markov_head.markov_w2.weight)
        if self.settings.shape.confidence:
            confidence = (self.confidence_head.proj.weight, self.confidence_head.proj.bias)
        return BlockHeads(
            norm_H=self.norm.weight,
            eps=self.norm.eps,
            # Converted once for all chunks: a CPU multiplies in float32 or wider.
            target_VH=self.target_head.to(wider(dtype) if on_cpu else dtype),
            last_PH=pack.rows["last"],
            markov=markov,
            confidence=confidence,
            target_bias_V=self.target_bias,
            target_logits=self.settings.target_logits,
        )

    def _context(self, pack: PackTensors, blocks: Blocks) -> tuple[Tensor, ...]:
        """Return keys and values ``[R, G, D]`` of all rows of the target's states, layer by layer."""
        own = self._saving("all", self._own_context, pack, blocks)
        return self._of_all_ranks(own, pack.share, blocks.of_ranks)

    def _own_context(self, pack: PackTensors, blocks: Blocks) -> tuple[Tensor, ...]:
        row = self.hidden_norm(self.fc(pack.rows["aux"].to(self.fc.weight.dtype)))
        rotation = self._rotation(blocks.layout.position_R[blocks.row_C], row)
        return tuple(x for layer in self.layers for x in layer.self_attn.keys(row, rotation))

    def _run(self, pack: PackTensors, chunk: BlockChunk, shared: Sequence[Tensor]) -> Tensor:
        """Return the states ``[M, H]`` before the final norm of a chunk's slots that learn.

        Args:
            shared: keys and values of the rows that the chunk sees.
        """
        size, device = self.settings.shape.block_size, pack.input_ids.device
        blocks = len(chunk.token_n)
        ids = pack.input_ids.new_full((blocks, size), self.settings.mask_token_id)
        ids[:, 0] = pack.input_ids[chunk.token_n.to(device, non_blocking=True)]
        x = F.embedding(ids.flatten(), self.embedding).to(self.norm.weight.dtype)
        slot_N = torch.arange(size).repeat(blocks)
        rotation = self._rotation(chunk.position_n.repeat_interleave(size) + slot_N, x)
        mask = PrefixMask(chunk.row_n.to(device, non_blocking=True), chunk.samples)
        learns = chunk.learns_M.to(device, non_blocking=True)
        for index, layer in enumerate(self.layers):
            # After the last layer's attention, only the slots that learn are needed.
            wanted = learns if index == len(self.layers) - 1 else None
            x = self._saving("all", self._layer, layer, x, rotation, mask, wanted, *shared[2 * index : 2 * index + 2])
        return x

    def _layer(
        self,
        layer: BlockLayer,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: PrefixMask,
        wanted: Tensor | None,
        shared_key: Tensor,
        shared_value: Tensor,
    ) -> Tensor:
        """Return the layer's output ``[N, H]``, or that of the wanted slots only."""
        query, key, value = self._saving("all_but_attention", self._project, layer, x, rotation)
        size = self.settings.shape.block_size
        mixed = attend_blocks(query, key, value, shared_key, shared_value, mask, size).flatten(1)
        if wanted is not None:
            x, mixed = x.index_select(0, wanted), mixed.index_select(0, wanted)
        return self._saving("all_but_attention", self._finish, layer, x, mixed)

    def _project(self, layer: BlockLayer, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of all slots."""
        h = layer.input_layernorm(x)
        return layer.self_attn.queries(h, rotation), *layer.self_attn.keys(h, rotation)

    def _finish(self, layer: BlockLayer, x: Tensor, mixed: Tensor) -> Tensor:
        """Compute the rest of the layer after attention."""
        x = x + layer.self_attn.o_proj(mixed)
        return x + layer.mlp(layer.post_attention_layernorm(x))

    def _loss(
        self,
        pack: PackTensors,
        heads: BlockHeads,
        weights: Tensor,
        chunk: BlockChunk,
        states: Tensor,
        gradients: BlockGradients | None,
        guess: Tensor | None = None,
    ) -> Tensor:
        token = chunk.token_n[chunk.block_M] + chunk.proposal_M
        token = token.to(pack.input_ids.device, non_blocking=True)
        learnt = Learnt(
            targets=chunk.targets,
            block_M=chunk.block_M.to(states.device, non_blocking=True),
            label_M=pack.input_ids[token + 1],
            before_M=pack.input_ids[token],
        )
        return block_loss(states, learnt, heads, self.settings.objective, weights, gradients, guess)


def attend_blocks(
    query_NHD: Tensor,
    key_NGD: Tensor,
    value_NGD: Tensor,
    shared_RGD: Tensor,
    shared_value_RGD: Tensor,
    mask: PrefixMask,
    size: int,
) -> Tensor:
    """Return attention of slots to a prefix, the same for all slots of a block, and to their block: ``[N, H, D]``.

    A block is treated as one query with ``size`` times as many heads, so that `attend` computes it.

    Args:
        mask: prefix mask of the blocks.
        size: slots of a block.
    """
    groups = key_NGD.shape[1]
    by_block = query_NHD.unflatten(0, (-1, size)).unflatten(2, (groups, -1))
    own = [
        OwnKeys(k, v, None)
        for k, v in zip(*(x.unflatten(0, (-1, size)).unbind(1) for x in (key_NGD, value_NGD)), strict=True)
    ]
    mixed = attend(by_block.transpose(1, 2).flatten(1, 3), shared_RGD, shared_value_RGD, own, mask)
    return mixed.unflatten(1, (groups, size, -1)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
