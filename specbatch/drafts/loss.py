"""The loss of unrolled steps and its gradients, in one pass over the target positions.

The target's distribution at a position is computed once for all unrolled steps that learn from it. Positions are
processed in chunks, so nothing of size tokens times vocabulary is ever allocated, and gradients of logits are consumed
at once. The draft's last norm is part of the pass, so its output, which is as large as all unrolled states, is not kept
either.

Logits, softmax, loss and the gradient of the logits are in float32 or wider, whatever the dtype of the weights. The
gradient is a difference of two probabilities: once the draft is good, the rounding error of bfloat16 logits exceeds
that difference. Rounding the finished difference, as for the matrix products of a GPU, costs no more than rounding any
other gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specbatch.drafts.fused import compare, rms_norm
from specbatch.drafts.memory import chunk_positions, position_bytes
from specbatch.target.logits import PLAIN, Logits


@dataclass(frozen=True)
class LossRows:
    """The rows of an unrolled step that learn, and the target positions that they learn from. Both are int64, strictly
    ascending, on the host."""

    row_M: Tensor
    """Rows of the step's states."""
    target_M: Tensor
    """Rows of the target's states."""


@dataclass(frozen=True)
class Heads:
    """Weights that compute logits from states, for both models. ``V`` is the draft's vocabulary."""

    draft_VH: Tensor
    norm_H: Tensor | None
    """Weight of the draft's norm before its head; None if the states are already normalised."""
    eps: float
    target_VH: Tensor
    last_PH: Tensor
    """The target's states after its final norm."""
    compare: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = compare
    """The loss of a row: `fused.compare`, or a function with the same signature."""
    target_bias_V: Tensor | None = None
    target_logits: Logits = PLAIN
    """Transformation of the target's logits before the softmax."""


@dataclass
class Gradients:
    """Gradients of the sum of the weighted losses, accumulated in float32 or wider; None if not needed."""

    head_VH: Tensor | None
    norm_H: Tensor | None
    states: list[Tensor] = field(default_factory=list)
    """Gradients of the states after each unrolled step, in their dtype; replaced in each call."""


def distill(
    states_NH: Sequence[Tensor],
    loss_rows: Sequence[LossRows],
    heads: Heads,
    weights_K: Tensor,
    gradients: Gradients | None = None,
    *,
    guesses: list[Tensor] | None = None,
) -> Tensor:
    """Compute the cross-entropy between the target's and the draft's next-token distributions.

    Args:
        states_NH: the draft's states after each unrolled step.
        loss_rows: the rows that learn in each unrolled step.
        weights_K: weight of each unrolled step's summed cross-entropy.
        gradients: receives the gradients, which are stored or added to; if not given, none are computed.
        guesses: if given, receives the draft's most likely token of each row that learns, for each step.

    Returns:
        float ``[2, K]``: weighted summed cross-entropy of each step, and how often the most likely tokens
        of both distributions are the same.
    """
    with torch.no_grad():
        return _distill(states_NH, loss_rows, heads, weights_K, gradients, guesses)


def _distill(
    states_NH: Sequence[Tensor],
    loss_rows: Sequence[LossRows],
    heads: Heads,
    weights_K: Tensor,
    gradients: Gradients | None,
    guesses: list[Tensor] | None,
) -> Tensor:
    head, device = heads.draft_VH, heads.draft_VH.device
    wide = wider(head.dtype)
    weights = weights_K.to(wide)
    result = weights.new_zeros(2, len(loss_rows))
    if guesses is not None:
        guesses[:] = [torch.empty(len(chosen.row_M), dtype=torch.int64, device=device) for chosen in loss_rows]
    if gradients is not None:
        gradients.states = [torch.zeros_like(state) for state in states_NH]
    gpu = device.type != "cpu"
    factor = head.dtype if gpu else wide
    vocab, hidden = head.shape
    each = position_bytes(
        vocab, hidden, len(loss_rows), wide=wide.itemsize, value=head.dtype.itemsize, factor=factor.itemsize
    )
    size = chunk_positions(each, gpu=gpu)
    ends = [chosen.target_M[[0, -1]].tolist() for chosen in loss_rows if len(chosen.target_M)]
    begin, end = min((e[0] for e in ends), default=0), max((e[1] for e in ends), default=-1) + 1
    # Logits of all unrolled steps. Gradients take their place if they have the same dtype, so that one product with the
    # head differentiates all steps. Allocated once: on a CPU, new memory of this size takes longer than a write.
    in_place = factor == wide
    kept = in_place or gradients is not None
    most = min(size, max((len(chosen.row_M) for chosen in loss_rows), default=0)) if kept else 0
    logits_MV = head.new_empty(len(loss_rows) * most, vocab, dtype=factor)
    for first in range(begin, end, size):
        last = heads.last_PH[first : min(first + size, end)]
        truth = logits_of_target(last, heads.target_VH, heads.target_bias_V, heads.target_logits).softmax(-1)
        likely = truth.max(-1).indices
        bounds = torch.tensor([first, first + size])
        parts = [slice(*torch.searchsorted(chosen.target_M, bounds).tolist()) for chosen in loss_rows]
        rows = [
            (step, _selection(loss_rows[step].row_M[part], device))
            for step, part in enumerate(parts)
            if part.stop > part.start
        ]
        if not rows:
            continue
        state_MH = torch.cat([states_NH[step][row] for step, row in rows])
        normal_MH = state_MH if heads.norm_H is None else rms_norm(state_MH, heads.norm_H, heads.eps)
        done = 0
        for step, _ in rows:
            here = _selection(loss_rows[step].target_M[parts[step]] - first, device)
            space = slice(done, done + parts[step].stop - parts[step].start)
            logits = product(normal_MH[space], head.T, logits_MV[space] if in_place else None)
            if guesses is not None:
                guesses[step][parts[step]] = logits.argmax(-1)
            loss, right, d_logit = heads.compare(logits, truth[here], likely[here], weights[step])
            result[0, step] += loss.sum()
            result[1, step] += right.sum()
            if gradients is not None and not (in_place and d_logit is logits):
                logits_MV[space] = d_logit
            del logits, d_logit
            done = space.stop
        del truth, normal_MH
        if gradients is not None:
            _differentiate(gradients, rows, state_MH, logits_MV[:done], heads)
    return result


def _selection(index_M: Tensor, device: torch.device) -> Tensor | slice:
    """Return the indices, or the slice that they are, which takes no copy of the rows.

    Args:
        index_M: strictly ascending, on the host.
    """
    first, last = int(index_M[0]), int(index_M[-1])
    return slice(first, last + 1) if last - first + 1 == len(index_M) else index_M.to(device, non_blocking=True)


def _differentiate(
    gradients: Gradients, rows: list[tuple[int, Tensor | slice]], state_MH: Tensor, d_logits_MV: Tensor, heads: Heads
) -> None:
    """Compute the gradients of states and weights from those of a chunk's logits of all unrolled steps.

    Args:
        rows: the unrolled steps, and the rows of their states that learn.
    """
    normal = state_MH
    if heads.norm_H is not None:
        with torch.enable_grad():
            state, norm = state_MH.requires_grad_(), heads.norm_H.detach().requires_grad_()
            normal = rms_norm(state, norm, heads.eps)
    d_normal = (d_logits_MV @ heads.draft_VH.to(d_logits_MV.dtype)).to(normal.dtype)
    if gradients.head_VH is not None:
        add_product(gradients.head_VH, d_logits_MV.T, normal.detach())
    d_state = d_normal
    if heads.norm_H is not None:
        d_state, d_norm = torch.autograd.grad(normal, (state, norm), d_normal)
        if gradients.norm_H is not None:
            gradients.norm_H += d_norm
    sizes = [row.stop - row.start if isinstance(row, slice) else len(row) for _, row in rows]
    for (step, row), d in zip(rows, d_state.split(sizes), strict=True):
        gradients.states[step][row] = d


def logits_of_target(
    last_PH: Tensor, head_VH: Tensor, bias_V: Tensor | None, logits: Logits, out_PV: Tensor | None = None
) -> Tensor:
    """Return the target's logits ``[P, V]``, float32 or wider, for some of its states.

    Args:
        bias_V: bias of its head.
        logits: transformation of the logits before the softmax.
        out_PV: takes the result, on a CPU.
    """
    logits_PV = product(last_PH.to(head_VH.dtype), head_VH.T, out_PV)
    if bias_V is not None:
        logits_PV += bias_V
    if logits.scale != 1:
        logits_PV *= logits.scale
    if logits.cap is not None:
        logits_PV.div_(logits.cap).tanh_().mul_(logits.cap)
    return logits_PV


def product(a_NH: Tensor, b_HM: Tensor, out_NM: Tensor | None = None) -> Tensor:
    """Return a matrix product whose sums and result are float32 or wider, whatever the factors' dtype.

    Args:
        out_NM: takes the result; only on a CPU, or if the factors have its dtype.
    """
    wide = wider(a_NH.dtype)
    if a_NH.dtype == wide or a_NH.device.type == "cpu":
        return torch.mm(a_NH.to(wide), b_HM.to(wide), out=out_NM)
    return torch.mm(a_NH, b_HM, out_dtype=wide)


def add_product(total_NM: Tensor, a_NK: Tensor, b_KM: Tensor) -> None:
    """Add a matrix product to ``total_NM``, float32 or wider, in place."""
    if total_NM.device.type == "cpu" or a_NK.dtype == total_NM.dtype:
        total_NM.addmm_(a_NK.to(total_NM.dtype), b_KM.to(total_NM.dtype))
    else:
        torch.addmm(total_NM, a_NK, b_KM, out_dtype=total_NM.dtype, out=total_NM)


def wider(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or the dtype itself if it is wider."""
    return torch.promote_types(dtype, torch.float32)
