"""How often something is started again."""

from __future__ import annotations

from specbatch.patience import Patience


def test_what_dies_is_started_again_so_often_without_progress() -> None:
    patience = Patience(reached=7, most=2)
    assert [patience.again(7) for _ in range(3)] == [True, True, False]
    assert patience.restarts == 3


def test_a_step_that_was_never_trained_before_is_progress_and_one_trained_again_is_not() -> None:
    patience = Patience(reached=0, most=1)
    assert patience.again(5)
    assert patience.again(6)
    assert not patience.again(6)
    assert not patience.again(4)
