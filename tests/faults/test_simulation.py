"""Simulated clusters under faults: see `tests.faults.simulation` for what must hold."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.faults.attempt import FAULTS
from tests.faults.simulation import Stats, simulate


def all_of(seed: int, faults: int) -> Stats:
    *_, stats = simulate(seed, faults)
    return stats


def test_the_plan_is_trained_whatever_happens() -> None:
    stats = all_of(seed=1, faults=1500)
    assert stats.faults.total() >= 1500
    assert set(stats.faults) == set(FAULTS)
    assert stats.retrained


def test_a_simulation_follows_from_its_seed() -> None:
    first, second = all_of(seed=5, faults=200), all_of(seed=5, faults=200)
    assert first == second
    assert first.faults != all_of(seed=6, faults=200).faults != Counter()


@pytest.mark.light
def test_the_plan_is_trained_through_twenty_thousand_faults() -> None:
    assert all_of(seed=2, faults=20_000).faults.total() >= 20_000
