"""Engines or ranks that wait most of the time are reported, with a remedy; occasional waiting is not."""

from __future__ import annotations

import msgspec
import pytest

from specbatch.dispatch.messages import EngineReport, Phase
from specbatch.run.idle import Idle
from tests.run.test_stall import NOTHING


def told(waiting: float, idle: float, seconds: int = 300, **more: object) -> list[str]:
    """Return the reports of each second if ranks and engines wait for these shares of each ten seconds."""
    alarm, said = Idle(100.0), []
    for second in range(seconds):
        claims = 0 if second % 10 < 10 * idle else 2
        report = msgspec.structs.replace(
            NOTHING,
            engines=(EngineReport("engine-0", "ready", claims, 0.2, 0.0, second),),
            waiting=((0, (0, 5)),) if second % 10 < 10 * waiting else (),
            **more,
        )
        said.append(alarm.look(report, float(second)))
    return said


def test_ranks_that_wait_and_engines_that_idle_are_told_after_the_set_time():
    ranks = told(0.8, 0.0)
    assert not any(ranks[:100])
    assert ranks[-1].startswith("ranks wait for packs ")
    assert "scale RUN --engines +1" in ranks[-1]
    assert told(0.0, 0.9)[-1].startswith("engines are idle ")


@pytest.mark.parametrize("more", [{}, {"phase": Phase.STOP}, {"ranks": 0}])
def test_a_balanced_run_and_one_that_starts_or_ends_say_nothing(more):
    assert not any(told(0.8 if more else 0.3, 0.3, **more))
