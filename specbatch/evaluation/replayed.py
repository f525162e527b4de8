"""Greedy drafting replayed on text whose target states are known: how many proposals are accepted. Pure.

Where the answers are the target's own greedy ones, which drafts are best trained on, this is exactly decoding: a
proposal is accepted if and only if it is the next token of the text. On other text the target's most likely token
decides on each proposal, and the text continues as it is written.
"""

from __future__ import annotations

import numpy as np


def accepted_counts(proposed_KT: np.ndarray, greedy_T: np.ndarray, loss_mask: np.ndarray, most: int) -> np.ndarray:
    """Replay the answers of one sample as speculative decoding would proceed.

    A verify step starts at the newest token of an answer, accepts proposals up to the first wrong one, and adds the
    token that the target then gives. The first token of an answer comes from the prefill.

    Args:
        proposed_KT: int, the proposals when drafting from the newest token at each position, one row for each proposed
            token; -1 for none.
        greedy_T: int, the target's most likely token after each position, -1 where it is unknown.
        loss_mask: bool ``[T]``, tokens of answers.
        most: tokens that are proposed at a time, at most ``K``.

    Returns:
        int64 ``[most + 1]``: number of verify steps by accepted proposals.
    """
    tokens = len(greedy_T)
    right_KT = np.zeros((most + 1, tokens), dtype=bool)
    for step in range(min(most, tokens)):
        # Proposal k from position i is for position i + 1 + k.
        truth = greedy_T[step:]
        right_KT[step, : len(truth)] = (proposed_KT[step, : len(truth)] == truth) & (truth >= 0)
    accepted_T = right_KT.argmin(0)
    stands_T = np.zeros(tokens, dtype=bool)
    stands_T[1:-1] = loss_mask[1:-1] & loss_mask[2:]
    starts = np.flatnonzero(stands_T)
    counts = np.zeros(most + 1, dtype=np.int64)
    at = -1
    for start in starts.tolist():
        if start >= at:
            counts[accepted_T[start]] += 1
            at = start + 1 + int(accepted_T[start])
    return counts


def right_counts(proposed_KT: np.ndarray, greedy_T: np.ndarray) -> np.ndarray:
    """Count the proposals that are the target's most likely token, each independent of those before it.

    Args:
        proposed_KT, greedy_T: as for `accepted_counts`, for one sample or for several, concatenated.

    Returns:
        int64 ``[2, K]``: correct proposals, and proposals at positions whose target token is known.
    """
    counts = np.zeros((2, len(proposed_KT)), dtype=np.int64)
    for step, proposed_T in enumerate(proposed_KT):
        truth = greedy_T[step:]
        proposed = proposed_T[: len(truth)]
        known = (proposed >= 0) & (truth >= 0)
        counts[:, step] = (known & (proposed == truth)).sum(), known.sum()
    return counts


def acceptance_length(counts: np.ndarray) -> float | None:
    """Tokens per verify step, the target's own included; None without any step."""
    steps = int(counts.sum())
    return 1 + float(counts @ np.arange(len(counts))) / steps if steps else None
