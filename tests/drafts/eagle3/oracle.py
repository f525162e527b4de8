"""EAGLE-3's training-time test, written to be obviously right: one sample, every column, full logits, no reuse."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rope(x: Tensor, position: int, theta: float) -> Tensor:
    """One vector of one head."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for d in range(half):
        angle = torch.tensor(position * theta ** (-2 * d / x.shape[-1]), dtype=x.dtype)
        out[d] = x[d] * angle.cos() - x[half + d] * angle.sin()
        out[half + d] = x[half + d] * angle.cos() + x[d] * angle.sin()
    return out


def of_position(objective: str, truth: Tensor, guess: Tensor) -> Tensor:
    """The loss of a position; ``guess`` is a logarithm."""
    cross_entropy = -(truth * guess).sum()
    if objective == "kl":
        return cross_entropy
    accepted = torch.minimum(truth, guess.exp()).sum()
    if objective == "lk_alpha":
        return -accepted.log()
    share = torch.exp(-3 * accepted.detach())
    return share * cross_entropy + (1 - share) * (1 - accepted)


def unroll_sample(
    w: dict[str, Tensor],
    *,
    embedding: Tensor,
    target_head: Tensor,
    aux: Tensor,
    last: Tensor,
    ids: list[int],
    mask: list[bool],
    heads: int,
    kv_heads: int,
    head_dim: int,
    eps: float,
    theta: float,
    steps: int,
    fc_norm: bool = False,
    norm_output: bool = False,
    objective: str = "kl",
) -> tuple[list[Tensor], list[int], list[int]]:
    """Summed cross-entropy, right argmaxes and number of columns in the loss, for each unrolled step.

    Args:
        w: the draft's parameters by name.
        target_head: rows of the draft's vocabulary.
        aux, last: the target's states at every position of the sample.
    """
    tokens = len(ids)
    p = "layers.0."
    keys: list[list[list[Tensor]]] = []  # step, column, head
    values: list[list[list[Tensor]]] = []
    z = []
    for i in range(tokens):
        read = aux[i]
        if fc_norm:
            layers = aux[i].chunk(3)
            read = torch.cat([rms(layers[n], w[f"fc_norm.{n}.weight"], eps) for n in range(3)])
        z.append(w["fc.weight"] @ read)
    losses, correct, counts = [], [], []
    for k in range(steps):
        a = []
        for i in range(tokens):
            read = ids[i + 1 + k] if i + 1 + k < tokens else 0
            a.append(
                torch.cat(
                    [
                        rms(embedding[read], w[p + "input_layernorm.weight"], eps),
                        rms(z[i], w[p + "hidden_norm.weight"], eps),
                    ]
                )
            )
        keys.append([])
        values.append([])
        for i in range(tokens):
            key = (w[p + "self_attn.k_proj.weight"] @ a[i]).view(kv_heads, head_dim)
            keys[k].append([rope(key[g], i + k, theta) for g in range(kv_heads)])
            values[k].append(list((w[p + "self_attn.v_proj.weight"] @ a[i]).view(kv_heads, head_dim)))
        new = []
        for i in range(tokens):
            query = (w[p + "self_attn.q_proj.weight"] @ a[i]).view(heads, head_dim)
            mixed = []
            for h in range(heads):
                g = h // (heads // kv_heads)
                q = rope(query[h], i + k, theta)
                seen = [(keys[0][j][g], values[0][j][g]) for j in range(i + 1)]
                seen += [(keys[s][i][g], values[s][i][g]) for s in range(1, k + 1)]
                score = torch.stack([q @ key / math.sqrt(head_dim) for key, _ in seen]).softmax(0)
                mixed.append(sum(score[n] * seen[n][1] for n in range(len(seen))))
            u = z[i] + w[p + "self_attn.o_proj.weight"] @ torch.cat(mixed)
            n = rms(u, w[p + "post_attention_layernorm.weight"], eps)
            gate = torch.nn.functional.silu(w[p + "mlp.gate_proj.weight"] @ n)
            new.append(u + w[p + "mlp.down_proj.weight"] @ (gate * (w[p + "mlp.up_proj.weight"] @ n)))
        z = [rms(x, w["norm.weight"], eps) for x in new] if norm_output else new
        loss, right, count = torch.zeros((), dtype=aux.dtype), 0, 0
        for i in range(tokens):
            position = i + 1 + k  # whose target distribution is that of the token after it
            if position + 1 >= tokens or not all(mask[i + 1 : position + 2]):
                continue
            truth = (target_head @ last[position]).softmax(0)
            state = z[i] if norm_output else rms(z[i], w["norm.weight"], eps)
            guess = (w["lm_head.weight"] @ state).log_softmax(0)
            loss = loss + of_position(objective, truth, guess)
            right += int(truth.argmax() == guess.argmax())
            count += 1
        losses.append(loss)
        correct.append(right)
        counts.append(count)
    return losses, correct, counts
