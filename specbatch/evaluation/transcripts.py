"""Sample answers that are kept with a measurement: which of their tokens were drafted. Pure.

SGLang streams the answer so far after each verify step, and at the end the number of steps by accepted drafts. It does
not return the tokens that were proposed and rejected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ANSWERS = 6
"""Number of answers that are kept."""
MOST_TOKENS = 200
"""Tokens of an answer that are kept."""
PROMPT_CHARACTERS = 600
"""Characters of a prompt that are kept, from its end."""


@dataclass(frozen=True)
class VerifyStep:
    """One verify step; the first one is the prefill."""

    tokens: list[int]
    accepted: int
    """Number of leading tokens that were drafted; more than there are tokens if the answer ended earlier."""


def steps_of(lengths: Sequence[int], tokens: Sequence[int], histogram: Sequence[int]) -> list[VerifyStep] | None:
    """The verify steps of an answer.

    Args:
        lengths: of the answer after each step, the prefill first.
        tokens: the whole answer.
        histogram: verify steps by the number of accepted drafts, from 0.

    Returns:
        None where the two disagree, because two steps were streamed as one.
    """
    if not lengths or lengths[-1] != len(tokens):
        return None
    pieces = [list(tokens[first:end]) for first, end in zip([0, *lengths[:-1]], lengths, strict=True)]
    left = Counter({accepted: count for accepted, count in enumerate(histogram) if count})
    steps = [VerifyStep(pieces[0], 0)]
    for piece in pieces[1:-1]:
        left[len(piece) - 1] -= 1
        steps.append(VerifyStep(piece, len(piece) - 1))
    last = list(left.elements())
    if min(left.values(), default=0) < 0 or len(last) != len(pieces[1:][-1:]):
        return None
    # The last step may have accepted more than there was room for, or than came before the end.
    if last and last[0] < len(pieces[-1]) - 1:
        return None
    return steps + [VerifyStep(pieces[-1], accepted) for accepted in last]


def answer(tokenizer: Any, prompt: Sequence[int], steps: Sequence[VerifyStep]) -> dict[str, Any]:
    """The entry of ``evaluation.json`` for an answer: the end of its prompt, and the text of each token by verify step.

    Args:
        tokenizer: the target's, of transformers.
    """
    texts = iter(_texts(tokenizer, [token for step in steps for token in step.tokens][:MOST_TOKENS]))
    told = []
    for step in steps:
        pieces = [text for _, text in zip(step.tokens, texts, strict=False)]
        if not pieces:
            break
        told.append({"tokens": pieces, "accepted": step.accepted})
    text = tokenizer.decode(list(prompt), clean_up_tokenization_spaces=False)
    return {"prompt": text if len(text) <= PROMPT_CHARACTERS else "…" + text[-PROMPT_CHARACTERS:], "steps": told}


def _texts(tokenizer: Any, tokens: list[int]) -> list[str]:
    """The text that each token adds; empty for a token that only begins a character."""
    texts, before = [], ""
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:count], clean_up_tokenization_spaces=False)
        whole = text if count == len(tokens) else text.rstrip("\ufffd")
        texts.append(whole[len(before) :])
        before = max(before, whole, key=len)
    return texts
