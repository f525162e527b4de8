"""The published EAGLE-3 training step (arXiv:2503.01840) as in public trainers: the baseline of `step`.

It follows the best maintained of them: one sample at a time, without padding; every position goes through every
unrolled step, but head and loss only get those that learn; the target's distribution is recomputed for each step;
logits are kept for the backward pass. They also learn pairs that begin inside the prompt, which are left out here as in
ours.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from specbatch.drafts.eagle3.model import Eagle3Module
from specbatch.drafts.fused import rotate
from specbatch.drafts.pack import PackTensors


def plain_step(draft: Eagle3Module, pack: PackTensors, states: list[tuple[Tensor, Tensor]], weights: Tensor) -> Tensor:
    """Forward and backward of a pack.

    Args:
        states: aux and last hidden states at every position of each sample.
        weights: float ``[K]``, weight of each unrolled step's summed cross-entropy.

    Returns:
        the weighted loss, without dimensions.
    """
    total, first = weights.new_zeros(()), 0
    for length, (aux, last) in zip(pack.lengths, states, strict=True):
        ids, mask = pack.input_ids[first : first + length], pack.loss_mask[first : first + length]
        loss = _sample_loss(draft, ids, mask, aux, last, weights)
        loss.backward()
        total += loss.detach()
        first += length
    return total


def _sample_loss(draft: Eagle3Module, ids: Tensor, mask: Tensor, aux: Tensor, last: Tensor, weights: Tensor) -> Tensor:
    """Return the loss of one sample; ``mask`` is on the host, as in a pack."""
    config, layer = draft.config, draft.layers[0]
    attention = layer.self_attn
    length = ids.shape[0]
    dtype = draft.fc.weight.dtype
    z = draft.fc(aux.to(dtype))
    position = torch.arange(length, device=ids.device)
    causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
    repeat = config.shape.heads // config.shape.kv_heads
    keys: list[Tensor] = []
    values: list[Tensor] = []
    loss, unbroken = z.new_zeros(()), mask[1:]
    for k in range(config.ttt_steps):
        token = F.pad(ids[1 + k :], (0, min(1 + k, length)))
        embedded = F.embedding(token, draft.embedding).to(dtype)
        a = torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(z)], -1)
        cos, sin = config.rope.rotation(position + k, torch.promote_types(dtype, torch.float32))
        q = rotate(attention.heads(attention.q_proj, a), cos, sin).transpose(0, 1)
        key = rotate(attention.heads(attention.k_proj, a), cos, sin)
        keys.append(key.repeat_interleave(repeat, 1).transpose(0, 1))
        values.append(attention.heads(attention.v_proj, a).repeat_interleave(repeat, 1).transpose(0, 1))
        scale = 1 / math.sqrt(config.shape.head_dim)
        score = (q @ keys[0].mT * scale).masked_fill(~causal, float("-inf"))
        own = [(q * later).sum(-1, keepdim=True) * scale for later in keys[1:]]
        weight = torch.cat([score, *own], -1).softmax(-1, dtype=torch.float32).to(dtype)
        mixed = weight[..., :length] @ values[0]
        for j, value in enumerate(values[1:]):
            mixed = mixed + weight[..., length + j, None] * value
        u = z + attention.o_proj(mixed.transpose(0, 1).flatten(1))
        z = u + layer.mlp(layer.post_attention_layernorm(u))
        unbroken = unbroken[: max(length - 2 - k, 0)] & mask[2 + k :]
        learns = unbroken.nonzero().flatten().to(z.device, non_blocking=True)
        target = last[1 + k + learns].to(draft.target_head.dtype)
        p = F.linear(target, draft.target_head).float().softmax(-1)
        log_q = draft.lm_head(draft.norm(z[learns])).float().log_softmax(-1)
        loss = loss - weights[k] * (p * log_q).sum()
    return loss
