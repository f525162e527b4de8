"""The EAGLE-3 draft (arXiv:2503.01840): one decoder layer that is unrolled over its own predictions.

Step ``k`` of column ``i`` reads the embedding of token ``i + 1 + k`` and the column's state, which is the
projected hidden states of the target at first and the layer's own output afterwards:

    a   = [RMSNorm(E[x]); RMSNorm(z)]
    u   = z + Wo · Attention(a)        keys: first step's of columns j <= i, own column's of later steps
    z'  = u + MLP(RMSNorm(u))
    q   = softmax(W_head · RMSNorm(z'))

EAGLE-3.1 adds two switches. ``fc_norm``: the states of each of the target's layers are normalised separately before
they are projected. ``norm_output``: the column's state is the normalised one, which the head reads,
``z' = RMSNorm(u + MLP(RMSNorm(u)))``.

Only live columns (see `columns`) are computed; others contribute only the first step's key and value.

Losses, logits and all gradients of the step equal those of two public trainers' code, once their conventions are
translated: to 5e-7 in float32 and 2e-15 in float64.

Shapes: ``R`` columns of a pack, ``N`` live ones, ``H`` width, ``K`` unrolled steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specbatch.drafts.attention import OwnKeys, PrefixMask, attend
from specbatch.drafts.eagle3.chunked_backward import ChunkedBackward
from specbatch.drafts.eagle3.column_chunks import ColumnChunk, StepRows, column_chunks
from specbatch.drafts.eagle3.columns import Columns, locate
from specbatch.drafts.eagle3.layer import Layer, RMSNorm
from specbatch.drafts.eagle3.memory import Shape
from specbatch.drafts.first_weights import FIRST_SCALE, balance_inputs, fill
from specbatch.drafts.fused import compare, compare_by_acceptance, compare_by_both, rotate
from specbatch.drafts.loss import Heads, distill, wider
from specbatch.drafts.memory import Recomputation
from specbatch.drafts.module import DraftModule
from specbatch.drafts.pack import PackTensors
from specbatch.drafts.rope import Rope
from specbatch.target.logits import PLAIN, Logits

LOSSES = {"kl": compare, "lk_lambda": compare_by_both, "lk_alpha": compare_by_acceptance}
"""By name: losses of a position, and their gradients."""
Projections = tuple[Tensor, Tensor, Tensor]
"""Queries, states or columns; keys; values."""


@dataclass(frozen=True)
class Eagle3Settings:
    """Shape and settings of a draft."""

    shape: Shape
    rms_norm_eps: float
    rope: Rope
    ttt_steps: int
    draft_ids: tuple[int, ...]
    """Target ids of the draft's vocabulary, ascending."""
    loss: str = "kl"
    """One of `LOSSES`."""
    target_logits: Logits = PLAIN
    """Transformation of the target's logits before the softmax."""
    columns_at_once: int = 1024
    """Live columns whose activations are in memory at once."""
    recompute: Recomputation = "none"


class Eagle3Module(DraftModule):
    """The draft, its unrolled steps and their loss.

    Parameters have the names of published EAGLE-3 checkpoints. The target's head, and its embedding unless the draft
    trains its own, are attached, not owned: they are not parameters, not in snapshots, and keep the dtype in which the
    target stores them.
    """

    def __init__(self, config: Eagle3Settings) -> None:
        super().__init__(config.rope, config.recompute)
        self.config = config
        shape, hidden, eps = config.shape, config.shape.hidden, config.rms_norm_eps
        if shape.fc_norm:
            self.fc_norm = nn.ModuleList([RMSNorm(hidden, eps) for _ in range(shape.aux_layers)])
        self.fc = nn.Linear(shape.aux_layers * hidden, hidden, bias=False)
        self.layers = nn.ModuleList([Layer(shape, eps)])
        self.norm = RMSNorm(hidden, eps)
        self.lm_head = nn.Linear(hidden, len(config.draft_ids), bias=False)
        self.lm_head.weight.requires_grad_(shape.train_head)
        if shape.own_embedding:
            self.embed_tokens = nn.Embedding(shape.vocab, hidden)
        self.register_buffer("draft_ids", torch.empty(len(config.draft_ids), dtype=torch.int64))
        self.columns_at_once = config.columns_at_once

    def _first_value(self, name: str, shape: torch.Size, embedding: Tensor) -> Tensor | None:
        """The head starts as the target's, after a norm of weight `FIRST_SCALE`; if that norm also scales the unrolled
        state, the head is scaled instead."""
        norm_output = self.config.shape.norm_output
        if name == "lm_head.weight":
            scale = self.config.target_logits.scale
            return self.target_head.float() * ((FIRST_SCALE if norm_output else 1) * scale)
        if name == "embed_tokens.weight":
            return embedding.float()
        return torch.full(shape, FIRST_SCALE) if name == "norm.weight" and not norm_output else None

    @torch.no_grad()
    def calibrate(self, mean_square: Mapping[str, Tensor]) -> None:
        """Scale the first projection, or the norms before it, so that all channels of the target have equal influence.

        Args:
            mean_square: mean square of ``aux`` over the packs of the first step, ``[3 * hidden]``.
        """
        smallest = torch.finfo(torch.float32).tiny
        if self.config.shape.fc_norm:
            for norm, square in zip(self.fc_norm, mean_square["aux"].split(self.config.shape.hidden), strict=True):
                fill(norm.weight, (square.mean() / square.clamp(min=smallest)).sqrt())
            return
        balance_inputs(self.fc.weight, mean_square["aux"])

    def attach(self, embedding: Tensor, target_head: Tensor, target_bias: Tensor | None = None) -> None:
        """Use these tensors of the target: its embedding, and the rows of its head for the draft's vocabulary."""
        device = self.draft_ids.device
        ids = torch.tensor(self.config.draft_ids, device=target_head.device)
        self.draft_ids.copy_(ids)
        self.embedding = None if self.config.shape.own_embedding else embedding.to(device)
        whole = len(ids) == target_head.shape[0]
        self.target_head = (target_head if whole else target_head[ids]).to(device)
        self.target_bias = None if target_bias is None else target_bias.to(ids.device)[ids].to(device)

    def forward(self, pack: PackTensors, weights: Tensor) -> Tensor:
        """Unroll over a pack, or over this rank's share of it.

        Args:
            weights: float ``[K]``, weight of each unrolled step's summed cross-entropy.

        Returns:
            float ``[2, K]``: weighted summed cross-entropy of each step, of which only the sum may be
            differentiated, and how often the draft's most likely token is the target's. For a share, its part of both.
        """
        columns, z, k_first, v_first = self._first(pack)
        heads = self._heads(pack)
        outside = (self.lm_head.weight, heads.norm_H)
        inner = [
            parameter
            for name, parameter in self.named_parameters()
            if not name.startswith(("fc.", "fc_norm.")) and not any(parameter is other for other in outside)
        ]
        return ChunkedBackward.apply(
            partial(self._unroll, pack), column_chunks(columns, self.columns_at_once), heads, weights,
            torch.is_grad_enabled(), z, k_first, v_first, *outside, *inner,
        )  # fmt: skip

    @torch.no_grad()
    def evaluate(self, pack: PackTensors, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Compute `forward` without gradient, and the proposals of greedy drafting.

        A proposal after the first reads the text's tokens instead of earlier proposals. Both are identical while drafts
        are accepted; later positions are ignored.

        Returns:
            the result of `forward`; and int64 ``[K, tokens]``: the target's id of the token that greedy drafting from
            the newest token at each position proposes in each step, -1 if that is not computed.
        """
        columns, z, k_first, v_first = self._first(pack)
        result = torch.zeros(2, self.config.ttt_steps, dtype=wider(z.dtype), device=z.device)
        proposed = self.draft_ids.new_full((self.config.ttt_steps, pack.input_ids.shape[0]), -1)
        for chunk in column_chunks(columns, self.columns_at_once):
            chosen = chunk.columns.to(z.device, non_blocking=True)
            states = self._unroll(pack, chunk, z[chosen], k_first[chunk.keys], v_first[chunk.keys])
            guesses: list[Tensor] = []
            result += distill(states, chunk.loss_rows, self._heads(pack), weights, guesses=guesses)
            for step, rows in enumerate(chunk.steps):
                # The newest token is read by the column before it.
                token = rows.token_N[rows.learns_M].to(z.device, non_blocking=True) + 1
                proposed[step, token] = self.draft_ids.index_select(0, guesses[step])
        return result, proposed

    def _heads(self, pack: PackTensors) -> Heads:
        return Heads(
            self.lm_head.weight,
            None if self.config.shape.norm_output else self.norm.weight,
            self.norm.eps,
            self.target_head,
            pack.rows["last"],
            LOSSES[self.config.loss],
            self.target_bias,
            self.config.target_logits,
        )

    def _first(self, pack: PackTensors) -> tuple[Columns, Tensor, Tensor, Tensor]:
        """Return states ``[C, H]`` before the first step, and its keys and values ``[R, G, D]`` for all ranks'
        columns."""
        columns = locate(pack, self.config.ttt_steps)
        z, key, value = self._saving("all", self._own_first, pack, columns)
        return columns, z, *self._of_all_ranks((key, value), pack.share, columns.of_ranks)

    def _own_first(self, pack: PackTensors, columns: Columns) -> Projections:
        attention = self.layers[0].self_attn
        aux = pack.rows["aux"].to(self.fc.weight.dtype)
        if self.config.shape.fc_norm:
            layers = aux.split(self.config.shape.hidden, -1)
            aux = torch.cat([norm(layer) for norm, layer in zip(self.fc_norm, layers, strict=True)], -1)
        z = self.fc(aux)
        # With images, not everything that is read is the embedding of a token.
        embeds = pack.rows.get("embeds")
        read = self._embedded(pack, columns.token_C + 1) if embeds is None else self._normalised(embeds)
        a = torch.cat([read, self.layers[0].hidden_norm(z)], -1)
        key = rotate(attention.heads(attention.k_proj, a), *self._rotation(columns.position_C, z))
        return z, key, attention.heads(attention.v_proj, a)

    def _unroll(
        self, pack: PackTensors, chunk: ColumnChunk, z: Tensor, k_first: Tensor, v_first: Tensor
    ) -> list[Tensor]:
        """Return states ``[N, H]`` of a chunk's live columns after each unrolled step, normalised if ``norm_output`` is
        set.

        Args:
            z: states of the chunk's columns before the first step.
            k_first, v_first: keys and values of the first step that the chunk sees.
        """
        attention = self.layers[0].self_attn
        # A token is read by up to K columns, each in another step: its share of the projections is computed once.
        of_tokens = self._saving("all", self._project_tokens, pack, chunk.tokens)
        of_states = tuple(weight[:, self.config.shape.hidden :] for weight in attention.inputs())
        made: list[Projections] = []
        states: list[Tensor] = []
        prefix_mask: PrefixMask | None = None
        for step, rows in enumerate(chunk.steps):
            if rows.kept_N is not None:
                # The gradient of `index_select` is several times faster than that of an index.
                z = z.index_select(0, rows.kept_N.to(z.device, non_blocking=True))
            if not len(rows.live_N):
                # No column of the chunk is live any more, and FlexAttention rejects empty tensors.
                states.append(z)
                continue
            if prefix_mask is None or rows.kept_N is not None:
                prefix_mask = PrefixMask(rows.row_N.to(z.device, non_blocking=True), chunk.samples)
            z, key, value = self._saving(
                "all", self._step, step, rows, of_tokens, of_states, z, k_first, v_first, tuple(made), prefix_mask
            )
            if step:
                made.append((rows.live_N, key, value))
            states.append(z)
        return states

    def _step(
        self,
        step: int,
        rows: StepRows,
        of_tokens: Projections,
        of_states: Projections,
        z: Tensor,
        k_first: Tensor,
        v_first: Tensor,
        made: tuple[Projections, ...],
        prefix_mask: PrefixMask,
    ) -> Projections:
        """Compute one unrolled step of the live columns: their new states ``[N, H]``, and the step's keys and values.

        Args:
            of_tokens: the result of `_project_tokens` for the chunk's tokens.
            of_states: the weights that project states to queries, keys and values.
            made: live columns, keys and values of the steps between the first and this one.
        """
        query, key, value = self._saving("all_but_attention", self._project, step, rows, of_tokens, of_states, z)
        if step:
            made = (*made, (rows.live_N, key, value))
        own = [OwnKeys(k, v, _index(live, rows.live_N, z.device)) for live, k, v in made]
        mixed = attend(query, k_first, v_first, own, prefix_mask)
        return self._saving("all_but_attention", self._finish, z, mixed), key, value

    def _project(
        self, step: int, rows: StepRows, of_tokens: Projections, of_states: Projections, z: Tensor
    ) -> Projections:
        """Return queries, keys and values of a step; keys and values of the first step exist already."""
        state = self.layers[0].hidden_norm(z)
        read = rows.read_N.to(z.device, non_blocking=True)
        query, *others = (
            torch.addmm(token.index_select(0, read), state, weight.T).unflatten(-1, (-1, self.config.shape.head_dim))
            for token, weight in zip(of_tokens[: 3 if step else 1], of_states, strict=False)
        )
        cos, sin = self._rotation(rows.position_N + step, z)
        query = rotate(query, cos, sin)
        if not step:
            return query, query[:0], query[:0]
        key, value = others
        return query, rotate(key, cos, sin), value

    def _project_tokens(self, pack: PackTensors, token: Tensor) -> Projections:
        """Return the share of tokens' embeddings in queries, keys and values, before rotation.

        Args:
            token: indices into the pack's ``input_ids``, on the host.
        """
        embedded = self._embedded(pack, token)
        width = self.config.shape.hidden
        query, key, value = (F.linear(embedded, weight[:, :width]) for weight in self.layers[0].self_attn.inputs())
        return query, key, value

    def _finish(self, z: Tensor, mixed: Tensor) -> Tensor:
        """Compute the rest of the layer after attention."""
        layer = self.layers[0]
        u = z + layer.self_attn.o_proj(mixed.flatten(1))
        new = u + layer.mlp(layer.post_attention_layernorm(u))
        return self.norm(new) if self.config.shape.norm_output else new

    def _embedded(self, pack: PackTensors, token: Tensor) -> Tensor:
        """Return the normalised embeddings of tokens, ``[N, H]``, in the compute dtype."""
        ids = pack.input_ids[token.to(pack.input_ids.device, non_blocking=True)]
        table = self.embed_tokens.weight if self.embedding is None else self.embedding
        return self._normalised(F.embedding(ids, table))

    def _normalised(self, embeds: Tensor) -> Tensor:
        return self.layers[0].input_layernorm(embeds.to(self.fc.weight.dtype))


def _index(there: Tensor, wanted: Tensor, device: torch.device) -> Tensor | None:
    """Return the positions of the wanted columns among ascending ones; None if they are all of them."""
    if len(there) == len(wanted):
        return None
    return torch.searchsorted(there, wanted).to(device, non_blocking=True)
