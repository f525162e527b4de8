"""The draft's vocabulary: the target's tokens that its head can propose."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specbatch.errors import UserError
from specbatch.tokenizer_ids import tokenizer_ids

if TYPE_CHECKING:
    from specbatch.corpus import Corpus
    from specbatch.target import TargetShape


def check_vocabulary(size: int | None, target: TargetShape) -> None:
    """Check ``draft.vocab_size``.

    Raises:
        UserError: the target has fewer tokens.
    """
    most = len(tokenizer_ids(target.path)) or target.vocab
    if size and size > most:
        raise UserError(
            f"draft.vocab_size: {size} is more than the target's {most} tokens; set draft.vocab_size: null for all of "
            "them"
        )


def draft_ids(size: int | None, vocab: int, corpus: Corpus) -> tuple[int, ...]:
    """Return the target ids of the draft's vocabulary, ascending.

    Args:
        size: rows of the draft's head; None for the target's whole vocabulary.
        vocab: rows of the target's head.
    """
    from specbatch.corpus import draft_vocabulary

    if size is None or size >= vocab:
        return tuple(range(vocab))
    size = min(size, corpus.tokenizer_size)
    return tuple(draft_vocabulary(corpus.loss_token_counts, size, corpus.tokenizer_size).tolist())
