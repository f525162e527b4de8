"""The numbers of a measurement of speculative decoding, and what is suspicious about them. Pure.

A *verify step* is one forward of the target over the drafted tokens. It keeps the drafts up to the first one that the
target would not have chosen, and one token more, which the target chose itself: the bonus token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DEFINITION = (
    "1 + correct drafts / verify steps: tokens that one forward of the target gives, the bonus token counted; plain "
    "decoding has 1. The token of the prefill is not counted, so that short answers do not read high. All drafts of a "
    "verify step count, also those past the end of the answer."
)

TOO_LOW = 0.6
"""Share of the training accuracy below which acceptance is suspicious. Healthy drafts reach 0.9 and more: they are
judged by other conversations, and by all tokens instead of those in the draft's vocabulary only. A draft that reads
the wrong tensors keeps a few of the most frequent tokens."""
TOO_HIGH = 0.25
"""How far above the training accuracy acceptance is suspicious. Answers written by the target itself are somewhat
easier than the training data, and later drafts are only judged where the earlier ones were right."""
USELESS = 0.02
"""Acceptance of the first draft that random weights reach as well, whatever training says."""
STANDARD_ERRORS = 3.0
"""Differences that chance explains are no ground for a warning."""


@dataclass(frozen=True)
class Answers:
    """What an engine made of the prompts."""

    tokens: list[list[int]]
    """Of each answer, the end token included."""
    seconds: float
    """From sending the prompts to the last answer, prefill included."""
    histogram: tuple[int, ...] = ()
    """Verify steps by the number of accepted drafts, from 0; empty for plain decoding."""

    @property
    def count(self) -> int:
        """Tokens of all answers."""
        return sum(map(len, self.tokens))


def acceptance_length(histogram: Sequence[int]) -> float:
    """See `DEFINITION`.

    Raises:
        ValueError: if there was no verify step.
    """
    if not sum(histogram):
        raise ValueError("no verify step")
    return 1 + sum(accepted * steps for accepted, steps in enumerate(histogram)) / sum(histogram)


def acceptance_rate(histogram: Sequence[int], draft_tokens: int) -> list[float]:
    """Share of the verify steps in which at least 1, 2, ... ``draft_tokens`` drafts were accepted."""
    return [sum(histogram[position:]) / sum(histogram) for position in range(1, draft_tokens + 1)]


def measure(plain: Answers, speculative: Answers, draft_tokens: int) -> dict[str, Any]:
    """The numbers that the two ways of decoding the same prompts give; keys as in ``evaluation.json``."""
    histogram = [*speculative.histogram, *[0] * (draft_tokens + 1 - len(speculative.histogram))]
    return {
        "acceptance_length": acceptance_length(histogram),
        "acceptance_length_definition": DEFINITION,
        "acceptance_rate": acceptance_rate(histogram, draft_tokens),
        "prompts": len(plain.tokens),
        "identical": sum(a == b for a, b in zip(plain.tokens, speculative.tokens, strict=True)),
        "tokens_per_s_plain": plain.count / plain.seconds,
        "tokens_per_s_speculative": speculative.count / speculative.seconds,
        "draft_tokens": draft_tokens,
        "verify_steps": sum(histogram),
        "accepted_histogram": histogram,
        "output_tokens": speculative.count,
    }


def differences(plain: Answers, speculative: Answers, dtype: str) -> list[str]:
    """A warning where the outputs are not the same token for token."""
    pairs = list(zip(plain.tokens, speculative.tokens, strict=True))
    unequal = [prompt for prompt, (a, b) in enumerate(pairs) if a != b]
    if not unequal:
        return []
    a, b = pairs[unequal[0]]
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    told = (
        f"output differs from plain decoding on {len(unequal)} of {len(pairs)} prompts, first on prompt {unequal[0]} "
        f"at answer token {same} (both from 0): plain {_token(a, same)}, speculative {_token(b, same)}. "
    )
    if dtype == "float32":
        return [told + "In float32 only a near tie explains that; more than a few mean that verification is wrong"]
    return [
        f"{told}Verification computes several rows at once, which rounds otherwise in {dtype} and decides near ties: "
        "evaluate.dtype: float32 tells whether that is all"
    ]


def disagreements(rate: Sequence[float], accuracy: Sequence[float], verify_steps: int) -> list[str]:
    """Warnings where acceptance is not what the accuracies of training promise, with likely causes.

    A draft counts at position ``k`` only where all before it were accepted, so the share among those verify steps is
    compared with the accuracy of the unrolled step ``k``.

    Args:
        rate: as `acceptance_rate` gives it.
        accuracy: of each unrolled step at the end of training.
        verify_steps: those that ``rate`` is of.
    """
    reached = [1.0, *rate]
    for position, trained in enumerate(accuracy[: len(rate)], start=1):
        trials = verify_steps * reached[position - 1]
        if trials < 1:
            break
        accepted = reached[position] / reached[position - 1]
        noise = STANDARD_ERRORS * math.sqrt(max(trained * (1 - trained), 0.25 / trials) / trials)
        found = (
            f"draft {position} was accepted in {accepted:.0%} of {trials:.0f} verify steps, but training ended with an "
            f"accuracy of {trained:.0%} there"
        )
        if accepted < TOO_LOW * trained and trained - accepted > noise:
            # Later positions suffer from the first one's fault, so only the first finding is told.
            return [f"{found}; likely causes: {_LOW_FIRST if position == 1 else _LOW_LATER}"]
        if position == 1 and accepted > trained + TOO_HIGH and accepted - trained > noise:
            return [f"{found}; likely causes: {_HIGH}"]
    if rate and rate[0] < USELESS and verify_steps > 1 / USELESS:
        return [
            f"draft 1 was accepted in {rate[0]:.1%} of {verify_steps} verify steps, no more than with random weights; "
            f"likely causes: too little training; {_LOW_FIRST}"
        ]
    return []


_LOW_FIRST = (
    "the engine feeds the draft other layers than it was trained on (eagle_aux_hidden_state_layer_ids in the draft's "
    "config.json); d2t maps its tokens wrongly; the target is not the one, or not in the state, that it was trained "
    "for; tensors of the draft that the engine does not know by their names; prompts unlike the training data, or "
    "training answers that the target would not have given (`specbatch regenerate`)"
)
_LOW_LATER = (
    "the draft continues from its own state otherwise than in training: rope_theta or rope_scaling of its config.json, "
    "or a normalisation of the state (norm_output); fewer unrolled steps in training (draft.ttt_steps) than "
    "evaluate.draft_tokens"
)
_HIGH = (
    "held-out prompts that are also in the training data; answers that repeat themselves, which are easy to draft; "
    "metrics of another run"
)


def _token(tokens: Sequence[int], position: int) -> str:
    return str(tokens[position]) if position < len(tokens) else "ended"
