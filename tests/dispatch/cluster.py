"""A cluster of paper around the dispatcher: engines, ranks and a store that do what the tests make them do."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import numpy as np

from specbatch.dispatch.dispatcher import Dispatcher
from specbatch.dispatch.messages import (
    AnyReply,
    AnyRequest,
    Begin,
    Claim,
    Claims,
    Failed,
    Fault,
    Go,
    Granted,
    Heartbeat,
    Join,
    Lost,
    Packs,
    Phase,
    Stored,
    Trained,
    Wait,
)
from specbatch.pack_manifest import Chunk, Manifest, PackId
from specbatch.plan import Pack, Plan

HEARTBEAT_S = 1.0


def make_plan(samples: int = 24, packs_per_step: int = 4, epochs: int = 1, heldout: int = 0) -> Plan:
    """Samples of 3 to 9 tokens in packs of at most 10, and so many held-out packs of one sample."""
    lengths = np.array([3 + (5 * i) % 7 for i in range(samples)])
    return Plan(
        lengths,
        seed=1,
        epochs=epochs,
        tokens_per_pack=10,
        packs_per_step=packs_per_step,
        heldout=np.full(heldout, 6),
        heldout_packs=heldout,
    )


def make_dispatcher(plan: Plan, steps: int | None = None, **options: float) -> Dispatcher:
    """A pack takes a byte a token; a segment is usable in full."""
    return Dispatcher(
        plan,
        steps=steps or plan.steps,
        bytes_of=plan.tokens,
        usable=lambda size: size,
        heartbeat_s=HEARTBEAT_S,
        **options,
    )


def manifest_of(plan: Plan, granted: Granted) -> Manifest:
    """Return the manifest that an engine reports after it stored a pack."""
    pack = plan.pack(granted.pack)
    tokens = {sample: plan.tokens(Pack(0, 0, (sample,))) for sample in pack.samples}
    chunks = tuple(Chunk(sample, "aux", 0, 1, tokens[sample], "") for sample in pack.samples)
    return Manifest(granted.claim, granted.pack, chunks)


@dataclass
class Cluster:
    """All the actors, one after the other and on one clock."""

    plan: Plan
    dispatcher: Dispatcher
    ranks: int = 2
    segment_bytes: int = 100
    now: float = 0.0
    generation: int = 0
    claims: dict[str, list[Granted]] = field(default_factory=dict)
    """Claims that each engine still works on."""
    given: set[int] = field(default_factory=set)
    """All claims ever given."""
    objects: dict[tuple[PackId, int], int] = field(default_factory=dict)
    """The store: bytes by pack and claim."""
    trained: list[int] = field(default_factory=list)
    """Steps by rank."""
    kept: list[list[PackId]] = field(default_factory=list)
    """Held-out packs by rank, none of them before its first step since it joined."""
    packs_trained: list[tuple[int, PackId]] = field(default_factory=list)
    """Steps and packs, in the order in which they were trained."""

    def ask(self, request: AnyRequest, *, last: bool = True) -> AnyReply | None:
        """A request, and what the store does about the garbage. Ranks speak as those of the present generation."""
        if isinstance(request, Wait | Begin | Lost | Trained):
            request = msgspec.structs.replace(request, generation=self.generation)
        reply = self.dispatcher.handle(request, self.now, last=last)
        self.sweep()
        return reply

    def sweep(self) -> None:
        """Remove what the dispatcher calls garbage."""
        for pack, claim in self.dispatcher.take_garbage():
            for key in [key for key in self.objects if key[0] == pack and claim in (None, key[1])]:
                del self.objects[key]

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.dispatcher.tick(self.now)
        self.sweep()

    # Engines

    def claim(self, engine: str, most: int = 1) -> list[Granted]:
        reply = self.ask(Claim(engine, most))
        assert isinstance(reply, Claims)
        assert len(reply.granted) <= most
        for granted in reply.granted:
            assert granted.claim not in self.given
            self.given.add(granted.claim)
        self.claims.setdefault(engine, []).extend(reply.granted)
        return list(reply.granted)

    def put(self, granted: Granted) -> Manifest:
        """Objects appear in the store, whether or not the claim is still good."""
        manifest = manifest_of(self.plan, granted)
        self.objects[granted.pack, granted.claim] = sum(chunk.bytes for chunk in manifest.chunks)
        return manifest

    def store(self, engine: str, granted: Granted) -> AnyReply | None:
        self.claims[engine].remove(granted)
        return self.ask(Stored(engine, (self.put(granted),)))

    def fail(self, engine: str, granted: Granted, fault: Fault = Fault.PACK, why: str = "broken") -> None:
        self.claims[engine].remove(granted)
        self.ask(Failed(engine, granted.claim, why, fault))

    def beat(self, engine: str) -> None:
        held = self.claims.setdefault(engine, [])
        reply = self.ask(Heartbeat(engine, tuple(granted.claim for granted in held), "ready"))
        self.claims[engine] = [granted for granted in held if granted.claim not in reply.revoked]

    # Ranks

    def join(self, step: int = 0, *, generation: int | None = None) -> None:
        """All ranks start after a step; what lay in their memory is gone."""
        self.generation = self.generation + 1 if generation is None else generation
        self.objects.clear()
        self.trained = [step] * self.ranks
        self.kept = [[] for _ in range(self.ranks)]
        self.packs_trained = [(s, pack) for s, pack in self.packs_trained if s <= step]
        for rank in range(self.ranks):
            self.join_rank(rank, step)

    def join_rank(self, rank: int, step: int) -> AnyReply | None:
        segment = f"s{rank}.{self.generation}"
        return self.ask(Join(rank, self.ranks, segment, self.segment_bytes, step, self.generation))

    def packs_of(self, rank: int, step: int) -> list[Pack]:
        return self.plan.assign(step, self.ranks)[rank]

    def train(self, rank: int) -> bool:
        """Train the rank's next step if it may and can; whether it did."""
        step = self.trained[rank] + 1
        if step > self.dispatcher.report(self.now).steps:
            return False
        reply = self.ask(Begin(rank, step))
        assert isinstance(reply, Go)
        if not reply.go:
            return False
        if not self.kept[rank]:
            if not self._fetch(rank, held := self.plan.assign_heldout(self.ranks)[rank]):
                return False
            self.kept[rank] = [pack.id for pack in held]
        packs = self.packs_of(rank, step)
        if not self._fetch(rank, packs):
            return False
        self.trained[rank] = step
        self.packs_trained += [(step, pack.id) for pack in packs]
        self.ask(Trained(rank, step))
        return True

    def _fetch(self, rank: int, packs: list[Pack]) -> bool:
        """Take packs out of the store, if all are there."""
        if not packs:
            return True
        found = self.ask(Wait(rank, tuple(pack.id for pack in packs)))
        assert isinstance(found, Packs)
        for manifest in found.stored:
            if manifest.chunks and (manifest.pack, manifest.claim) not in self.objects:
                self.ask(Lost(rank, manifest.pack, manifest.claim, "gone"))
                return False
        if len(found.stored) + len(found.void) < len(packs):
            return False
        for manifest in found.stored:
            self.objects.pop((manifest.pack, manifest.claim), None)
        return True

    def finish(self, engine: str = "last") -> None:
        """Let one healthy engine and all ranks work until all steps are trained."""
        for _ in range(40 * self.dispatcher.report(self.now).steps):
            if self.dispatcher.phase is Phase.TRAINED:
                return
            self.beat(engine)
            for granted in self.claim(engine, 4):
                self.store(engine, granted)
            for rank in range(self.ranks):
                self.train(rank)
            self.pass_time(HEARTBEAT_S)
        raise AssertionError(f"not trained: {self.dispatcher.report(self.now)}")


def make_cluster(
    *, samples: int = 24, packs_per_step: int = 4, heldout: int = 0, joined: bool = True, **options
) -> Cluster:
    plan = make_plan(samples, packs_per_step, heldout=heldout)
    cluster = Cluster(plan, make_dispatcher(plan), **options)
    if joined:
        cluster.join()
    return cluster


def order_of(cluster: Cluster) -> list:
    return [pack.id for step in range(1, cluster.plan.steps + 1) for pack in cluster.plan.packs(step)]


def events(cluster: Cluster) -> list[str]:
    return [name for name, _ in cluster.dispatcher.take_events()]
