"""Window and engines, by examples: who computes which pack, and what becomes of it."""

from __future__ import annotations

from specbatch.dispatch.claims import VOID_LOSSES
from specbatch.dispatch.messages import (
    Begin,
    Claim,
    Done,
    Fault,
    Go,
    Heartbeat,
    Lost,
    Phase,
    Stored,
    Wait,
)
from specbatch.pack_manifest import Manifest
from tests.dispatch.cluster import (
    HEARTBEAT_S,
    Cluster,
    events,
    make_cluster,
    make_dispatcher,
    make_plan,
    manifest_of,
    order_of,
)


def test_nothing_is_handed_out_before_all_ranks_joined():
    cluster = make_cluster(joined=False)
    cluster.trained = [0, 0]
    assert cluster.claim("a", 4) == []
    cluster.join_rank(1, 0)
    assert cluster.ask(Claim("a", 4), last=False) is None
    cluster.join_rank(0, 0)
    assert len(cluster.claim("a", 4)) == 4


def test_claims_go_out_in_plan_order_towards_the_rank_that_trains_the_pack():
    cluster = make_cluster()
    granted = cluster.claim("a", 3) + cluster.claim("b", 5)
    assert [g.pack for g in granted] == order_of(cluster)[:8]
    for g in granted:
        step = cluster.plan.step_of(g.pack)
        rank = int(g.segment.split(".")[0][1:])
        assert g.pack in [pack.id for pack in cluster.packs_of(rank, step)]


def test_the_window_reaches_exactly_as_far_as_the_budget():
    cluster = make_cluster(segment_bytes=35)
    granted = cluster.claim("a", 100)
    sizes = {pack.id: cluster.plan.tokens(pack) for s in (1, 2, 3, 4) for pack in cluster.plan.packs(s)}
    used = sum(sizes[g.pack] for g in granted)
    following = order_of(cluster)[len(granted)]
    assert used <= 70 < used + sizes[following]
    assert cluster.claim("b", 100) == []


def test_a_step_that_can_never_be_stored_is_an_error_that_names_both_numbers():
    cluster = make_cluster(segment_bytes=8)
    report = cluster.dispatcher.report(0.0)
    needed = sum(cluster.plan.tokens(pack) for pack in cluster.plan.packs(1))
    assert report.phase is Phase.STOP
    assert str(needed) in report.error
    assert "holds 16" in report.error
    assert "store.bytes_per_rank" in report.error
    assert cluster.ask(Begin(0, 1)) == Go(False, Phase.STOP, report.error)


def test_a_killed_engine_loses_no_pack():
    cluster = make_cluster()
    lost = cluster.claim("a", 2)
    cluster.claim("b", 2)
    for _ in range(5):
        cluster.pass_time(HEARTBEAT_S)
        cluster.beat("b")
    assert [g.pack for g in cluster.claim("b", 2)] == [g.pack for g in lost]
    assert "silent" in events(cluster)


def test_an_engine_that_stays_away_is_no_longer_spoken_of():
    cluster = make_cluster()
    cluster.claim("a", 2)
    cluster.pass_time(5 * HEARTBEAT_S)
    assert [engine.name for engine in cluster.dispatcher.report(cluster.now).engines] == ["a"]
    cluster.pass_time(60 * HEARTBEAT_S)
    assert cluster.dispatcher.report(cluster.now).engines == ()
    cluster.finish("b")


def test_an_engine_keeps_its_claims_as_long_as_it_names_them():
    cluster = make_cluster()
    cluster.claim("a", 2)
    for _ in range(30):
        cluster.pass_time(HEARTBEAT_S)
        cluster.beat("a")
    assert len(cluster.claims["a"]) == 2


def test_a_claim_whose_grant_got_lost_on_the_way_comes_back():
    cluster = make_cluster()
    granted = cluster.dispatcher.handle(Claim("a", 2), cluster.now).granted
    for _ in range(3):
        cluster.pass_time(HEARTBEAT_S)
        cluster.ask(Heartbeat("a", (), "ready"))
    assert [g.pack for g in cluster.claim("a", 2)] == [g.pack for g in granted]


def test_an_engine_that_never_computes_loses_the_pack_to_another():
    plan = make_plan()
    cluster = Cluster(plan, make_dispatcher(plan, claim_timeout_s=10.0))
    cluster.join()
    (granted,) = cluster.claim("a", 1)
    cluster.claim("b", 1)
    for _ in range(11):
        cluster.pass_time(HEARTBEAT_S)
        cluster.beat("a")
        for other in list(cluster.claims["b"]):
            cluster.store("b", other)
        cluster.beat("b")
    assert cluster.claims["a"] == []
    assert cluster.claim("a", 1)[0].pack != granted.pack
    assert cluster.claim("b", 1)[0].pack == granted.pack


def test_what_is_lost_is_computed_again_before_anything_else():
    cluster = make_cluster()
    granted = cluster.claim("a", 4)
    for g in granted:
        cluster.store("a", g)
    cluster.ask(Lost(0, granted[1].pack, granted[1].claim, "bytes differ"))
    assert (granted[1].pack, granted[1].claim) not in cluster.objects
    again = cluster.claim("b", 1)[0]
    assert again.pack == granted[1].pack
    assert again.claim != granted[1].claim


def test_a_late_lost_about_an_older_claim_changes_nothing():
    cluster = make_cluster()
    old = cluster.claim("a", 1)[0]
    cluster.store("a", old)
    cluster.ask(Lost(0, old.pack, old.claim, "gone"))
    new = cluster.claim("a", 1)[0]
    cluster.store("a", new)
    cluster.ask(Lost(0, old.pack, old.claim, "gone"))
    assert cluster.dispatcher.report(0.0).stored == 1
    assert (new.pack, new.claim) in cluster.objects


def test_objects_of_a_claim_that_is_over_are_garbage():
    cluster = make_cluster()
    old = cluster.claim("a", 1)[0]
    cluster.pass_time(5 * HEARTBEAT_S)
    new = cluster.claim("b", 1)[0]
    assert new.pack == old.pack
    cluster.store("b", new)
    assert cluster.store("a", old) == Done()
    assert list(cluster.objects) == [(new.pack, new.claim)]


def test_what_a_dead_claim_left_behind_is_removed_when_the_pack_is_trained():
    cluster = make_cluster()
    old = cluster.claim("a", 1)[0]
    cluster.pass_time(5 * HEARTBEAT_S)
    cluster.put(old)
    cluster.finish("b")
    assert cluster.objects == {}


def test_a_pack_that_fails_on_two_engines_is_void():
    cluster = make_cluster()
    first = cluster.claim("a", 1)[0]
    cluster.beat("b")
    cluster.fail("a", first, why="not finite")
    assert cluster.claim("a", 1)[0].pack != first.pack
    second = cluster.claim("b", 1)[0]
    assert second.pack == first.pack
    cluster.fail("b", second, why="not finite either")
    report = cluster.dispatcher.report(0.0)
    assert report.void == ((first.pack, "a: not finite; b: not finite either"),)
    reply = cluster.ask(Wait(0, (first.pack,)))
    assert reply.void == report.void
    cluster.finish("c")


def test_a_pack_that_fails_three_times_on_the_only_engine_is_void():
    cluster = make_cluster()
    for _ in range(3):
        granted = cluster.claim("a", 1)[0]
        cluster.fail("a", granted)
    assert [pack for pack, _ in cluster.dispatcher.report(0.0).void] == [granted.pack]


def test_a_pack_that_is_stored_and_lost_over_and_over_is_void():
    cluster = make_cluster()
    for _ in range(VOID_LOSSES):
        granted = cluster.claim("a", 1)[0]
        cluster.store("a", granted)
        cluster.ask(Lost(0, granted.pack, granted.claim, "its bytes are not those that were stored"))
    ((pack, why),) = cluster.dispatcher.report(0.0).void
    assert pack == granted.pack == order_of(cluster)[0]
    assert why == "lost 10 times after it was stored, the last time: its bytes are not those that were stored"
    cluster.finish()


def test_a_void_pack_stays_void_when_the_ranks_start_again():
    cluster = make_cluster()
    for _ in range(3):
        cluster.fail("a", cluster.claim("a", 1)[0])
    cluster.join(0)
    assert order_of(cluster)[0] not in [g.pack for g in cluster.claim("a", 20)]


def test_failures_of_the_store_make_no_pack_void():
    cluster = make_cluster()
    first = order_of(cluster)[0]
    for _ in range(10):
        granted = cluster.claim("a", 1)[0]
        assert granted.pack == first
        cluster.fail("a", granted, Fault.OTHER)
        cluster.pass_time(1.1)
    assert cluster.dispatcher.report(0.0).void == ()


def test_a_store_that_is_full_too_early_makes_the_window_smaller():
    cluster = make_cluster(segment_bytes=50)
    granted = cluster.claim("a", 100)
    for g in granted[1:]:
        cluster.store("a", g)
    before = cluster.dispatcher.report(0.0)
    for _ in range(4):
        cluster.fail("a", granted[0], Fault.FULL)
        cluster.pass_time(1.1)
        granted[:1] = cluster.claim("a", 1)
    after = cluster.dispatcher.report(0.0)
    assert after.budget_bytes < before.budget_bytes
    assert after.stored < before.stored
    assert sum(cluster.objects.values()) <= after.budget_bytes
    assert after.void == ()
    cluster.finish()


def test_manifests_of_another_size_than_planned_are_failures():
    cluster = make_cluster()
    granted = cluster.claim("a", 1)[0]
    manifest = manifest_of(cluster.plan, granted)
    cluster.ask(Stored("a", (Manifest(granted.claim, granted.pack, manifest.chunks[:-1]),)))
    report = cluster.dispatcher.report(0.0)
    assert (report.stored, report.failed) == (0, 1)


def test_the_empty_packs_of_the_last_step_need_no_engine():
    cluster = make_cluster(samples=9, packs_per_step=4)
    last = cluster.plan.packs(cluster.plan.steps)
    assert any(not pack.samples for pack in last)
    cluster.finish()
    assert sorted(pack for _, pack in cluster.packs_trained) == sorted(order_of(cluster))
