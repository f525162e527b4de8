"""In any order of claims, deaths, losses, joins, rewinds and messages that come twice, every pack is trained once."""

from __future__ import annotations

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from specbatch.dispatch.messages import Begin, Claim, Fault, Heartbeat, Join, Lost, Stored, Trained
from tests.dispatch.cluster import HEARTBEAT_S, Cluster, make_dispatcher, make_plan, manifest_of

ENGINES = "abc"


class AnyOrder:
    """Everything that may happen to a dispatcher; each event takes a number that decides its details."""

    def __init__(self, samples: int, packs_per_step: int, epochs: int, segment_bytes: int, heldout: int) -> None:
        plan = make_plan(samples, packs_per_step, epochs, heldout)
        self.cluster = Cluster(plan, make_dispatcher(plan, claim_timeout_s=30.0), segment_bytes=segment_bytes)
        self.go: dict[tuple[int, int], bool] = {}
        self.sent: list = []
        self.failures = 0
        self.cluster.join(0)

    def an_engine_claims(self, n: int) -> None:
        self.cluster.claim(ENGINES[n % 3], 1 + n // 3 % 6)

    def an_engine_claims_and_the_answer_is_lost(self, n: int) -> None:
        reply = self.cluster.ask(Claim(ENGINES[n % 3], 1 + n // 3 % 3))
        assert not self.cluster.given.intersection(granted.claim for granted in reply.granted)
        self.cluster.given.update(granted.claim for granted in reply.granted)

    def an_engine_stores(self, n: int) -> None:
        if held := self._held():
            engine, granted = held[n % len(held)]
            self.sent.append(Stored(engine, (manifest_of(self.cluster.plan, granted),)))
            self.cluster.store(engine, granted)

    def an_engine_fails(self, n: int) -> None:
        if held := self._held():
            engine, granted = held[n // 4 % len(held)]
            fault = (Fault.PACK, Fault.OTHER, Fault.FULL, Fault.FULL)[n % 4]
            self.failures += fault is Fault.PACK
            self.cluster.fail(engine, granted, fault)

    def an_engine_beats(self, n: int) -> None:
        self.cluster.beat(ENGINES[n % 3])

    def an_engine_starts_again_and_knows_of_nothing(self, n: int) -> None:
        self.cluster.claims[ENGINES[n % 3]] = []
        self.cluster.ask(Heartbeat(ENGINES[n % 3], (), "starting"))

    def an_engine_dies_having_stored_in_silence(self, n: int) -> None:
        if held := self._held():
            engine, granted = held[n % len(held)]
            in_play = self.cluster.dispatcher._window.entries
            if granted.pack in in_play or self.cluster.plan.step_of(granted.pack) > min(self.cluster.trained):
                self.cluster.put(granted)
            del self.cluster.claims[engine]

    def time_passes(self, n: int) -> None:
        self.cluster.pass_time((n % 60) / 10 * HEARTBEAT_S)

    def a_rank_trains(self, n: int) -> None:
        rank = n % 2
        step = self.cluster.trained[rank] + 1
        if self.cluster.train(rank):
            self.sent += [Begin(rank, step), Trained(rank, step)]

    def a_rank_asks_to_begin(self, n: int) -> None:
        step = self.cluster.trained[n % 2] + 1
        if step <= self.cluster.plan.steps:
            go = self.cluster.ask(Begin(n % 2, step)).go
            assert go or not self.go.get((self.cluster.generation, step), False)
            self.go[self.cluster.generation, step] = go

    def the_store_loses_an_object(self, n: int) -> None:
        if self.cluster.objects:
            del self.cluster.objects[sorted(self.cluster.objects)[n % len(self.cluster.objects)]]

    def a_rank_says_that_something_is_lost(self, n: int) -> None:
        if self.cluster.objects:
            pack, claim = sorted(self.cluster.objects)[n // 2 % len(self.cluster.objects)]
            self.sent.append(Lost(n % 2, pack, claim, "bytes differ"))
            self.cluster.ask(self.sent[-1])

    def the_ranks_start_again(self, n: int) -> None:
        step = max(0, min(self.cluster.trained) - n % 4)
        if n % 3 == 0:
            self.cluster.generation += 1
            self.cluster.join_rank(1, step)
        self.cluster.join(step)
        self.sent.append(Join(0, 2, "an older one", 90, 0, self.cluster.generation - 1))

    def an_old_message_comes_again(self, n: int) -> None:
        if self.sent:
            self.cluster.ask(self.sent[n % len(self.sent)])

    def check(self) -> None:
        """Invariants that hold at any time."""
        window = self.cluster.dispatcher._window
        in_use = sum(entry.bytes for entry in window.entries.values() if entry.claim)
        assert in_use <= window.reserved <= window.capacity <= 2 * self.cluster.segment_bytes
        assert window.reserved == sum(entry.bytes for entry in window.entries.values())
        report = self.cluster.dispatcher.report(self.cluster.now)
        assert sum(engine.claims for engine in report.engines) == report.claimed

    def finish(self) -> None:
        """Without further faults, everything is trained once, and nothing stays in the store."""
        cluster = self.cluster
        for engine, granted in self._held():
            cluster.store(engine, granted)
        cluster.pass_time(30 * HEARTBEAT_S)
        cluster.finish()
        steps = range(1, cluster.plan.steps + 1)
        expected = [(step, pack.id) for step in steps for pack in cluster.plan.packs(step)]
        assert sorted(cluster.packs_trained) == sorted(expected)
        if cluster.plan.heldout:
            assert sorted(pack for held in cluster.kept for pack in held) == [p.id for p in cluster.plan.heldout]
        assert cluster.objects == {}
        assert len(cluster.dispatcher.report(0.0).void) <= self.failures / 2

    def _held(self) -> list:
        return [(engine, granted) for engine, held in sorted(self.cluster.claims.items()) for granted in held]


USUAL = ("an_engine_claims", "an_engine_stores", "an_engine_beats", "a_rank_trains", "time_passes")
EVENTS = [name for name in vars(AnyOrder) if not name.startswith("_") and name not in ("check", "finish")]


CLAIM = ("an_engine_claims", 0)
PACKS_THAT_LEFT_A_FULL_STORE_BEFORE_ALL_RANKS_STARTED_AGAIN = [
    *[CLAIM] * 2, ("an_engine_claims", 3), ("an_engine_claims", 292), CLAIM,
    ("an_engine_starts_again_and_knows_of_nothing", 0), ("an_engine_fails", 2), ("the_ranks_start_again", 0),
    ("an_engine_dies_having_stored_in_silence", 0),
]  # fmt: skip


@example(12, 2, 1, 20, 3, PACKS_THAT_LEFT_A_FULL_STORE_BEFORE_ALL_RANKS_STARTED_AGAIN)
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    samples=st.integers(5, 40),
    packs_per_step=st.sampled_from([2, 4]),
    epochs=st.integers(1, 2),
    segment_bytes=st.integers(20, 90),
    heldout=st.integers(0, 3),
    events=st.lists(st.tuples(st.sampled_from([*USUAL * 3, *EVENTS]), st.integers(0, 9999)), min_size=60, max_size=120),
)
def test_every_pack_is_trained_once_whatever_happens(samples, packs_per_step, epochs, segment_bytes, heldout, events):
    run = AnyOrder(samples, packs_per_step, epochs, segment_bytes, heldout)
    if run.cluster.dispatcher.report(0.0).error:
        return
    for name, n in events:
        getattr(run, name)(n)
        run.check()
    run.finish()
