"""Chooses the tokens that the draft's head can propose: the most frequent loss tokens of the corpus."""

from __future__ import annotations

import logging

import numpy as np

logger = logging.getLogger(__name__)


def draft_vocabulary(loss_token_counts: np.ndarray, size: int, tokenizer_size: int) -> np.ndarray:
    """Return the target ids of a draft vocabulary.

    They are the most frequent loss tokens; among equally frequent ones, the lower ids. If the corpus has fewer distinct
    ones than ``size``, the lowest other ids of the tokenizer fill up. Ids that only pad the target's embedding, from
    ``tokenizer_size`` on, are never among them.

    Args:
        loss_token_counts: int ``[at least tokenizer_size]``, how often each id is a loss token.
        size: rows of the draft's head.
        tokenizer_size: ids that the tokenizer can produce, from 0.

    Returns:
        int64 ``[size]``, ascending, without repetition.

    Raises:
        ValueError: the tokenizer has fewer than ``size`` ids.
    """
    if not 1 <= size <= tokenizer_size:
        raise ValueError(f"a draft vocabulary of {size} is not in 1..{tokenizer_size}, the tokenizer's ids")
    counts = np.zeros(tokenizer_size, dtype=np.int64)
    known = np.asarray(loss_token_counts, dtype=np.int64)[:tokenizer_size]
    counts[: known.size] = known
    order = np.argsort(-counts, kind="stable")[:size]
    total, distinct = int(counts.sum()), int(np.count_nonzero(counts))
    coverage = float(counts[order].sum()) / total if total else 0.0
    if distinct < size:
        logger.warning(
            "the corpus has fewer distinct loss tokens than the draft vocabulary; filled with the lowest other ids "
            "size=%d distinct=%d filled_percent=%.1f coverage_percent=%.2f",
            size, distinct, 100 * (size - distinct) / size, 100 * coverage,
        )  # fmt: skip
    else:
        logger.info("draft vocabulary size=%d distinct=%d coverage_percent=%.2f", size, distinct, 100 * coverage)
    return np.sort(order).astype(np.int64)
