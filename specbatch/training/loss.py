"""The loss of unrolled steps and its gradients, in one pass over the target positions.

The target's distribution at a position is computed once and serves every unrolled step that lands there.
Positions are taken in chunks, so that nothing of size tokens times vocabulary is ever held, and gradients
of logits are used up where they are made. The draft's last norm belongs to the pass: its output, which is as large as
all unrolled states, is never held either.

Logits, softmax, loss and the gradient of the logits are in float32 or wider, whatever the weights are. The gradient is
a difference of two probabilities: once the draft is good, what logits lose when they are rounded to bfloat16 is larger
than the difference. Rounding the finished difference, as is done for the matrix products of a GPU, costs no more than
rounding any other gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specbatch.training.fused import compare, rms_norm
from specbatch.training.memory import chunk_positions, position_bytes


@dataclass(frozen=True)
class Landing:
    """Which rows of an unrolled step learn, and from which target positions. Both are int64, strictly ascending,
    on the host."""

    row_M: Tensor
    """Rows of the step's states."""
    target_M: Tensor
    """Rows of the target's states."""


@dataclass(frozen=True)
class Heads:
    """From states to logits, of both models. ``V`` is the draft's vocabulary."""

    draft_VH: Tensor
    norm_H: Tensor
    """Weight of the draft's norm before its head."""
    eps: float
    target_VH: Tensor
    last_PH: Tensor
    """The target's states after its final norm."""


@dataclass
class Gradients:
    """Of the sum of the weighted losses; what is added up is float32 or wider. None: nobody wants it."""

    head_VH: Tensor | None
    norm_H: Tensor | None
    states: list[Tensor] = field(default_factory=list)
    """Of the states after each unrolled step, in their dtype; made anew each time."""


def distill(
    states_NH: Sequence[Tensor],
    landings: Sequence[Landing],
    heads: Heads,
    weights_K: Tensor,
    gradients: Gradients | None = None,
    *,
    guesses: list[Tensor] | None = None,
) -> Tensor:
    """Cross-entropy between the target's and the draft's next-token distributions.

    Args:
        states_NH: the draft's states after each unrolled step, not normalised.
        landings: for each unrolled step.
        weights_K: weight of each unrolled step's summed cross-entropy.
        gradients: what the gradients are put into, and added to; none are computed where it is not given.
        guesses: where given, the draft's most likely token of each row that learns is put there, for each step.

    Returns:
        float ``[2, K]``: weighted summed cross-entropy of each step, and how often the most likely tokens
        of both distributions are the same.
    """
    with torch.no_grad():
        return _distill(states_NH, landings, heads, weights_K, gradients, guesses)


def _distill(
    states_NH: Sequence[Tensor],
    landings: Sequence[Landing],
    heads: Heads,
    weights_K: Tensor,
    gradients: Gradients | None,
    guesses: list[Tensor] | None,
) -> Tensor:
    head, device = heads.draft_VH, heads.draft_VH.device
    wide = wider(head.dtype)
    weights = weights_K.to(wide)
    result = weights.new_zeros(2, len(landings))
    if guesses is not None:
        guesses[:] = [torch.empty(len(landing.row_M), dtype=torch.int64, device=device) for landing in landings]
    if gradients is not None:
        gradients.states = [torch.zeros_like(state) for state in states_NH]
    gpu = device.type != "cpu"
    factor = head.dtype if gpu else wide
    vocab, hidden = head.shape
    each = position_bytes(
        vocab, hidden, len(landings), wide=wide.itemsize, value=head.dtype.itemsize, factor=factor.itemsize
    )
    size = chunk_positions(each, gpu=gpu)
    ends = [landing.target_M[[0, -1]].tolist() for landing in landings if len(landing.target_M)]
    begin, end = min((e[0] for e in ends), default=0), max((e[1] for e in ends), default=-1) + 1
    for first in range(begin, end, size):
        last = heads.last_PH[first : min(first + size, end)]
        truth = product(last.to(heads.target_VH.dtype), heads.target_VH.T).softmax(-1)
        likely = truth.argmax(-1)
        bounds = torch.tensor([first, first + size])
        parts = [slice(*torch.searchsorted(landing.target_M, bounds).tolist()) for landing in landings]
        rows: list[tuple[int, Tensor]] = []
        states: list[Tensor] = []
        learning = sum(part.stop - part.start for part in parts) if gradients is not None else 0
        # Of all unrolled steps, for one product with the head each way.
        d_logits_MV = head.new_empty(learning, len(head), dtype=factor)
        done = 0
        for step, (landing, part) in enumerate(zip(landings, parts, strict=True)):
            count = part.stop - part.start
            if not count:
                continue
            row = landing.row_M[part].to(device, non_blocking=True)
            here = (landing.target_M[part] - first).to(device, non_blocking=True)
            state = states_NH[step][row]
            logits = product(rms_norm(state, heads.norm_H, heads.eps), head.T)
            all_here = count == len(truth)
            loss, guess, d_logit = compare(logits, truth if all_here else truth[here], weights[step])
            del logits
            result[0, step] += loss.sum()
            result[1, step] += (guess == (likely if all_here else likely[here])).sum()
            if guesses is not None:
                guesses[step][part] = guess
            if gradients is not None:
                rows.append((step, row))
                states.append(state)
                d_logits_MV[done : done + count] = d_logit
                done += count
            del d_logit
        del truth
        if rows and gradients is not None:
            _differentiate(gradients, rows, torch.cat(states), d_logits_MV, heads)
    return result


def _differentiate(
    gradients: Gradients, rows: list[tuple[int, Tensor]], state_MH: Tensor, d_logits_MV: Tensor, heads: Heads
) -> None:
    """From the gradient of a chunk's logits, of all unrolled steps, to those of the states and weights."""
    with torch.enable_grad():
        state, norm = state_MH.requires_grad_(), heads.norm_H.detach().requires_grad_()
        normal = rms_norm(state, norm, heads.eps)
    d_normal = d_logits_MV @ heads.draft_VH.to(d_logits_MV.dtype)
    if gradients.head_VH is not None:
        add_product(gradients.head_VH, d_logits_MV.T, normal.detach())
    d_state, d_norm = torch.autograd.grad(normal, (state, norm), d_normal.to(normal.dtype))
    if gradients.norm_H is not None:
        gradients.norm_H += d_norm
    for (step, row), d in zip(rows, d_state.split([len(row) for _, row in rows]), strict=True):
        gradients.states[step][row] = d


def product(a_NH: Tensor, b_HM: Tensor) -> Tensor:
    """A matrix product whose sums and result are float32 or wider, whatever the factors are."""
    wide = wider(a_NH.dtype)
    if a_NH.dtype == wide or a_NH.device.type == "cpu":
        return a_NH.to(wide) @ b_HM.to(wide)
    return torch.mm(a_NH, b_HM, out_dtype=wide)


def add_product(total_NM: Tensor, a_NK: Tensor, b_KM: Tensor) -> None:
    """Add a matrix product to ``total_NM``, float32 or wider, where that lies."""
    if total_NM.device.type == "cpu" or a_NK.dtype == total_NM.dtype:
        total_NM.addmm_(a_NK.to(total_NM.dtype), b_KM.to(total_NM.dtype))
    else:
        torch.addmm(total_NM, a_NK, b_KM, out_dtype=total_NM.dtype, out=total_NM)


def wider(dtype: torch.dtype) -> torch.dtype:
    """float32, or the dtype itself where that is wider."""
    return torch.promote_types(dtype, torch.float32)
