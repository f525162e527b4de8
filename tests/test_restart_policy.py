"""The number of restarts that the policy allows."""

from __future__ import annotations

from specbatch.restart_policy import RestartPolicy


def test_what_dies_is_started_again_so_often_without_progress() -> None:
    policy = RestartPolicy(reached=7, most=2)
    assert [policy.again(7) for _ in range(3)] == [True, True, False]
    assert policy.restarts == 3


def test_a_step_that_was_never_trained_before_is_progress_and_one_trained_again_is_not() -> None:
    policy = RestartPolicy(reached=0, most=1)
    assert policy.again(5)
    assert policy.again(6)
    assert not policy.again(6)
    assert not policy.again(4)
