"""In any order of claims, deaths, losses, joins, rewinds and messages that come twice, every pack is trained once."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from specbatch.dispatch.messages import Begin, Claim, Fault, Heartbeat, Join, Lost, Stored, Trained
from tests.dispatch.cluster import HEARTBEAT_S, Cluster, make_dispatcher, make_plan, manifest_of

ENGINES = st.sampled_from(["a", "b", "c"])


class AnyOrder(RuleBasedStateMachine):
    """Everything that may happen to a dispatcher."""

    @initialize(
        samples=st.integers(5, 40),
        packs_per_step=st.sampled_from([2, 4]),
        epochs=st.integers(1, 2),
        segment_bytes=st.integers(20, 90),
    )
    def begin(self, samples: int, packs_per_step: int, epochs: int, segment_bytes: int):
        plan = make_plan(samples, packs_per_step, epochs)
        self.cluster = Cluster(plan, make_dispatcher(plan, claim_timeout_s=30.0), segment_bytes=segment_bytes)
        self.cluster.trained = [0, 0]
        self.let_in: dict[tuple[int, int], bool] = {}
        self.sent: list = []
        self.failures = 0
        self.cluster.join(0)

    @rule(engine=ENGINES, most=st.integers(1, 6))
    def an_engine_claims(self, engine: str, most: int):
        self.cluster.claim(engine, most)

    @rule(engine=ENGINES, most=st.integers(1, 3))
    def an_engine_claims_and_the_answer_is_lost(self, engine: str, most: int):
        reply = self.cluster.ask(Claim(engine, most))
        self.cluster.given.update(granted.claim for granted in reply.granted)

    @rule(engine=ENGINES, pick=st.integers(0))
    def an_engine_stores(self, engine: str, pick: int):
        if held := self.cluster.claims.get(engine):
            granted = held[pick % len(held)]
            self.sent.append(Stored(engine, (manifest_of(self.cluster.plan, granted),)))
            self.cluster.store(engine, granted)

    @rule(engine=ENGINES, pick=st.integers(0), fault=st.sampled_from(Fault))
    def an_engine_fails(self, engine: str, pick: int, fault: Fault):
        if held := self.cluster.claims.get(engine):
            self.failures += fault is Fault.PACK
            self.cluster.fail(engine, held[pick % len(held)], fault)

    @rule(engine=ENGINES)
    def an_engine_beats(self, engine: str):
        self.cluster.beat(engine)

    @rule(engine=ENGINES)
    def an_engine_starts_again_and_knows_of_nothing(self, engine: str):
        self.cluster.claims[engine] = []
        self.cluster.ask(Heartbeat(engine, (), "starting"))

    @rule(engine=ENGINES, pick=st.integers(0))
    def an_engine_dies_having_stored_in_silence(self, engine: str, pick: int):
        if held := self.cluster.claims.pop(engine, []):
            self.cluster.put(held[pick % len(held)])

    @rule(seconds=st.floats(0.1, 6.0))
    def time_passes(self, seconds: float):
        self.cluster.pass_time(seconds * HEARTBEAT_S)

    @rule(rank=st.integers(0, 1))
    def a_rank_trains(self, rank: int):
        step = self.cluster.trained[rank] + 1
        if self.cluster.train(rank):
            self.sent += [Begin(rank, step), Trained(rank, step)]

    @rule(rank=st.integers(0, 1))
    def a_rank_asks_to_begin(self, rank: int):
        step = self.cluster.trained[rank] + 1
        if step > self.cluster.plan.steps:
            return
        world = self.cluster.generation
        go = self.cluster.ask(Begin(rank, step)).go
        assert go or not self.let_in.get((world, step), False)
        self.let_in[world, step] = go

    @rule(pick=st.integers(0))
    def the_store_loses_an_object(self, pick: int):
        if self.cluster.objects:
            key = sorted(self.cluster.objects)[pick % len(self.cluster.objects)]
            del self.cluster.objects[key]

    @rule(rank=st.integers(0, 1), pick=st.integers(0))
    def a_rank_says_that_something_is_lost(self, rank: int, pick: int):
        if self.cluster.objects:
            pack, claim = sorted(self.cluster.objects)[pick % len(self.cluster.objects)]
            lost = Lost(rank, pack, claim, "bytes differ")
            self.sent.append(lost)
            self.cluster.ask(lost)

    @rule(back=st.integers(0, 3), half=st.booleans())
    def the_ranks_start_again(self, back: int, half: bool):
        step = max(0, min(self.cluster.trained) - back)
        if half:
            self.cluster.generation += 1
            self.cluster.join_rank(1, step)
        self.cluster.join(step)
        self.sent.append(Join(0, 2, "an older one", 90, 0, self.cluster.generation - 1))

    @rule(pick=st.integers(0))
    def an_old_message_comes_again(self, pick: int):
        if self.sent:
            self.cluster.ask(self.sent[pick % len(self.sent)])

    @invariant()
    def what_is_claimed_and_stored_fits_into_the_store(self):
        window = self.cluster.dispatcher._window
        in_use = sum(e.bytes for e in window.entries.values() if e.claim)
        assert in_use <= window.reserved <= window.capacity <= 2 * self.cluster.segment_bytes
        assert window.reserved == sum(entry.bytes for entry in window.entries.values())

    @invariant()
    def no_engine_holds_a_claim_twice(self):
        report = self.cluster.dispatcher.report(self.cluster.now)
        assert sum(engine.claims for engine in report.engines) == report.claimed

    def teardown(self):
        cluster = getattr(self, "cluster", None)
        if cluster is None or cluster.dispatcher.report(0.0).error:
            return
        cluster.pass_time(30 * HEARTBEAT_S)
        cluster.finish()
        expected = [
            (step, pack.id)
            for step in range(1, cluster.plan.steps + 1)
            for rank in range(2)
            for pack in cluster.packs_of(rank, step)
        ]
        assert sorted(cluster.packs_trained) == sorted(expected)
        assert len(cluster.dispatcher.report(0.0).void) <= self.failures / 2


AnyOrder.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAnyOrderEndsWithEveryPackTrainedOnce = AnyOrder.TestCase
