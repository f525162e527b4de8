"""The published EAGLE-3 training step (arXiv:2503.01840), as public trainers run it: the baseline of `step`.

One sample at a time, padded to a multiple of 256; every position goes through every unrolled step; the
target's distribution is computed anew for each of them; logits are held for the backward pass.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from specbatch.training.drafts.eagle3 import Eagle3
from specbatch.training.drafts.pack import PackTensors
from specbatch.training.fused import rotate

PAD = 256


def plain_step(draft: Eagle3, pack: PackTensors, states: list[tuple[Tensor, Tensor]], weights: Tensor) -> float:
    """Forward and backward of a pack.

    Args:
        states: aux and last hidden states at every position of each sample.
        weights: float ``[K]``, weight of each unrolled step's summed cross-entropy.

    Returns:
        the weighted loss.
    """
    total, first = 0.0, 0
    for length, (aux, last) in zip(pack.lengths, states, strict=True):
        ids, mask = pack.input_ids[first : first + length], pack.loss_mask[first : first + length]
        loss = _sample_loss(draft, ids, mask, aux, last, weights)
        loss.backward()
        total += loss.item()
        first += length
    return total


def _sample_loss(draft: Eagle3, ids: Tensor, mask: Tensor, aux: Tensor, last: Tensor, weights: Tensor) -> Tensor:
    config, layer = draft.config, draft.layers[0]
    attention = layer.self_attn
    length = ids.shape[0]
    padding = -length % PAD
    padded = length + padding
    dtype = draft.fc.weight.dtype
    ids, mask = F.pad(ids, (0, padding)), F.pad(mask, (0, padding))
    z = draft.fc(F.pad(aux, (0, 0, 0, padding)).to(dtype))
    last = F.pad(last, (0, 0, 0, padding))
    position = torch.arange(padded, device=ids.device)
    causal = torch.ones(padded, padded, dtype=torch.bool, device=ids.device).tril()
    repeat = config.num_attention_heads // config.num_key_value_heads
    keys: list[Tensor] = []
    values: list[Tensor] = []
    loss = z.new_zeros(())
    for k in range(config.ttt_steps):
        token = F.pad(ids[1 + k :], (0, 1 + k))
        embedded = F.embedding(token, draft.embedding).to(dtype)
        a = torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(z)], -1)
        cos, sin = config.rope.rotation(position + k, torch.promote_types(dtype, torch.float32))
        q = rotate(attention.heads(attention.q_proj, a), cos, sin).transpose(0, 1)
        key = rotate(attention.heads(attention.k_proj, a), cos, sin)
        keys.append(key.repeat_interleave(repeat, 1).transpose(0, 1))
        values.append(attention.heads(attention.v_proj, a).repeat_interleave(repeat, 1).transpose(0, 1))
        scale = 1 / math.sqrt(config.head_dim)
        score = (q @ keys[0].mT * scale).masked_fill(~causal, float("-inf"))
        own = [(q * later).sum(-1, keepdim=True) * scale for later in keys[1:]]
        weight = torch.cat([score, *own], -1).softmax(-1, dtype=torch.float32).to(dtype)
        mixed = weight[..., :padded] @ values[0]
        for j, value in enumerate(values[1:]):
            mixed = mixed + weight[..., padded + j, None] * value
        u = z + attention.o_proj(mixed.transpose(0, 1).flatten(1))
        z = u + layer.mlp(layer.post_attention_layernorm(u))
        target = F.pad(last[1 + k :], (0, 0, 0, 1 + k)).to(draft.target_head.dtype)
        p = F.linear(target, draft.target_head).float().softmax(-1)
        log_q = draft.lm_head(draft.norm(z)).float().log_softmax(-1)
        learns = F.pad(mask[2 + k :], (0, 2 + k)) & (position + 2 + k < length)
        loss = loss - weights[k] * ((p * log_q).sum(-1) * learns).sum()
    return loss
