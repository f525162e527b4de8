"""When an attempt is taken for stalled."""

from __future__ import annotations

import msgspec

from specbatch.dispatch.messages import EngineReport, Phase, Report
from specbatch.run.stall import Stall

NOTHING = Report(
    phase=Phase.WORK, why="", step=3, steps=9, free=1, claimed=1, stored=0, stored_bytes=0, budget_bytes=1, engines=(),
    ranks=1, waiting=((0, (0, 5)),), lost=0, failed=0, void=(),
)  # fmt: skip


def report(*states: str, **more: object) -> Report:
    engines = tuple(EngineReport(f"engine-{n}", state, 1, 0.2, 0.0, 4) for n, state in enumerate(states))
    return msgspec.structs.replace(NOTHING, engines=engines, **more)


def test_who_waits_for_whom_is_said_when_nothing_moves_for_too_long():
    stall = Stall(10.0, 0.0)
    assert stall.look(report("ready"), 5.0) == ""
    assert stall.look(report("ready"), 14.9) == ""
    assert stall.look(report("ready"), 15.0) == (
        "no progress for 10 s: rank 0 waits for pack 0.5; engine engine-0 is ready with 1 packs, heard 0 s ago"
    )
    assert Stall(10.0, 0.0).look(report("ready"), 10.0) == ""
    silent = Stall(10.0, 0.0)
    nobody = report(waiting=(), step=0, ranks=0)
    silent.look(nobody, 0.0)
    assert silent.look(nobody, 10.0) == "no progress for 10 s: no engine and no rank has reported"


def test_every_step_pack_and_rank_is_progress():
    stall = Stall(10.0, 0.0)
    for now, more in enumerate([{"step": 4}, {"step": 4, "stored": 1}, {"step": 4, "stored": 1, "ranks": 2}], 1):
        assert stall.look(report("ready", **more), 9.0 * now) == ""


def test_engines_that_start_are_waited_for_unless_another_one_is_ready_or_they_are_gone():
    for states, stalls in ((("starting", "restarting"), False), (("starting", "ready"), True)):
        stall = Stall(10.0, 0.0)
        stall.look(report(*states), 0.0)
        assert bool(stall.look(report(*states), 1000.0)) == stalls
    gone = report("starting")
    gone = msgspec.structs.replace(gone, engines=(msgspec.structs.replace(gone.engines[0], last_heard_s=99.0),))
    stall = Stall(10.0, 0.0)
    stall.look(gone, 0.0)
    assert stall.look(gone, 1000.0)
