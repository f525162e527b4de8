"""What samples cost a block draft: rows, slots and operations, exact from the loss masks.

`blocks` gives the same numbers for one pack; this module computes them for many samples at once.

Operations are by formula, as in `specbatch.drafts.eagle3.cost`: a multiplication and an addition are two, a matrix of
``n`` weights costs ``2 n`` a row and twice that in its backward pass, attention ``4 D`` for each pair of a query and a
key of one head and 2.5 times that in its backward pass.

Shapes: as in `specbatch.drafts.masks`; ``K`` tokens that a block proposes.
"""

from __future__ import annotations

import numpy as np

from specbatch.drafts.block.anchors import Draw, anchors, learning
from specbatch.drafts.block.contract import is_candidate
from specbatch.drafts.block.memory import BlockShape
from specbatch.drafts.masks import Costs, Masks


def counts_of(masks: Masks, draw: Draw, shape: BlockShape) -> np.ndarray:
    """Return the number of slots of each sample that enter each term, int64 ``[T, S]``."""
    counts_KS = masks.total(learning(masks, anchors(masks, draw), shape.proposals))
    return np.concatenate([counts_KS] * (2 if shape.confidence else 1))


def costs_of(masks: Masks, draw: Draw, shape: BlockShape, *, d_pace: bool) -> Costs:
    """Return the costs of samples.

    Args:
        d_pace: whether the logits of each slot are computed twice.
    """
    candidate_N, anchor_N = is_candidate(masks), anchors(masks, draw)
    learning_KN = learning(masks, anchor_N, shape.proposals)
    rows_S = {
        "aux": np.maximum.reduceat(np.where(candidate_N, masks.position_N, 0), masks.starts_S),
        "last": masks.total(candidate_N),
    }
    counts_KS, blocks_S = masks.total(learning_KN), masks.total(anchor_N)
    # In the last layer only the slots that learn attend.
    seen_N = masks.position_N + shape.block_size
    every, last = shape.block_size * (shape.layers - 1), learning_KN.sum(0)
    pairs_S = masks.total(np.where(anchor_N, seen_N, 0) * every + seen_N * last)
    forward, both = (
        _flops(shape, rows_S, counts_KS.sum(0), blocks_S, pairs_S, backward=backward, d_pace=d_pace)
        for backward in (False, True)
    )
    computed_KS = np.broadcast_to(blocks_S, counts_KS.shape)
    terms = 2 if shape.confidence else 1
    return Costs(
        captured_S=np.where(rows_S["last"] > 0, rows_S["aux"] + 1, 0),
        rows_S=rows_S,
        counts_TS=np.concatenate([counts_KS] * terms),
        computed_TS=np.concatenate([computed_KS, *[0 * computed_KS] * (terms - 1)]),
        flops_S=both,
        forward_flops_S=forward,
    )


def _flops(
    shape: BlockShape,
    rows_S: dict[str, np.ndarray],
    learnt_S: np.ndarray,
    blocks_S: np.ndarray,
    pairs_S: np.ndarray,
    *,
    backward: bool,
    d_pace: bool,
) -> np.ndarray:
    """Return the operations of each sample, float64 ``[S]``. The projection of the target's states needs no gradient of
    its input, and the frozen head none of its weights.

    Args:
        learnt_S: slots that learn.
        pairs_S: pairs of a slot and a key that it sees, over all layers.
    """
    both, head, first = (3.0, 2.0, 2.0) if backward else (1.0, 1.0, 1.0)
    head += 1.0 if backward and d_pace else 0.0
    scores = 1 + 2.5 if backward else 1.0
    slots_S = blocks_S * shape.block_size
    flops = rows_S["aux"] * 2.0 * (first * shape.first + both * shape.layers * shape.keys)
    flops += both * 2.0 * slots_S * shape.layers * shape.keys
    flops += both * 2.0 * (slots_S * (shape.layers - 1) + learnt_S) * shape.others
    flops += scores * 4.0 * shape.query * pairs_S
    flops += 2.0 * shape.head * (rows_S["last"] + head * learnt_S)
    return flops + both * 2.0 * shape.vocab * shape.markov_rank * learnt_S
