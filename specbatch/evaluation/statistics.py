"""Statistics of a speculative decoding measurement, and warnings about suspicious ones. Pure.

A *verify step* is one forward of the target over the drafted tokens. It keeps the drafts up to the first one that the
target would not have chosen, and one more token, which the target chose itself: the bonus token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DEFINITION = (
    "1 + correct drafts / verify steps: tokens that one forward of the target gives, the bonus token counted; plain "
    "decoding has 1. The token of the prefill is not counted, so that short answers do not read high. All drafts of a "
    "verify step count, also those past the end of the answer."
)

TOO_LOW = 0.6
"""Share of the training accuracy below which acceptance is suspicious. Healthy drafts reach 0.9 and more; less than 1,
because the conversations are others, and all tokens count instead of only those in the draft's vocabulary. A draft that
reads the wrong tensors still gets a few of the most frequent tokens right."""
TOO_HIGH = 0.25
"""How far above the training accuracy acceptance is suspicious. Answers written by the target itself are somewhat
easier than the training data, and later drafts are only judged where the earlier ones were right."""
USELESS = 0.02
"""Acceptance of the first draft token that random weights reach, too."""
RESAMPLES = 2000
"""Resamples of a bootstrap."""
STANDARD_ERRORS = 3.0
"""Standard errors below which a difference is attributed to chance."""


@dataclass(frozen=True)
class DecodedAnswers:
    """An engine's answers to the prompts."""

    tokens: list[list[int]]
    """Token ids of each answer, the end token included."""
    seconds: float
    """From sending the prompts to the last answer, prefill included."""
    histogram: tuple[int, ...] = ()
    """Verify steps by the number of accepted drafts, from 0; empty for plain decoding."""
    histograms: tuple[tuple[int, ...], ...] = ()
    """The same of each answer, all of one length."""

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


def intervals(histograms: Sequence[Sequence[int]]) -> tuple[list[float], list[list[float]]] | None:
    """95 % confidence intervals of `acceptance_length` and of each position's `acceptance_rate`.

    They are the 2.5th and 97.5th percentiles of a bootstrap over prompts, each with all its verify steps, since steps
    of one answer are correlated. The random numbers are the same every time.

    Args:
        histograms: of each answer.

    Returns:
        low and high of the length, and of each position; None for fewer than two answers with verify steps.
    """
    counts_PK = np.asarray([each for each in histograms if sum(each)], dtype=np.float64)
    prompts = len(counts_PK)
    if prompts < 2:
        return None
    drawn_RP = np.random.default_rng(0).multinomial(prompts, [1 / prompts] * prompts, size=RESAMPLES)
    counts_RK = drawn_RP @ counts_PK
    reached_RK = counts_RK[:, ::-1].cumsum(1)[:, ::-1]
    rates_RK = reached_RK[:, 1:] / reached_RK[:, :1]
    low, high = np.percentile(1 + rates_RK.sum(1), [2.5, 97.5])
    rates = np.percentile(rates_RK, [2.5, 97.5], axis=0)
    return [float(low), float(high)], rates.T.tolist()


def measure(plain: DecodedAnswers, speculative: DecodedAnswers, draft_tokens: int) -> dict[str, Any]:
    """Compare plain and speculative decoding of the same prompts; keys as in ``evaluation.json``."""
    histogram = [*speculative.histogram, *[0] * (draft_tokens + 1 - len(speculative.histogram))]
    sure = intervals(speculative.histograms)
    return {
        "acceptance_length": acceptance_length(histogram),
        "acceptance_length_definition": DEFINITION,
        "acceptance_rate": acceptance_rate(histogram, draft_tokens),
        **({"acceptance_length_interval": sure[0], "acceptance_rate_interval": sure[1]} if sure else {}),
        "prompts": len(plain.tokens),
        "identical": sum(a == b for a, b in zip(plain.tokens, speculative.tokens, strict=True)),
        "tokens_per_s_plain": plain.count / plain.seconds,
        "tokens_per_s_speculative": speculative.count / speculative.seconds,
        "draft_tokens": draft_tokens,
        "verify_steps": sum(histogram),
        "accepted_histogram": histogram,
        "output_tokens": speculative.count,
    }


def disagreements(rate: Sequence[float], accuracy: Sequence[float], verify_steps: int) -> list[str]:
    """Warnings where acceptance contradicts the accuracies of training, with likely causes.

    A draft counts at position ``k`` only where all before it were accepted, so the share among those verify steps is
    compared with the accuracy of the unrolled step ``k``.

    Args:
        rate: of `acceptance_rate`.
        accuracy: of each unrolled step at the end of training.
        verify_steps: number of verify steps that ``rate`` counts.
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
            # An error at one position affects all later ones, so only the first finding is reported.
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
    "or a normalisation of the state (norm_output); fewer tokens proposed at a time in training (draft.*) than "
    "evaluate.draft_tokens"
)
_HIGH = (
    "held-out prompts that are also in the training data; answers that repeat themselves, which are easy to draft; "
    "metrics of another run"
)
