"""Block drafts written to be obviously right: one anchor at a time, full logits, no reuse, autograd throughout."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rope(x: Tensor, position: int, theta: float) -> Tensor:
    """One vector of one head."""
    half = x.shape[-1] // 2
    angle = position * theta ** (-torch.arange(half, dtype=x.dtype) * 2 / x.shape[-1])
    a, b = x[:half], x[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


@dataclass
class Oracle:
    """A draft, its target's tensors, and what is wrong about it on purpose."""

    w: dict[str, Tensor]
    embedding: Tensor
    head: Tensor
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    theta: float
    block: int
    mask_token: int
    first_slot: int
    """1: a slot proposes the token at its own position; 0: the one behind it."""
    bias: Tensor | None = None
    """Bias of the target's head; the draft has none of it."""
    scale: float = 1.0
    """Apply the target's transformation of logits."""
    cap: float | None = None
    sees_own_row: bool = False
    shifted_slots: int = 0
    crosses: bool = False
    """Labels are looked for beyond a document's end."""

    def truth(self, last: Tensor) -> Tensor:
        """Return the distribution that the target samples from."""
        logits = self.head @ last if self.bias is None else self.head @ last + self.bias
        logits = logits * self.scale
        return (logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)).softmax(0)

    def states(self, ids: list[int], aux: Tensor, anchor: int) -> list[Tensor]:
        """States of all slots of the block, behind the last norm.

        Args:
            aux: of every position of the sample.
        """
        w, eps = self.w, self.eps
        seen = range(anchor + 1 if self.sees_own_row else anchor)
        rows = [rms(w["fc.weight"] @ aux[j], w["hidden_norm.weight"], eps) for j in seen]
        slots = [self.embedding[ids[anchor] if s == 0 else self.mask_token] for s in range(self.block)]
        for layer in range(self.layers):
            p = f"layers.{layer}."
            inner = [rms(x, w[p + "input_layernorm.weight"], eps) for x in slots]
            own = [anchor + s + self.shifted_slots for s in range(self.block)]
            keys, values = [], []
            for j, x in [*zip(seen, rows, strict=True), *zip(own, inner, strict=True)]:
                k = (w[p + "self_attn.k_proj.weight"] @ x).view(self.kv_heads, -1)
                k = [rms(k[g], w[p + "self_attn.k_norm.weight"], eps) for g in range(self.kv_heads)]
                keys.append([rope(k[g], j, self.theta) for g in range(self.kv_heads)])
                values.append((w[p + "self_attn.v_proj.weight"] @ x).view(self.kv_heads, -1))
            new = []
            for x, h, position in zip(slots, inner, own, strict=True):
                q = (w[p + "self_attn.q_proj.weight"] @ h).view(self.heads, -1)
                mixed = []
                for i in range(self.heads):
                    g = i // (self.heads // self.kv_heads)
                    query = rope(rms(q[i], w[p + "self_attn.q_norm.weight"], eps), position, self.theta)
                    score = torch.stack([query @ key[g] for key in keys]) / math.sqrt(self.head_dim)
                    weight = score.softmax(0)
                    mixed.append(sum(weight[n] * values[n][g] for n in range(len(values))))
                u = x + w[p + "self_attn.o_proj.weight"] @ torch.cat(mixed)
                n = rms(u, w[p + "post_attention_layernorm.weight"], eps)
                gate = torch.nn.functional.silu(w[p + "mlp.gate_proj.weight"] @ n)
                new.append(u + w[p + "mlp.down_proj.weight"] @ (gate * (w[p + "mlp.up_proj.weight"] @ n)))
            slots = new
        return [rms(x, w["norm.weight"], eps) for x in slots]


@dataclass
class Found:
    """For each proposed token: summed losses, most likely tokens that are right, anchors that enter."""

    losses: list[Tensor]
    correct: list[int]
    counts: list[int]
    sure: list[Tensor] = field(default_factory=list)
    """Losses of the estimates of acceptance."""
    sure_right: list[int] = field(default_factory=list)


def block_losses(
    oracle: Oracle,
    ids: list[int],
    mask: list[bool],
    aux: Tensor,
    last: Tensor,
    anchors: list[int],
    *,
    token: float = 0.0,
    distribution: float = 0.0,
    distance: float = 0.0,
    d_pace: bool = False,
    confidence: bool = False,
    length: int | None = None,
) -> Found:
    """All blocks of a sample.

    Args:
        aux, last: the target's states at every position.
        length: tokens of the sample; where fewer than ``ids``, the others are of the next one.
    """
    proposals = oracle.block - oracle.first_slot
    zero = aux.new_zeros(())
    found = Found([zero] * proposals, [0] * proposals, [0] * proposals, [zero] * proposals, [0] * proposals)
    end = len(ids) if oracle.crosses or length is None else length
    for anchor in anchors:
        states = oracle.states(ids, aux, anchor)
        terms, reached, far = [], [], torch.ones((), dtype=aux.dtype)
        for k in range(proposals):
            label = anchor + 1 + k
            if label >= end or not mask[label]:
                break
            y = states[k + oracle.first_slot]
            logits = oracle.head @ y
            if "markov_head.markov_w1.weight" in oracle.w:
                pair = oracle.w["markov_head.markov_w1.weight"][ids[label - 1]]
                logits = logits + oracle.w["markov_head.markov_w2.weight"] @ pair
                y = torch.cat([y, pair])
            log_q = logits.log_softmax(0)
            p = oracle.truth(last[label - 1])
            q = log_q.exp()
            loss = -token * log_q[ids[label]] + distribution * (p * (p.log() - log_q)).sum()
            terms.append(loss + distance * (q - p).abs().sum())
            far = far * (0.5 * q[ids[label]].detach() + 0.5)
            reached.append(far)
            right = bool(log_q.argmax() == p.argmax())
            found.correct[k] += right
            found.counts[k] += 1
            if confidence:
                w, b = oracle.w["confidence_head.proj.weight"], oracle.w["confidence_head.proj.bias"]
                sure = torch.sigmoid((w[0] * y).sum() + b[0])
                accepted = torch.minimum(p, q).sum().detach()
                wrong = -(accepted * sure.log() + (1 - accepted) * (1 - sure).log())
                found.sure[k] = found.sure[k] + wrong
                found.sure_right[k] += int(bool(sure > 0.5) == right)
        for k, loss in enumerate(terms):
            found.losses[k] = found.losses[k] + (sum(reached[k:]) if d_pace else 1.0) * loss
    return found
