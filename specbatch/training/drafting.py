"""How far a draft would come by greedy drafting, replayed on text whose target states are known. Pure.

Where the answers are the target's own greedy ones, which is what drafts are best trained on, this is what decoding
does: a proposal is accepted exactly if it is the token that comes next in the text. On other text the target's most
likely token decides on each proposal, and the text goes on as it is written.
"""

from __future__ import annotations

import numpy as np


def accepted_counts(proposed_KT: np.ndarray, greedy_T: np.ndarray, loss_mask: np.ndarray, most: int) -> np.ndarray:
    """Walk through the answers of one sample as speculative decoding would.

    A verify step stands at the newest token of an answer, accepts proposals until the first wrong one, and goes on
    behind the token that the target then gives. The first token of an answer is the prefill's.

    Args:
        proposed_KT: int, the token that drafting from each position proposes in each step, -1 for none.
        greedy_T: int, the target's most likely token after each position, -1 where that is not known.
        loss_mask: bool ``[T]``, tokens of answers.
        most: tokens that are proposed at a time, at most ``K``.

    Returns:
        int64 ``[most + 1]``: verify steps by the number of proposals that they accepted.
    """
    tokens = len(greedy_T)
    right_KT = np.zeros((most + 1, tokens), dtype=bool)
    for step in range(min(most, tokens - 1)):
        # Step k from position i proposes the token after position i + 1 + k.
        truth = greedy_T[1 + step :]
        right_KT[step, : len(truth)] = (proposed_KT[step, : len(truth)] == truth) & (truth >= 0)
    accepted_T = right_KT.argmin(0)
    stands_T = np.zeros(tokens, dtype=bool)
    stands_T[1:-1] = loss_mask[1:-1] & loss_mask[2:]
    # The column before the newest token reads it: it is one position earlier.
    starts = np.flatnonzero(stands_T) - 1
    counts = np.zeros(most + 1, dtype=np.int64)
    at = -1
    for start in starts.tolist():
        if start >= at:
            counts[accepted_T[start]] += 1
            at = start + 1 + int(accepted_T[start])
    return counts


def acceptance_length(counts: np.ndarray) -> float | None:
    """Tokens a verify step, the target's own included; None without any step."""
    steps = int(counts.sum())
    return 1 + float(counts @ np.arange(len(counts))) / steps if steps else None
