"""The drafted tokens of an answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specbatch.evaluation.transcripts import MOST_TOKENS, PROMPT_CHARACTERS, VerifyStep, answer, steps_of

MOST = 3


@given(st.lists(st.integers(0, MOST), max_size=12), st.integers(0, MOST))
def test_steps_are_found_again_from_lengths_and_histogram(accepted, cut):
    """This holds for an engine's output of any answer, whose last step may be cut off."""
    sizes = [1, *(count + 1 for count in accepted)]
    if len(sizes) > 1:
        sizes[-1] = max(1, sizes[-1] - cut)
    lengths = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    tokens = list(range(lengths[-1]))
    found = steps_of(lengths, tokens, [accepted.count(count) for count in range(MOST + 1)])
    assert found is not None
    assert [step.accepted for step in found] == [0, *accepted]
    assert [token for step in found for token in step.tokens] == tokens


@pytest.mark.parametrize(
    ("lengths", "histogram"),
    [([1, 3, 6], [0, 1, 0, 1]), ([1, 5], [0, 1, 1]), ([1, 2], []), ([], []), ([1, 2, 4], [1, 1])],
)
def test_what_does_not_add_up_is_not_told(lengths, histogram):
    assert steps_of(lengths, list(range(5)), histogram) is None


def test_an_answer_is_kept_as_text_of_bounded_length(tiny_target):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    ids = tokenizer("Größe 世界 </script>", add_special_tokens=False)["input_ids"]
    kept = answer(tokenizer, ids * 200, [VerifyStep(ids[:1], 0), VerifyStep(ids[1:4], 2), VerifyStep(ids[4:], 3)])
    assert "".join(text for step in kept["steps"] for text in step["tokens"]) == tokenizer.decode(ids)
    assert [len(step["tokens"]) for step in kept["steps"]] == [1, 3, len(ids) - 4]
    assert [step["accepted"] for step in kept["steps"]] == [0, 2, 3]
    assert len(kept["prompt"]) == PROMPT_CHARACTERS + 1
    long = answer(tokenizer, ids, [VerifyStep([ids[0]] * 50, 3)] * 100)
    assert sum(len(step["tokens"]) for step in long["steps"]) == MOST_TOKENS
