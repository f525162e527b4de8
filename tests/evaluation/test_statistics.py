from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specbatch.evaluation.statistics import (
    DecodedAnswers,
    acceptance_length,
    acceptance_rate,
    disagreements,
    intervals,
    measure,
)

HEALTHY = [0.504, 0.268, 0.170]
"""Acceptance rates of 607 verify steps, after a training that ended with the accuracies below (facts from a real
run)."""
ACCURACY = [0.46, 0.41, 0.37, 0.33]


def test_acceptance_length_counts_the_bonus_token_and_not_the_prefill():
    assert acceptance_length([10, 0, 0, 0]) == 1.0
    assert acceptance_length([301, 143, 60, 103]) == pytest.approx(1.942, abs=1e-3)


def test_acceptance_length_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="verify step"):
        acceptance_length([0, 0])


def test_a_position_is_accepted_where_all_before_it_are():
    assert acceptance_rate([5, 3, 0, 2], 3) == [0.5, 0.2, 0.2]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=9).filter(any))
def test_acceptance_length_is_one_and_the_sum_of_the_rates(histogram):
    assert acceptance_length(histogram) == pytest.approx(1 + sum(acceptance_rate(histogram, len(histogram) - 1)))


def test_measure_compares_token_for_token():
    plain = DecodedAnswers([[5, 6, 7], [8]], 2.0)
    speculative = DecodedAnswers([[5, 6, 9], [8]], 1.0, (1, 1))
    found = measure(plain, speculative, draft_tokens=3)
    assert (found["prompts"], found["identical"], found["output_tokens"]) == (2, 1, 4)
    assert (found["tokens_per_s_plain"], found["tokens_per_s_speculative"]) == (2.0, 4.0)
    assert found["accepted_histogram"] == [1, 1, 0, 0]
    assert found["acceptance_rate"] == [0.5, 0.0, 0.0]
    assert found["acceptance_length"] == 1.5


def test_intervals_come_from_prompts_drawn_anew():
    """With 200 answers of 20 verify steps each, the intervals of both positions hold what the steps were drawn with."""
    rng = np.random.default_rng(1)
    answers = rng.multinomial(20, [0.5, 0.3, 0.2], size=200)
    length, rates = intervals(answers.tolist())
    assert length[0] < 1.7 < length[1]
    assert rates[0][0] < 0.5 < rates[0][1]
    assert rates[1][0] < 0.2 < rates[1][1]
    assert length[1] - length[0] == pytest.approx(2 * 1.96 * (0.61 / 4000) ** 0.5, rel=0.2)
    assert intervals(answers.tolist()) == (length, rates), "the same every time"


def test_answers_that_are_alike_count_as_what_they_are():
    """Ten answers that each accept all or nothing say less than a hundred steps would."""
    length, _ = intervals([[10, 0], [0, 10]] * 5)
    assert length[1] - length[0] > 0.5


def test_one_answer_says_nothing_of_others():
    assert intervals([[3, 2], [0, 0]]) is None


def test_a_healthy_draft_gives_no_warning():
    assert disagreements(HEALTHY, ACCURACY, 607) == []


def test_a_draft_that_reads_the_wrong_layers_is_noticed_once():
    [warning] = disagreements([0.05, 0.0, 0.0], ACCURACY, 900)
    assert "draft 1 was accepted in 5% of 900 verify steps" in warning
    assert "accuracy of 46%" in warning
    for cause in ("eagle_aux_hidden_state_layer_ids", "d2t", "target", "prompts unlike the training data"):
        assert cause in warning


def test_a_draft_that_goes_wrong_after_its_first_token_is_noticed():
    [warning] = disagreements([0.5, 0.02, 0.0], ACCURACY, 900)
    assert "draft 2 was accepted in 4% of 450 verify steps" in warning
    assert "rope_theta" in warning


def test_an_acceptance_far_above_training_is_noticed():
    [warning] = disagreements([0.9, 0.8, 0.7], ACCURACY, 900)
    assert "also in the training data" in warning


@pytest.mark.parametrize("rate", [[0.2, 0.0], [0.8, 0.6]])
def test_few_verify_steps_prove_nothing(rate):
    assert disagreements(rate, ACCURACY, 5) == []


@pytest.mark.parametrize("accuracy", [[], [0.005, 0.005]])
def test_a_draft_that_is_never_right_is_noticed_whatever_training_says(accuracy):
    [warning] = disagreements([0.001, 0.0], accuracy, 1000)
    assert "accepted in 0.1% of 1000 verify steps, no more than with random weights" in warning


@pytest.mark.parametrize(("rate", "accuracy"), [([], ACCURACY), (HEALTHY, []), ([0.0, 0.0], [])])
def test_nothing_to_compare_gives_no_warning(rate, accuracy):
    assert disagreements(rate, accuracy, 40) == []
