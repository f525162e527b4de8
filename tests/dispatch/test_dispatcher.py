"""Ranks and steps, by examples; `test_properties.py` has what holds in any order of events."""

from __future__ import annotations

import pytest

from specbatch.dispatch.messages import (
    Beat,
    Begin,
    Claim,
    Claims,
    Done,
    Drain,
    Failed,
    Fault,
    Go,
    Heartbeat,
    Join,
    Lost,
    Packs,
    Phase,
    Refused,
    StatusRequest,
    Stored,
    Trained,
    Trouble,
    Wait,
)
from tests.dispatch.cluster import (
    Cluster,
    make_cluster,
    make_dispatcher,
    make_plan,
    manifest_of,
    order_of,
)


def test_a_step_begins_when_its_packs_are_there_and_not_earlier():
    cluster = make_cluster()
    granted = cluster.claim("a", 4)
    for g in granted[:3]:
        cluster.store("a", g)
    assert cluster.ask(Begin(0, 1), last=False) is None
    reply = cluster.ask(Begin(0, 1))
    assert (reply.go, reply.phase) == (False, Phase.WORK)
    cluster.store("a", granted[3])
    assert cluster.ask(Begin(0, 1), last=False) == Go(True, Phase.WORK)


def test_held_out_packs_come_first_and_the_first_step_waits_for_them_every_time_that_ranks_start():
    cluster = make_cluster(heldout=3)
    for step in (0, 2):
        cluster.join(step)
        held = cluster.claim("a", 3)
        assert [granted.pack for granted in held] == [(-1, 0), (-1, 1), (-1, 2)]
        assert [granted.segment[:2] for granted in held] == ["s0", "s1", "s0"]
        for granted in cluster.claim("a", 4) + held[:2]:
            cluster.store("a", granted)
        assert cluster.ask(Begin(0, step + 1), last=False) is None
        cluster.store("a", held[2])
        assert cluster.ask(Begin(0, step + 1)).go
        assert cluster.train(0)
        assert cluster.train(1)
        assert cluster.objects == {}
        assert isinstance(cluster.ask(Wait(0, ((-1, 0),))), Refused)
        assert (-1, 0) not in [granted.pack for granted in cluster.claim("a", 4)]


def test_held_out_packs_count_for_the_store_beside_the_first_step():
    cluster = make_cluster(heldout=3, segment_bytes=20)
    report = cluster.dispatcher.report(0.0)
    assert "18 of them for held-out packs" in report.error
    assert make_cluster(segment_bytes=20).dispatcher.report(0.0).error == ""


def test_once_one_rank_was_let_in_all_are_even_when_draining_and_with_a_pack_lost():
    cluster = make_cluster()
    granted = cluster.claim("a", 4)
    for g in granted:
        cluster.store("a", g)
    assert cluster.ask(Begin(0, 1)).go
    cluster.ask(Drain("SIGTERM"))
    cluster.ask(Lost(1, granted[2].pack, granted[2].claim, "gone"))
    assert cluster.ask(Begin(1, 1)) == Go(True, Phase.STOP)
    (again,) = cluster.claim("a", 8)
    assert again.pack == granted[2].pack
    cluster.store("a", again)
    # All packs are there, but until they are trained each may be lost once more.
    assert cluster.ask(Claim("a", 8)) == Claims((), Phase.WORK)
    cluster.ask(Lost(1, again.pack, again.claim, "gone again"))
    (third,) = cluster.claim("a", 8)
    assert third.pack == again.pack
    cluster.store("a", third)
    assert cluster.train(0)
    assert cluster.ask(Claim("a", 8)) == Claims((), Phase.WORK)
    assert cluster.train(1)
    assert cluster.ask(Claim("a", 8)) == Claims((), Phase.STOP)
    assert cluster.ask(Begin(0, 2)) == Go(False, Phase.STOP, "SIGTERM")


def test_draining_lets_nobody_into_a_new_step_and_engines_leave():
    cluster = make_cluster()
    cluster.claim("a", 1)
    cluster.ask(Drain("time limit"))
    assert cluster.ask(Claim("a", 1), last=False) == Claims((), Phase.STOP)
    assert cluster.ask(Heartbeat("a", (), "ready")) == Beat(Phase.STOP, ())
    assert cluster.ask(Begin(0, 1), last=False) == Go(False, Phase.STOP, "time limit")


def test_a_waiting_rank_is_told_once_at_once_that_all_stop():
    cluster = make_cluster()
    wanted = tuple(order_of(cluster)[:4])
    assert cluster.ask(Wait(0, wanted), last=False) is None
    cluster.ask(Drain("enough"))
    assert cluster.ask(Wait(0, wanted), last=False) == Packs((), (), Phase.STOP)
    assert cluster.ask(Wait(0, wanted), last=False) is None


def test_waiting_is_answered_by_what_is_there():
    cluster = make_cluster()
    wanted = tuple(order_of(cluster)[:4])
    granted = cluster.claim("a", 2)
    cluster.store("a", granted[1])
    reply = cluster.ask(Wait(1, wanted), last=False)
    assert [m.pack for m in reply.stored] == [granted[1].pack]
    assert cluster.dispatcher.report(0.0).waiting == ((1, wanted[0]),)


def test_ranks_that_start_again_rewind_the_window():
    cluster = make_cluster()
    while min(cluster.trained) < 3:
        for g in cluster.claim("a", 4):
            cluster.store("a", g)
        for rank in (0, 1):
            cluster.train(rank)
    cluster.claim("a", 2)
    cluster.join(1)
    report = cluster.dispatcher.report(0.0)
    assert (report.step, report.stored, report.claimed) == (1, 0, 0)
    assert [g.pack for g in cluster.claim("b", 2)] == order_of(cluster)[4:6]
    cluster.beat("a")
    assert cluster.claims["a"] == []
    cluster.finish()
    assert [step for step, _ in cluster.packs_trained].count(2) == 4


def test_a_rank_that_joins_twice_in_a_row_joined_once():
    cluster = make_cluster()
    cluster.store("a", cluster.claim("a", 1)[0])
    assert cluster.join_rank(1, 0) == Done()
    assert cluster.dispatcher.report(0.0).stored == 1


def test_a_rank_that_joins_again_after_it_worked_starts_a_new_world():
    cluster = make_cluster()
    cluster.store("a", cluster.claim("a", 1)[0])
    cluster.ask(Begin(1, 1))
    cluster.ask(Join(1, 2, "other memory", 100, 0, cluster.generation))
    assert cluster.dispatcher.report(0.0).ranks == 1
    assert isinstance(cluster.ask(Begin(0, 1)), Refused)
    cluster.join_rank(0, 0)
    cluster.finish()


def test_a_join_that_comes_again_after_the_rank_worked_changes_nothing():
    cluster = make_cluster()
    cluster.store("a", cluster.claim("a", 1)[0])
    cluster.ask(Begin(1, 1))
    assert cluster.join_rank(1, 0) == Done()
    assert cluster.dispatcher.report(0.0).stored == 1
    cluster.finish()


def test_what_a_rank_of_an_earlier_generation_said_last_is_refused():
    cluster = make_cluster()
    cluster.join(0)
    assert isinstance(cluster.dispatcher.handle(Trained(0, 1, cluster.generation - 1), 0.0), Refused)
    cluster.finish()


def test_a_straggler_of_an_earlier_generation_is_refused():
    cluster = make_cluster()
    cluster.join(0)
    assert isinstance(cluster.ask(Join(0, 2, "old", 100, 0, generation=1)), Refused)
    assert cluster.dispatcher.report(0.0).ranks == 2


def test_a_world_that_never_got_complete_gives_way_to_the_next_generation():
    cluster = make_cluster(joined=False)
    cluster.generation = 1
    cluster.join_rank(0, 0)
    cluster.join(0, generation=2)
    assert cluster.dispatcher.report(0.0).ranks == 2
    cluster.finish()


@pytest.mark.parametrize(
    "request_",
    [
        Join(2, 2, "s", 100, 0, 9),
        Join(0, 3, "s", 100, 0, 9),
        Join(0, 2, "s", 100, 999, 9),
        Claim("a", 0),
        Begin(0, 3),
        Begin(7, 1),
        Trained(0, 1),
        Wait(0, ((5, 0),)),
    ],
    ids=lambda r: repr(r)[:40],
)
def test_requests_that_make_no_sense_are_refused(request_):
    assert isinstance(make_cluster().ask(request_), Refused)


def test_every_message_may_come_twice():
    cluster = make_cluster()
    granted = cluster.claim("a", 4)
    for g in granted:
        cluster.store("a", g)
        cluster.ask(Stored("a", (manifest_of(cluster.plan, g),)))
    assert cluster.dispatcher.report(0.0).stored == 4
    assert len(cluster.objects) == 4
    for rank in (0, 1):
        assert cluster.train(rank)
        assert cluster.ask(Trained(rank, 1)) == Done()
        assert cluster.ask(Begin(rank, 1)).go
    other = cluster.claim("a", 1)[0]
    cluster.fail("a", other, Fault.OTHER)
    cluster.ask(Failed("a", other.claim, "broken"))
    assert cluster.dispatcher.report(0.0).failed == 1


def test_when_all_steps_are_trained_everybody_hears_it():
    cluster = make_cluster(samples=12)
    cluster.finish()
    assert cluster.ask(Claim("a", 1), last=False) == Claims((), Phase.TRAINED)
    assert cluster.ask(Heartbeat("a", (), "ready")).phase is Phase.TRAINED
    cluster.ask(Drain("late"))
    assert cluster.dispatcher.phase is Phase.TRAINED


def test_ranks_that_died_after_the_last_step_bring_the_work_back():
    cluster = make_cluster(samples=12)
    cluster.finish()
    cluster.join(cluster.plan.steps - 1)
    assert cluster.dispatcher.phase is Phase.WORK
    cluster.finish()


def test_several_epochs_and_any_number_of_ranks_train_the_same_packs():
    orders = []
    for ranks in (1, 2, 4):
        plan = make_plan(samples=10, packs_per_step=4, epochs=3)
        cluster = Cluster(plan, make_dispatcher(plan), ranks=ranks)
        cluster.join()
        cluster.finish()
        orders.append(sorted(cluster.packs_trained))
    assert orders[0] == orders[1] == orders[2]


def test_troubles_are_told_until_they_are_over():
    cluster = make_cluster()
    for why in ("disk full", "disk fuller"):
        assert cluster.ask(Trouble("snapshot", why)) == Done()
        assert cluster.ask(StatusRequest()).troubles == (("snapshot", why),)
    cluster.ask(Trouble("snapshot", ""))
    assert cluster.ask(StatusRequest()).troubles == ()
