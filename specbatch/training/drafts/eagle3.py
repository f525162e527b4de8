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

import enum
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from specbatch.capture import CaptureContract
from specbatch.training.attention import Own, Sight, attend
from specbatch.training.drafts.pack import Columns, PackTensors, locate
from specbatch.training.drafts.pieces import Piece, StepRows, cut
from specbatch.training.drafts.rope import Rope
from specbatch.training.exchange import of_all_ranks
from specbatch.training.fused import rms_norm, rotate, swiglu
from specbatch.training.loss import Heads, distill, wider
from specbatch.training.piecewise import Piecewise

FIRST_SCALE = 0.3
"""Of the head's inputs before training."""

_OUTSIDE_THE_UNROLL = ("fc.weight", "norm.weight", "lm_head.weight")


class Recompute(enum.Enum):
    """What of the unrolled steps is computed again in the backward pass, instead of being kept for it."""

    NONE = "none"
    ALL_BUT_ATTENTION = "all_but_attention"
    ALL = "all"


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
    columns_at_once: int = 1024
    """Live columns whose activations are held at once."""
    recompute: Recompute = Recompute.NONE


class RMSNorm(nn.Module):
    """Root mean square norm with statistics in float32 or wider."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


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
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


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
        self.recompute, self.columns_at_once = config.recompute, config.columns_at_once
        self.group: ProcessGroup | None = None
        """The ranks that train a pack together, where packs are shared."""
        self.embedding: Tensor | None = None
        self.target_head: Tensor | None = None

    @torch.no_grad()
    def initialize(
        self, seed: int, embedding: Tensor, target_head: Tensor, start: Mapping[str, Tensor] | None = None
    ) -> None:
        """Make the first weights, the same for every number of ranks, and attach the target's tensors.

        Matrices are uniform in ``±1 / √inputs``; the head starts as the target's, behind a norm of small weight:
        at full scale a state that means nothing yet gives certain and wrong answers.

        Args:
            embedding: ``[vocabulary, hidden]`` of the target.
            target_head: ``[vocabulary, hidden]`` of the target.
            start: the weights to take instead, by name, of any dtype.
        """
        ids = torch.tensor(self.config.draft_ids, device=self.draft_ids.device)
        self.draft_ids.copy_(ids)
        self.attach(embedding, target_head)
        for name, parameter in self.named_parameters():
            if start is not None and name in start:
                full = start[name]
            elif name == "lm_head.weight":
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
        """Unroll over a pack, or over this rank's share of it.

        Args:
            weights: float ``[K]``, weight of each unrolled step's summed cross-entropy.

        Returns:
            float ``[2, K]``: weighted summed cross-entropy of each step, of which only the sum may be
            differentiated, and how often the draft's most likely token is the target's. Of a share, its part of both.
        """
        columns, z, k_first, v_first = self._first(pack)
        inner = [parameter for name, parameter in self.named_parameters() if name not in _OUTSIDE_THE_UNROLL]
        return Piecewise.apply(
            partial(self._unroll, pack), cut(columns, self.columns_at_once), self._heads(pack), weights,
            torch.is_grad_enabled(), z, k_first, v_first, self.lm_head.weight, self.norm.weight, *inner,
        )  # fmt: skip

    @torch.no_grad()
    def evaluate(self, pack: PackTensors, weights: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` says of a pack, and what the draft would propose there.

        A proposal after the first reads the text's tokens in the place of the proposals before it. As long as those
        were accepted they are the same, and afterwards nobody asks.

        Returns:
            as `forward`; and int64 ``[K, tokens]``: the target's id of the token that greedy drafting from each
            position proposes in each step, -1 where that is not computed.
        """
        columns, z, k_first, v_first = self._first(pack)
        result = torch.zeros(2, self.config.ttt_steps, dtype=wider(z.dtype), device=z.device)
        proposed = self.draft_ids.new_full((self.config.ttt_steps, pack.input_ids.shape[0]), -1)
        for piece in cut(columns, self.columns_at_once):
            chosen = piece.columns.to(z.device, non_blocking=True)
            states = self._unroll(pack, piece, z[chosen], k_first[piece.keys], v_first[piece.keys])
            guesses: list[Tensor] = []
            result += distill(states, piece.landings, self._heads(pack), weights, guesses=guesses)
            for step, rows in enumerate(piece.steps):
                token = rows.token_N[rows.learns_M].to(z.device, non_blocking=True)
                proposed[step, token] = self.draft_ids.index_select(0, guesses[step])
        return result, proposed

    def _heads(self, pack: PackTensors) -> Heads:
        return Heads(self.lm_head.weight, self.norm.weight, self.norm.eps, self.target_head, pack.last)

    def _first(self, pack: PackTensors) -> tuple[Columns, Tensor, Tensor, Tensor]:
        """States ``[C, H]`` before the first step, and its keys and values ``[R, G, D]`` of all ranks' columns."""
        columns = locate(pack, self.config.ttt_steps)
        z, key, value = self._saving(Recompute.ALL, self._own_first, pack, columns)
        if pack.share.ranks == 1 or not columns.samples:
            return columns, z, key, value
        if self.group is None:
            raise ValueError("a share of a pack needs the group of ranks that train it")
        both = of_all_ranks(torch.stack([key, value], 1), columns.of_ranks, self.group)
        return columns, z, both[:, 0], both[:, 1]

    def _own_first(self, pack: PackTensors, columns: Columns) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.layers[0].self_attn
        z = self.fc(pack.aux.to(self.fc.weight.dtype))
        a = self._inputs(pack, columns.token_C + 1, z)
        key = rotate(attention.heads(attention.k_proj, a), *self._rotation(columns.position_C, z))
        return z, key, attention.heads(attention.v_proj, a)

    def _unroll(self, pack: PackTensors, piece: Piece, z: Tensor, k_first: Tensor, v_first: Tensor) -> list[Tensor]:
        """States ``[N, H]``, not normalised, of a piece's live columns after each unrolled step.

        Args:
            z: of the piece's columns, before the first step.
            k_first, v_first: the first step's, of the piece's keys.
        """
        made: list[tuple[Tensor, Tensor, Tensor]] = []
        states: list[Tensor] = []
        sight: Sight | None = None
        for step, rows in enumerate(piece.steps):
            if rows.kept_N is not None:
                z = z[rows.kept_N.to(z.device, non_blocking=True)]
            if not len(rows.live_N):
                # All columns of the piece have left the unroll; FlexAttention takes no empty tensors.
                states.append(z)
                continue
            if sight is None or rows.kept_N is not None:
                sight = Sight(rows.row_N.to(z.device, non_blocking=True), piece.samples)
            z, key, value = self._saving(
                Recompute.ALL, self._step, step, pack, rows, z, k_first, v_first, tuple(made), sight
            )
            if step:
                made.append((rows.live_N, key, value))
            states.append(z)
        return states

    def _step(
        self,
        step: int,
        pack: PackTensors,
        rows: StepRows,
        z: Tensor,
        k_first: Tensor,
        v_first: Tensor,
        made: tuple[tuple[Tensor, Tensor, Tensor], ...],
        sight: Sight,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One unrolled step of the live columns: their new states ``[N, H]``, and the step's keys and values.

        Args:
            made: live columns, keys and values of each later step before this one.
        """
        query, key, value = self._saving(Recompute.ALL_BUT_ATTENTION, self._project, step, pack, rows, z)
        if step:
            made = (*made, (rows.live_N, key, value))
        own = [Own(k, v, _index(live, rows.live_N, z.device)) for live, k, v in made]
        mixed = attend(query, k_first, v_first, own, sight)
        return self._saving(Recompute.ALL_BUT_ATTENTION, self._finish, z, mixed), key, value

    def _project(self, step: int, pack: PackTensors, rows: StepRows, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a step; of the first one, keys and values are there already."""
        attention = self.layers[0].self_attn
        a = self._inputs(pack, rows.token_N + 1 + step, z)
        cos, sin = self._rotation(rows.position_N + step, z)
        query = rotate(attention.heads(attention.q_proj, a), cos, sin)
        if not step:
            return query, query[:0], query[:0]
        key = rotate(attention.heads(attention.k_proj, a), cos, sin)
        return query, key, attention.heads(attention.v_proj, a)

    def _finish(self, z: Tensor, mixed: Tensor) -> Tensor:
        """What follows attention."""
        layer = self.layers[0]
        u = z + layer.self_attn.o_proj(mixed.flatten(1))
        return u + layer.mlp(layer.post_attention_layernorm(u))

    def _inputs(self, pack: PackTensors, token: Tensor, z: Tensor) -> Tensor:
        """``[N, 2H]``: embedding of the tokens that the columns read, and their states, both normalised."""
        layer = self.layers[0]
        ids = pack.input_ids[token.to(z.device, non_blocking=True)]
        table = self.embed_tokens.weight if self.embedding is None else self.embedding
        embedded = F.embedding(ids, table).to(z.dtype)
        return torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(z)], -1)

    def _rotation(self, position: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine at these positions, on the device of ``z``, in float32 or wider."""
        return self.config.rope.rotation(position.to(z.device, non_blocking=True), wider(z.dtype))

    def _saving(self, mode: Recompute, part: Callable[..., Any], *args: Any) -> Any:
        """Run a part; where this is the mode, keep only its inputs for the backward pass, and run it again there."""
        if self.recompute is not mode or not torch.is_grad_enabled():
            return part(*args)
        return checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False)


def _index(there: Tensor, wanted: Tensor, device: torch.device) -> Tensor | None:
    """Where the wanted ones of some ascending columns stand; None if they are all of them."""
    if len(there) == len(wanted):
        return None
    return torch.searchsorted(there, wanted).to(device, non_blocking=True)
