"""The EAGLE-3 draft (arXiv:2503.01840): one decoder layer that unrolls itself over its own predictions.

Step ``k`` of column ``i`` reads the embedding of token ``i + 1 + k`` and the column's state, which is the
projected hidden states of the target at first and the layer's own output afterwards:

    a   = [RMSNorm(E[x]); RMSNorm(z)]
    u   = z + Wo · Attention(a)        keys: first step's of columns j <= i, own column's of later steps
    z'  = u + MLP(RMSNorm(u))
    q   = softmax(W_head · RMSNorm(z'))

Only live columns (see `pack`) are computed; the others give the first step's key and value and nothing else.

Shapes: ``R`` columns of a pack, ``N`` live ones, ``H`` width, ``K`` unrolled steps.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from specbatch.capture import CaptureContract
from specbatch.training.attention import LiveAttention
from specbatch.training.drafts.pack import PackTensors, locate
from specbatch.training.drafts.rope import Rope
from specbatch.training.loss import CHUNK_LOGITS, DistillationLoss

FIRST_SCALE = 0.3
"""Of the head's inputs before training."""


@dataclass(frozen=True)
class Eagle3Config:
    """Shape of a draft. Names are those of a Hugging Face configuration."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    ttt_steps: int
    draft_ids: tuple[int, ...]
    """Target ids of the draft's vocabulary, ascending."""
    contract: CaptureContract
    train_head: bool = True
    embedding_rows: int = 0
    """Of an embedding that is trained; 0: the target's is read."""


class RMSNorm(nn.Module):
    """Root mean square norm with statistics in float32 or wider."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Projections of the draft's attention; inputs are an embedding and a state side by side."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.head_dim
        self.width = width
        self.q_proj = nn.Linear(2 * hidden, config.num_attention_heads * width, bias=False)
        self.k_proj = nn.Linear(2 * hidden, config.num_key_value_heads * width, bias=False)
        self.v_proj = nn.Linear(2 * hidden, config.num_key_value_heads * width, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * width, hidden, bias=False)

    def heads(self, projection: nn.Linear, x: Tensor) -> Tensor:
        """``[N, heads, head_dim]``"""
        return projection(x).unflatten(-1, (-1, self.width))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """The draft's only decoder layer, with the names that engines load."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps)
        self.hidden_norm = RMSNorm(hidden, eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp = MLP(config)


@dataclass(frozen=True)
class Unrolled:
    """Columns that learn something, of all unrolled steps."""

    state_NH: Tensor
    """What the head reads."""
    target_N: Tensor
    """int64: row of ``last`` that each learns from."""
    step_N: Tensor
    """int64: unrolled step of each."""
    token_N: Tensor
    """int64: index of each column's own token in the pack."""


class Eagle3(nn.Module):
    """The draft, its unrolled steps and their loss.

    Parameters have the names of published EAGLE-3 checkpoints. The target's head, and its embedding unless an own one
    is trained, are attached, not owned: they are no parameters, are in no snapshot, and keep the dtype in which the
    target stores them.
    """

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(config.contract.widths["aux"], config.hidden_size, bias=False)
        self.layers = nn.ModuleList([Layer(config)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, len(config.draft_ids), bias=False)
        self.lm_head.weight.requires_grad_(config.train_head)
        if config.embedding_rows:
            self.embed_tokens = nn.Embedding(config.embedding_rows, config.hidden_size)
        self.register_buffer("draft_ids", torch.empty(len(config.draft_ids), dtype=torch.int64))
        self.embedding: Tensor | None = None
        self.target_head: Tensor | None = None

    @torch.no_grad()
    def initialize(self, seed: int, embedding: Tensor, target_head: Tensor) -> None:
        """Make the first weights, the same for every number of ranks, and attach the target's tensors.

        Matrices are uniform in ``±1 / √inputs``; the head starts as the target's, behind a norm of small weight:
        at full scale a state that means nothing yet gives certain and wrong answers.

        Args:
            embedding: ``[vocabulary, hidden]`` of the target.
            target_head: ``[vocabulary, hidden]`` of the target.
        """
        ids = torch.tensor(self.config.draft_ids, device=self.draft_ids.device)
        self.draft_ids.copy_(ids)
        self.attach(embedding, target_head)
        for name, parameter in self.named_parameters():
            if name == "lm_head.weight":
                full = self.target_head.float()
            elif name == "embed_tokens.weight":
                full = embedding.float()
            elif parameter.ndim == 1:
                full = torch.full(parameter.shape, FIRST_SCALE if name == "norm.weight" else 1.0)
            else:
                key = hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]
                generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
                full = torch.empty(parameter.shape).uniform_(-1, 1, generator=generator) * parameter.shape[1] ** -0.5
            full = full.to(parameter.device, parameter.dtype)
            if isinstance(parameter, DTensor):
                full = distribute_tensor(full, parameter.device_mesh, parameter.placements)
            parameter.copy_(full)

    @torch.no_grad()
    def calibrate(self, mean_square: Tensor) -> None:
        """Scale the first projection so that all channels of the target count alike.

        Some channels of a large model are a thousand times as large as the others, and say little; a projection
        that is random over all of them would see nothing else.

        Args:
            mean_square: ``[3 * hidden]`` of ``aux``, over the packs of the first step.
        """
        weight = self.fc.weight
        if isinstance(weight, DTensor):
            if any(placement.is_shard(1) for placement in weight.placements):
                raise ValueError("the projection must be sharded by rows")
            weight = weight.to_local()
        scale = mean_square.clamp(min=torch.finfo(torch.float32).tiny).rsqrt()
        weight.mul_(scale.to(weight.device, weight.dtype))

    def attach(self, embedding: Tensor, target_head: Tensor) -> None:
        """Use these tensors of the target: of its head the rows of the draft's vocabulary, and its embedding."""
        device = self.draft_ids.device
        ids = torch.tensor(self.config.draft_ids, device=target_head.device)
        self.embedding = None if self.config.embedding_rows else embedding.to(device)
        whole = len(ids) == target_head.shape[0]
        self.target_head = (target_head if whole else target_head[ids]).to(device)

    def forward(self, pack: PackTensors, weights: Tensor) -> Tensor:
        """Unroll over a pack.

        Args:
            weights: float ``[K]``, weight of each unrolled step's summed cross-entropy.

        Returns:
            float ``[2, K]``: weighted summed cross-entropy of each step, of which only the sum may be
            differentiated, and how often the draft's most likely token is the target's.
        """
        unrolled = self._unroll(pack)
        return self._loss(pack, unrolled, weights)

    @torch.no_grad()
    def evaluate(self, pack: PackTensors, weights: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` says of a pack, and what the draft would propose there.

        A proposal after the first reads the text's tokens in the place of the proposals before it. As long as those
        were accepted they are the same, and afterwards nobody asks.

        Returns:
            as `forward`; and int64 ``[K, tokens]``: the target's id of the token that greedy drafting from each
            position proposes in each step, -1 where that is not computed.
        """
        unrolled = self._unroll(pack)
        proposed = self.draft_ids.new_full((self.config.ttt_steps, pack.input_ids.shape[0]), -1)
        size = max(1, CHUNK_LOGITS // self.lm_head.weight.shape[0])
        chunks = [(state @ self.lm_head.weight.T).argmax(-1) for state in unrolled.state_NH.split(size)]
        proposed[unrolled.step_N, unrolled.token_N] = self.draft_ids.index_select(0, torch.cat(chunks))
        return self._loss(pack, unrolled, weights), proposed

    def _loss(self, pack: PackTensors, unrolled: Unrolled, weights: Tensor) -> Tensor:
        return DistillationLoss.apply(
            unrolled.state_NH, self.lm_head.weight, pack.last, self.target_head,
            unrolled.target_N, unrolled.step_N, weights,
        )  # fmt: skip

    def _unroll(self, pack: PackTensors) -> Unrolled:
        """All that the loss reads, of all steps."""
        config, layer = self.config, self.layers[0]
        attention = layer.self_attn
        columns = locate(pack, config.contract, config.ttt_steps)
        dtype = self.fc.weight.dtype
        z = self.fc(pack.aux.to(dtype))
        a = self._inputs(pack, columns.token_R + 1, z)
        cos_sin = config.rope.rotation(columns.position_R, dtype)
        k_first = rotate(attention.heads(attention.k_proj, a), cos_sin)
        v_first = attention.heads(attention.v_proj, a)

        rows = columns.live(0)
        z, a = z[rows], a[rows]
        own_k, own_v = (
            k_first.new_empty(0, len(rows), *k_first.shape[1:]),
            v_first.new_empty(0, len(rows), *v_first.shape[1:]),
        )
        states, targets, steps, tokens = [], [], [], []
        for step in range(config.ttt_steps):
            if step:
                kept = torch.searchsorted(rows, columns.live(step))
                rows, z = rows[kept], z[kept]
                a = self._inputs(pack, columns.token_R[rows] + 1 + step, z)
            cos_sin = config.rope.rotation(columns.position_R[rows] + step, dtype)
            if step:
                key = rotate(attention.heads(attention.k_proj, a), cos_sin)
                own_k = torch.cat([own_k[:, kept], key[None]])
                own_v = torch.cat([own_v[:, kept], attention.heads(attention.v_proj, a)[None]])
            query = rotate(attention.heads(attention.q_proj, a), cos_sin)
            mixed = LiveAttention.apply(query, k_first, v_first, own_k, own_v, rows, columns.samples)
            u = z + attention.o_proj(mixed.flatten(1))
            z = u + layer.mlp(layer.post_attention_layernorm(u))
            target = columns.target_KR[step, rows]
            learns = (target >= 0).nonzero().flatten()
            states.append(self.norm(z[learns]))
            targets.append(target[learns])
            steps.append(torch.full_like(learns, step))
            tokens.append(columns.token_R[rows[learns]])
        return Unrolled(torch.cat(states), torch.cat(targets), torch.cat(steps), torch.cat(tokens))

    def _inputs(self, pack: PackTensors, token: Tensor, z: Tensor) -> Tensor:
        """``[N, 2H]``: embedding of the tokens that the columns read, and their states, both normalised."""
        layer = self.layers[0]
        table = self.embed_tokens.weight if self.embedding is None else self.embedding
        embedded = F.embedding(pack.input_ids[token], table).to(z.dtype)
        return torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(z)], -1)


def rotate(x_NHD: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864) of halves, as Llama does it."""
    cos, sin = cos_sin
    first, second = x_NHD.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
