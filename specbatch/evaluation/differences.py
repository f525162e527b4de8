"""Differences between the outputs of plain and of speculative decoding: where, how large, and whether they are wrong.

Verification computes several rows at once, which rounds differently than one row at a time. Where two tokens are almost
equally likely, rounding decides between them, and the text after them differs too: only the first difference of an
answer is evidence. The target's logits there come from a prefill of the prefix that both answers share. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specbatch.evaluation.statistics import DecodedAnswers

NEAR_TIE = {"float32": 1e-3, "float16": 0.06, "bfloat16": 0.5}
"""Largest distance between two logits that rounding can swap, by data type. States after the last layer differ by up to
1e-6 of their size in float32 and 2e-2 in bfloat16 where only the order of operations differs; logits go up to 30."""
MOST = 32
"""Largest number of differences that are examined."""


@dataclass(frozen=True)
class Parting:
    """The first difference of one prompt's answers."""

    prompt: int
    position: int
    """Token of the answer, from 0."""
    plain: int | None
    """The token there; None if the answer ended before."""
    speculative: int | None


def partings(plain: DecodedAnswers, speculative: DecodedAnswers) -> list[Parting]:
    """The first difference of each pair of answers that differ, in the order of prompts."""
    found = []
    for prompt, (a, b) in enumerate(zip(plain.tokens, speculative.tokens, strict=True)):
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            found.append(Parting(prompt, at, a[at] if at < len(a) else None, b[at] if at < len(b) else None))
    return found


def verdict(parting: Parting, logits: tuple[float, float] | None, dtype: str) -> dict[str, Any]:
    """The entry of ``evaluation.json`` for a difference.

    Args:
        logits: of the plain and of the speculative token, up to a common constant; None if unknown.
        dtype: data type of the computation.
    """
    gap = abs(logits[0] - logits[1]) if logits is not None else None
    kind = "unknown"
    if parting.plain is None or parting.speculative is None:
        # After the same tokens an answer ends in both ways or in none.
        kind = "wrong"
    elif gap is not None:
        kind = "rounding" if gap <= NEAR_TIE.get(dtype, NEAR_TIE["bfloat16"]) else "wrong"
    return {
        "prompt": parting.prompt,
        "position": parting.position,
        "plain": parting.plain,
        "speculative": parting.speculative,
        "logit_gap": gap,
        "verdict": kind,
    }


def difference_text(found: dict[str, Any]) -> str:
    """``prompt 3, answer token 17: plain 5, speculative 9, logits 0.012 apart: rounding``"""
    tokens = ", ".join(f"{how} {'ended' if found[how] is None else found[how]}" for how in ("plain", "speculative"))
    gap = "" if found["logit_gap"] is None else f", logits {found['logit_gap']:.3g} apart"
    return f"prompt {found['prompt']}, answer token {found['position']}: {tokens}{gap}: {found['verdict']}"


def difference_warnings(found: Sequence[dict[str, Any]], prompts: int, dtype: str, differing: int) -> list[str]:
    """A warning if the outputs are not identical token for token.

    Args:
        found: entries of `verdict`.
        prompts: number of prompts.
        dtype: data type of the computation.
        differing: number of prompts whose answers differ; at least as many as ``found`` has entries.
    """
    if not found:
        return []
    wrong = [each for each in found if each["verdict"] == "wrong"]
    tie = NEAR_TIE.get(dtype, NEAR_TIE["bfloat16"])
    told = f"output differs from plain decoding on {differing} of {prompts} prompts (all numbers from 0): "
    if wrong:
        return [
            f"{told}{difference_text(wrong[0])}; {len(wrong)} of the {len(found)} examined are not near ties (logits "
            f"within {tie:g} in {dtype}), so verification or the engine's drafting is wrong there"
        ]
    if any(each["verdict"] == "unknown" for each in found):
        return [f"{told}{difference_text(found[0])}; the engine returned no logits; evaluate.dtype: float32 tells more"]
    widest = max(found, key=lambda each: each["logit_gap"])
    return [
        f"{told}{difference_text(widest)}, the widest of {len(found)}; all are near ties (logits within {tie:g} in "
        f"{dtype}), which rounding decides: nothing is wrong"
    ]
