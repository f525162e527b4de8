"""A plan of recorded steps: which they are, and that ranks come through it without an engine."""

from __future__ import annotations

import numpy as np

from specbatch.dispatch.dispatcher import Dispatcher
from specbatch.dispatch.messages import Begin, Go, Join, Phase, Trained
from specbatch.plan import Plan
from specbatch.recorded_plan import RecordedPlan, RecordingSource

PLAN = Plan(np.full(24, 8), seed=0, epochs=1, tokens_per_pack=16, packs_per_step=2)


def test_the_recorded_steps_come_over_and_over_in_their_order():
    plan = RecordedPlan(PLAN, RecordingSource("run", first=2, count=3), epochs=2)
    assert plan.steps == 6
    assert [plan.packs(step) for step in range(1, 7)] == [PLAN.packs(step) for step in (2, 3, 4, 2, 3, 4)]
    assert [plan.assign(step, 2) for step in (1, 4)] == [PLAN.assign(2, 2)] * 2
    assert plan.step_of(PLAN.packs(3)[0].id) == 2
    assert plan.fingerprint == PLAN.fingerprint | {"recorded": {"first": 2, "count": 3, "epochs": 2}}


def test_ranks_come_to_the_last_step_without_an_engine_also_from_a_step_before():
    plan = RecordedPlan(PLAN, RecordingSource("run", first=4, count=1), epochs=7)
    dispatcher = Dispatcher(plan, steps=5, bytes_of=lambda pack: 0, usable=lambda size: size, heartbeat_s=1.0)

    def train(first: int, last: int, generation: int) -> None:
        for rank in (0, 1):
            dispatcher.handle(Join(rank, 2, "", 0, first - 1, generation), 0.0)
        for step in range(first, last + 1):
            for rank in (0, 1):
                assert dispatcher.handle(Begin(rank, step, generation), 0.0) == Go(True, Phase.WORK)
            for rank in (0, 1):
                dispatcher.handle(Trained(rank, step, generation), 0.0)

    train(1, 3, generation=0)
    train(2, 5, generation=1)
    assert dispatcher.phase is Phase.TRAINED
    assert dispatcher.report(0.0).step == 5
