"""Packs in hand, in a simulation of an engine: one pack is computed at a time, and each needs time around that."""

from __future__ import annotations

import heapq

import pytest

from specbatch.inference.pace import LEAST_IN_FLIGHT, MOST_IN_FLIGHT, Pace


def idle_share(
    pace: Pace, tokens_per_s: float, around_s: float, *, seconds: float = 60.0, warm_s: float = 20.0
) -> float:
    """Share of the time after ``warm_s`` in which the engine computes nothing.

    Args:
        around_s: from the end of a pack's computation until the engine has heard that it is stored and another one that
            was claimed for it can be computed.
    """
    each_s = pace.tokens_per_pack / tokens_per_s
    now, free_at, idle_s, in_hand = 0.0, 0.0, 0.0, 0
    settled: list[float] = []
    while now < seconds:
        while in_hand < pace.wanted:
            begin = max(now, free_at)
            if free_at > warm_s:
                idle_s += begin - free_at
            free_at = begin + each_s
            heapq.heappush(settled, free_at + around_s)
            in_hand += 1
        now = heapq.heappop(settled)
        in_hand -= 1
        pace.computed(pace.tokens_per_pack, now)
    return idle_s / (seconds - warm_s)


@pytest.mark.parametrize("tokens_per_s", [500, 5_000, 30_000, 120_000])
@pytest.mark.parametrize("around_s", [0.02, 0.15, 0.35])
def test_an_engine_is_never_idle_at_any_speed(tokens_per_s: int, around_s: float) -> None:
    assert idle_share(Pace(None, 4096), tokens_per_s, around_s) == pytest.approx(0, abs=1e-9)


def test_two_packs_would_leave_a_fast_engine_idle() -> None:
    """30k tokens/s, and as long as over TCP around each pack."""
    assert idle_share(Pace(2, 4096), 30_000, 0.35) > 0.3


def test_a_slow_engine_holds_no_more_than_it_needs() -> None:
    pace = Pace(None, 4096)
    idle_share(pace, 1_000, 0.1)
    assert pace.wanted == LEAST_IN_FLIGHT


def test_the_number_has_an_end_and_may_be_fixed() -> None:
    pace = Pace(None, 64)
    idle_share(pace, 1e6, 0.001, seconds=5.0, warm_s=1.0)
    assert pace.wanted == MOST_IN_FLIGHT == pace.most
    assert Pace(3, 64).wanted == Pace(3, 64).most == 3
