"""Outputs that differ from plain decoding are explained."""

from __future__ import annotations

import pytest

from specbatch.evaluation.differences import (
    NEAR_TIE,
    Parting,
    difference_text,
    difference_warnings,
    partings,
    verdict,
)
from specbatch.evaluation.statistics import DecodedAnswers


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ([[1, 2], [4, 9, 6]], Parting(1, 1, 5, 9)),
        ([[1, 2], [4, 5]], Parting(1, 2, 6, None)),
        ([[], [4, 5, 6]], Parting(0, 0, 1, None)),
    ],
)
def test_the_first_difference_of_a_prompt_is_found(other, expected):
    assert partings(DecodedAnswers([[1, 2], [4, 5, 6]], 1.0), DecodedAnswers(other, 1.0)) == [expected]


def test_equal_outputs_part_nowhere_and_give_no_warning():
    assert partings(DecodedAnswers([[1, 2]], 1.0), DecodedAnswers([[1, 2]], 2.0)) == []
    assert difference_warnings([], 1, "float32", 0) == []


@pytest.mark.parametrize("dtype", NEAR_TIE)
def test_a_near_tie_is_rounding_and_a_wide_gap_is_not(dtype):
    near, wide = (7.0, 7.0 + 0.9 * NEAR_TIE[dtype]), (7.0, 7.0 - 1.1 * NEAR_TIE[dtype])
    parting = Parting(3, 17, 5, 9)
    assert verdict(parting, near, dtype)["verdict"] == "rounding"
    assert verdict(parting, wide, dtype)["verdict"] == "wrong"
    assert verdict(parting, wide, dtype)["logit_gap"] == pytest.approx(1.1 * NEAR_TIE[dtype])


def test_an_answer_that_ends_early_is_wrong_and_without_logits_nothing_is_known():
    assert verdict(Parting(3, 17, 5, None), None, "bfloat16")["verdict"] == "wrong"
    assert verdict(Parting(3, 17, 5, 9), None, "bfloat16")["verdict"] == "unknown"


def test_a_difference_is_told_with_place_tokens_gap_and_verdict():
    found = verdict(Parting(3, 17, 5, 9), (7.0, 6.988), "bfloat16")
    assert difference_text(found) == "prompt 3, answer token 17: plain 5, speculative 9, logits 0.012 apart: rounding"
    found = verdict(Parting(3, 17, None, 9), None, "bfloat16")
    assert difference_text(found) == "prompt 3, answer token 17: plain ended, speculative 9: wrong"


def test_the_warning_says_whether_anything_is_wrong():
    tie = verdict(Parting(1, 2, 5, 9), (7.0, 6.9), "bfloat16")
    wider = verdict(Parting(2, 0, 5, 9), (7.0, 6.8), "bfloat16")
    wrong = verdict(Parting(4, 3, 5, 9), (7.0, 3.0), "bfloat16")
    [told] = difference_warnings([tie, wider], 40, "bfloat16", 2)
    assert "on 2 of 40 prompts" in told
    assert "prompt 2" in told
    assert told.endswith("nothing is wrong")
    [told] = difference_warnings([tie, wrong], 40, "bfloat16", 2)
    assert "prompt 4, answer token 3" in told
    assert "1 of the 2 examined are not near ties" in told
    unknown = verdict(Parting(3, 17, 5, 9), None, "bfloat16")
    [told] = difference_warnings([unknown], 40, "bfloat16", 1)
    assert "evaluate.dtype: float32 tells more" in told
