"""The loss of a chunk of blocks and its gradients, in one pass over the target positions.

As in `specbatch.drafts.loss`, the target's distribution at a position is computed once for all slots that learn from
it; positions are processed in parts, so that nothing of size slots times vocabulary is allocated; and logits, softmax
and the gradient of the logits are float32 or wider. Both models use the target's head, which is frozen.

A slot with distribution ``q`` learns from the target's ``p`` and the token ``t`` of the text by a mixture (`Objective`)
of

- ``-log q(t)``;
- ``KL(p ‖ q)``;
- ``Σ |q - p|``, twice the probability that a token sampled from the draft is rejected (DSpark).

Shapes: ``M`` slots of the chunk that learn, ``K`` tokens that a block proposes, ``V`` vocabulary, ``H`` width, ``r``
rank of the term for pairs of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specbatch.drafts import memory
from specbatch.drafts.block.d_pace import pace
from specbatch.drafts.block.heads import BlockGradients, BlockHeads, Learnt, factor_of, inputs_of, logits_of, sure_of
from specbatch.drafts.block.memory import position_bytes, slot_bytes
from specbatch.drafts.block.objective import Objective, compare
from specbatch.drafts.fused import rms_norm
from specbatch.drafts.loss import add_product, logits_of_target, product, wider
from specbatch.target.logits import PLAIN


@dataclass(frozen=True)
class _Part:
    """The ``m`` slots that learn from some consecutive target positions, ordered by proposed token."""

    slots_m: Tensor
    """int64: their indices among the ``M``."""
    steps: tuple[tuple[int, slice, Tensor], ...]
    """(proposed token, its slots among the ``m``, the positions that they learn from)."""
    last: Tensor
    """``[positions, H]``: the target's states, in the head's dtype."""
    truth: Tensor
    """``[positions, V]``: the target's distributions."""
    log_total: Tensor
    """``[positions]``: logarithms of the softmax denominators."""
    space_mV: Tensor | None
    """Takes the slots' logits in `_by_means`."""


def block_loss(
    state_MH: Tensor,
    learnt: Learnt,
    heads: BlockHeads,
    objective: Objective,
    weights_T: Tensor,
    gradients: BlockGradients | None = None,
    guess_M: Tensor | None = None,
) -> Tensor:
    """Compute the loss of the slots that learn.

    Args:
        state_MH: the draft's states before the final norm.
        weights_T: weight of each term's sum: one for each proposed token, then, with a confidence head, one for the
            estimates of each.
        gradients: receives the gradients, which are stored or added to; if not given, none are computed.
        guess_M: if given, receives the draft's most likely tokens.

    Returns:
        float ``[2, T]``: weighted sums, and how often the most likely tokens of both models are the same; for the
        confidence head, how often the estimate is on the right side of one half.
    """
    with torch.no_grad():
        weights = weights_T.to(wider(state_MH.dtype))
        pace_M = pace(state_MH, learnt, heads) if objective.d_pace else None
        result = weights.new_zeros(2, len(weights))
        means = _means_suffice(state_MH, heads, objective)
        compute = _by_means if means else _by_slots
        for part in _parts(state_MH, learnt, heads, means=means):
            result += compute(state_MH, learnt, heads, objective, weights, part, pace_M, gradients, guess_M)
            # Freed before the distributions of the next part are computed.
            del part
        return result


def _means_suffice(state_MH: Tensor, heads: BlockHeads, objective: Objective) -> bool:
    """Return whether `_by_means` can be used. Its gradient is the difference of two means, which would be lost if the
    factors of matrix products were rounded to bfloat16; and its logits must be plain products with the head."""
    exact = factor_of(state_MH) == wider(state_MH.dtype)
    plain = heads.target_bias_V is None and heads.target_logits == PLAIN
    return exact and plain and not objective.distance and heads.markov is None and heads.confidence is None


def _by_means(
    state_MH: Tensor,
    learnt: Learnt,
    heads: BlockHeads,
    objective: Objective,
    weights: Tensor,
    part: _Part,
    pace_M: Tensor | None,
    gradients: BlockGradients | None,
    guess_M: Tensor | None,
) -> Tensor:
    """Compute the same as `_by_slots`, without any tensor of the logits' size besides the logits.

    With ``c`` the mean of the head's rows under the target's distribution, the cross-entropy of a slot with the
    normalised state ``y`` is ``log Σ exp(W y) - y · c``, and its gradient the mean under the draft's distribution less
    ``c``. The mean is computed once per position; for the token of the text it is the token's row.
    """
    slots, head = part.slots_m, heads.target_VH
    order = torch.cat([here.new_full((len(here),), k) for k, _, here in part.steps])
    here = torch.cat([here for _, _, here in part.steps])
    weight = weights[order] if pace_M is None else weights[order] * pace_M[slots]
    normal, _ = inputs_of(state_MH, learnt, heads, slots)
    wanted = normal.new_zeros(normal.shape, dtype=weights.dtype)
    entropy = weights.new_zeros(())
    if objective.distribution:
        mean = part.truth @ head
        wanted += objective.distribution * mean[here]
        entropy = objective.distribution * (part.log_total - (part.last * mean).sum(-1))[here]
    if objective.token:
        wanted += objective.token * head[learnt.label_M[slots]]
    logits = logits_of(normal, None, heads, part.space_mV)
    likely = part.truth.argmax(-1)[here]
    peak = logits.amax(-1, keepdim=True)
    if guess_M is not None:
        guess_M[slots] = logits.argmax(-1)
    right = logits.gather(1, likely[:, None]) == peak
    total = logits.sub_(peak).exp_().sum(-1, keepdim=True)
    both = objective.token + objective.distribution
    loss = both * (peak + total.log())[:, 0] - (normal * wanted).sum(-1) - entropy
    result = weights.new_zeros(2, len(weights))
    result[0].index_add_(0, order, loss * weight)
    result[1].index_add_(0, order, right[:, 0].to(weights.dtype))
    if gradients is not None:
        d_normal = ((logits @ head) * (both / total) - wanted) * weight[:, None]
        with torch.enable_grad():
            state, norm = state_MH[slots].requires_grad_(), heads.norm_H.detach().requires_grad_()
            again = rms_norm(state, norm, heads.eps)
        d_state, d_norm = torch.autograd.grad(again, (state, norm), d_normal.to(again.dtype))
        gradients.heads[0] += d_norm
        gradients.state_MH[slots] = d_state
    return result


def _by_slots(
    state_MH: Tensor,
    learnt: Learnt,
    heads: BlockHeads,
    objective: Objective,
    weights: Tensor,
    part: _Part,
    pace_M: Tensor | None,
    gradients: BlockGradients | None,
    guess_M: Tensor | None,
) -> Tensor:
    """Compute the loss of the slots that learn from some positions, with `compare`."""
    slots, proposals = part.slots_m, len(learnt.targets)
    result = weights.new_zeros(2, len(weights))
    normal, pair = inputs_of(state_MH, learnt, heads, slots)
    logits = logits_of(normal, pair, heads)
    label_m = learnt.label_M[slots]
    likely = part.truth.argmax(-1)
    entropy = -torch.special.xlogy(part.truth, part.truth).sum(-1) if objective.distribution else None
    factor = factor_of(state_MH)
    # The gradient overwrites the logits if it has the same dtype.
    d_logits = logits if factor == logits.dtype else torch.empty_like(logits, dtype=factor)
    d_sure = torch.zeros(len(slots), dtype=weights.dtype, device=weights.device)
    sure = sure_of(normal, pair, heads)
    for k, rows, here in part.steps:
        whole = len(here) == len(part.truth)
        truth = part.truth if whole else part.truth[here]
        weight_m = weights[k].expand(len(here)) if pace_M is None else weights[k] * pace_M[slots[rows]]
        loss, guess, accepted, d_logit = compare(
            logits[rows], truth, label_m[rows], weight_m, objective, sure is not None
        )
        if entropy is not None:
            loss = loss - weight_m * objective.distribution * (entropy if whole else entropy[here])
        right = guess == (likely if whole else likely[here])
        result[0, k] += loss.sum()
        result[1, k] += right.sum()
        if guess_M is not None:
            guess_M[slots[rows]] = guess
        if gradients is not None:
            d_logits[rows] = d_logit
        if sure is not None:
            weight = weights[proposals + k]
            wrong = F.binary_cross_entropy_with_logits(sure[rows], accepted, reduction="sum")
            result[0, proposals + k] += weight * wrong
            result[1, proposals + k] += ((sure[rows] > 0) == right).sum()
            d_sure[rows] = weight * (sure[rows].sigmoid() - accepted)
    if gradients is not None:
        _differentiate(state_MH, learnt, heads, slots, d_logits, d_sure, gradients)
    return result


def _differentiate(
    state_MH: Tensor,
    learnt: Learnt,
    heads: BlockHeads,
    slots: Tensor,
    d_logits: Tensor,
    d_sure: Tensor,
    found: BlockGradients,
) -> None:
    """Compute the gradients of states and weights from those of logits and estimates."""
    d_norm, *d_others = found.heads
    with torch.enable_grad():
        state, norm = state_MH[slots].requires_grad_(), heads.norm_H.detach().requires_grad_()
        normal = rms_norm(state, norm, heads.eps)
    d_normal = product(d_logits, heads.target_VH.to(d_logits.dtype))
    pair = d_pair = None
    if heads.markov is not None:
        first, second = heads.markov
        pair = first[learnt.before_M[slots]]
        d_first, d_second, *d_others = d_others
        d_pair = product(d_logits, second.to(d_logits.dtype))
        add_product(d_second, d_logits.T, pair)
    if heads.confidence is not None:
        read = normal.detach() if pair is None else torch.cat([normal.detach(), pair], -1)
        d_weight, d_bias = d_others
        wide = d_sure[:, None]
        d_weight += wide.T @ read.to(d_sure.dtype)
        d_bias += d_sure.sum()
        d_read = wide * heads.confidence[0].to(d_sure.dtype)
        d_normal = d_normal + d_read[:, : normal.shape[1]]
        if d_pair is not None:
            d_pair = d_pair + d_read[:, normal.shape[1] :]
    if d_pair is not None:
        d_first.index_add_(0, learnt.before_M[slots], d_pair.to(d_first.dtype))
    d_state, d_scale = torch.autograd.grad(normal, (state, norm), d_normal.to(normal.dtype))
    d_norm += d_scale
    found.state_MH[slots] = d_state


def _parts(state_MH: Tensor, learnt: Learnt, heads: BlockHeads, *, means: bool) -> Iterator[_Part]:
    """Yield the target positions of a chunk, some at a time.

    Args:
        means: whether `_by_means` will be used.
    """
    targets, device = learnt.targets, state_MH.device
    positions, counts = torch.cat([rows.target_M for rows in targets]).unique(return_counts=True)
    wide, narrow = wider(state_MH.dtype).itemsize, factor_of(state_MH).itemsize
    each = slot_bytes(wide=wide, factor=narrow, means=means) * len(heads.target_VH)
    spent = torch.cumsum(position_bytes(wide=wide, means=means) * len(heads.target_VH) + each * counts, 0)
    part = spent // (memory.GPU_CHUNK_BYTES if device.type != "cpu" else memory.CPU_CHUNK_BYTES)
    for chosen in positions.split(part.unique_consecutive(return_counts=True)[1].tolist()):
        bounds = torch.stack([chosen[0], chosen[-1] + 1])
        cuts = [slice(*torch.searchsorted(rows.target_M, bounds).tolist()) for rows in targets]
        steps, slots, done = [], [], 0
        for k, (rows, cut) in enumerate(zip(targets, cuts, strict=True)):
            if count := cut.stop - cut.start:
                slots.append(rows.row_M[cut])
                here = torch.searchsorted(chosen, rows.target_M[cut]).to(device, non_blocking=True)
                steps.append((k, slice(done, done + count), here))
                done += count
        last = heads.last_PH[chosen.to(device, non_blocking=True)].to(heads.target_VH.dtype)
        # All that is as wide as the vocabulary in one piece, which the allocator gives back to the system.
        space = last.new_empty(len(last) + done, len(heads.target_VH)) if means else None
        out, rest = (None, None) if space is None else (space[: len(last)], space[len(last) :])
        logits = logits_of_target(last, heads.target_VH, heads.target_bias_V, heads.target_logits, out)
        log_total = logits.logsumexp(-1, keepdim=True)
        truth = logits.sub_(log_total).exp_()
        chosen_slots = torch.cat(slots).to(device, non_blocking=True)
        found = [_Part(chosen_slots, tuple(steps), last, truth, log_total[:, 0], rest)]
        del logits, truth, space, out, rest
        yield found.pop()
