"""What samples cost EAGLE-3: rows, live columns and operations, exact from the loss masks.

`columns` gives the same numbers for one pack; this module computes them for many samples at once, from the beginnings
and ends of their runs of loss tokens, so that a corpus of millions takes seconds.

Operations are by formula, a multiplication and an addition counted as two, as vendors count them: a matrix of ``n``
weights costs ``2 n`` a row, and its backward pass twice that (Kaplan et al., arXiv:2001.08361, §2.1); attention costs
``4 D`` for each pair of a query and a key of one head, and its backward pass 2.5 times its forward pass, scores being
computed again (Dao, arXiv:2307.08691, §4.1). Norms, rotations and activations are left out, as there.

Shapes: as in `specbatch.drafts.masks`; ``K`` unrolled steps.
"""

from __future__ import annotations

import numpy as np

from specbatch.drafts.eagle3.contract import target_runs
from specbatch.drafts.eagle3.memory import Shape
from specbatch.drafts.masks import Costs, Masks


def counts_of(masks: Masks, ttt_steps: int) -> np.ndarray:
    """Return the number of columns of each sample that enter the loss of each unrolled step, int64 ``[K, S]``."""
    return masks.runs.total(_live(*target_runs(masks), ttt_steps))


def costs_of(masks: Masks, ttt_steps: int, shape: Shape) -> Costs:
    """Return the costs of samples."""
    low_R, high_R = target_runs(masks)
    columns_S = _columns(masks, low_R, high_R)
    live_KS, pairs_S = live_columns(masks, ttt_steps)
    # In the first step each row of the last layer's states is the target of one column.
    rows_S = {"aux": columns_S, "last": live_KS[0]}
    if shape.images:
        rows_S["embeds"] = columns_S
    forward, both = (_flops(shape, rows_S, live_KS, pairs_S, backward=backward) for backward in (False, True))
    return Costs(
        captured_S=np.where(columns_S > 0, columns_S + 1, 0),
        rows_S=rows_S,
        counts_TS=live_KS,
        computed_TS=live_KS,
        flops_S=both,
        forward_flops_S=forward,
    )


def _columns(masks: Masks, low_R: np.ndarray, high_R: np.ndarray) -> np.ndarray:
    """Return the number of columns of each sample up to the last one that learns anything, int64 ``[S]``."""
    runs = masks.runs
    columns_S = np.zeros(len(masks.lengths_S), dtype=np.int64)
    some_S = runs.ends_S > runs.begins_S
    if some_S.any():
        columns_R = np.where(high_R > low_R, high_R - 1, 0)
        columns_S[some_S] = np.maximum.reduceat(columns_R, runs.begins_S[some_S])
    return columns_S


def live_columns(masks: Masks, ttt_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Count the columns that each unrolled step computes, which are those that learn in it.

    Returns:
        int64 ``[K, S]`` and ``[S]``: the number of columns, and of pairs of a query and a key that it sees, over all
        steps.
    """
    low_R, high_R = target_runs(masks)
    live_KR, k_K1 = _live(low_R, high_R, ttt_steps), np.arange(ttt_steps)[:, None]
    # Column i sees the keys of columns 0 to i of the first unrolled step, and k of its own. The first is low - 1.
    pairs_R = (live_KR * (2 * (low_R + k_K1) + live_KR - 1)).sum(axis=0) // 2
    return masks.runs.total(live_KR), masks.runs.total(pairs_R)


def _live(low_R: np.ndarray, high_R: np.ndarray, ttt_steps: int) -> np.ndarray:
    return np.maximum(high_R - low_R - np.arange(ttt_steps)[:, None], 0)


def _flops(
    shape: Shape, rows_S: dict[str, np.ndarray], live_KS: np.ndarray, pairs_S: np.ndarray, *, backward: bool
) -> np.ndarray:
    """Return the operations of the unrolled steps on live columns, with loss and optionally gradients: float ``[S]``.

    The projection of the target's states needs no gradient of its input, the target's head none at all.

    Args:
        pairs_S: pairs of a query and a key that it sees, over all unrolled steps.
    """
    hidden, query, key = shape.hidden, shape.query, shape.key
    both, head, first = (3.0, 3.0 if shape.train_head else 2.0, 2.0) if backward else (1.0, 1.0, 1.0)
    scores = 1 + 2.5 if backward else 1.0
    layer = hidden * (2 * query + 2 * key + 3 * shape.intermediate)
    live_K = np.full(len(live_KS), both * 2.0 * layer + head * 2.0 * shape.head)
    # The columns of the first step read all tokens that those of later steps read. Their queries, keys and values are
    # projected there, and the first step has no own keys and values.
    live_K[0] += both * 2.0 * hidden * query
    flops = rows_S["aux"] * (2.0 * (first * shape.first + both * 2 * hidden * 2 * key))
    flops += rows_S["last"] * (2.0 * shape.head)
    flops += live_K @ live_KS
    return flops + scores * 4.0 * query * pairs_S
