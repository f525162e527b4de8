"""One attempt of a simulated run: the real dispatcher, with a simulated store and network, and their faults."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specbatch.dispatch.dispatcher import Dispatcher
from specbatch.dispatch.messages import (
    LONG_POLL_S,
    AnyReply,
    AnyRequest,
    Drain,
)
from specbatch.pack_manifest import PackId
from tests.dispatch.cluster import make_dispatcher
from tests.faults.actors import RANKS, Broken, Engine, Rank

if TYPE_CHECKING:
    from tests.faults.simulation import Life

TICK_S = 0.1
CLAIM_TIMEOUT_S = 60.0
SNAPSHOT_STEPS = 3


@dataclass(slots=True)
class Object:
    """All rows of one claim's pack in the store."""

    bytes: int
    segment: str
    good: bool = True


class Attempt:
    """One dispatcher and everything that communicates with it."""

    def __init__(self, life: Life) -> None:
        self.life, self.draw = life, life.draw
        self.dispatcher: Dispatcher = make_dispatcher(life.plan, claim_timeout_s=CLAIM_TIMEOUT_S)
        self.over = self.dead = False
        self.frozen_until = 0.0
        self.lossy_until = 0.0
        self.objects: dict[tuple[PackId, int], Object] = {}
        self.used: Counter[str] = Counter()
        self.held: dict[object, tuple[AnyRequest, float, Callable[[AnyReply], None]]] = {}
        self._version = -1
        self.engines: list[Engine] = []
        self.ranks: list[Rank] = []
        self.generation = 0
        self._names = itertools.count()
        for _ in range(self.draw.randint(1, 3)):
            self.start_engine()
        self.start_ranks()
        self._tick()

    # The network and the dispatcher's server

    def send(self, key: object, request: AnyRequest, answer: Callable[[AnyReply], None]) -> None:
        """Send a request; it or its answer may get lost, come late or twice."""
        for _ in range(self._copies()):
            self.life.after(self._delay(), lambda: self._arrive(key, request, answer))

    def _copies(self) -> int:
        if self.life.now < self.lossy_until:
            return self.draw.choice((0, 0, 1, 2))
        return 1

    def _delay(self) -> float:
        slow = self.life.now < self.lossy_until
        return self.draw.random() * (3.0 if slow else 0.01)

    def _arrive(self, key: object, request: AnyRequest, answer: Callable[[AnyReply], None]) -> None:
        if self.dead:
            return
        if self.life.now < self.frozen_until:
            self.life.after(self.frozen_until - self.life.now, lambda: self._arrive(key, request, answer))
            return
        self.held.pop(key, None)
        reply = self.dispatcher.handle(request, self.life.now)
        if reply is None:
            self.held[key] = (request, self.life.now + LONG_POLL_S, answer)
        else:
            self._answer(reply, answer)
        self._after_change()

    def _answer(self, reply: AnyReply, answer: Callable[[AnyReply], None]) -> None:
        for _ in range(self._copies()):
            self.life.after(self._delay(), lambda: None if self.dead else answer(reply))

    def _after_change(self, *, due: bool = False) -> None:
        if due or self.dispatcher.version != self._version:
            self._version = self.dispatcher.version
            for key, (request, until, answer) in list(self.held.items()):
                reply = self.dispatcher.handle(request, self.life.now, last=self.life.now >= until)
                if reply is not None:
                    del self.held[key]
                    self._answer(reply, answer)
        self.dispatcher.take_events()
        if garbage := self.dispatcher.take_garbage():
            self.life.after(self._delay(), lambda: self._sweep(garbage))
        window = self.dispatcher._window
        if not window.reserved <= window.capacity <= RANKS * self.life.segment_bytes:
            raise Broken(f"{window.reserved} bytes are reserved of {window.capacity}")

    def _sweep(self, garbage: list[tuple[PackId, int | None]]) -> None:
        for pack, claim in garbage:
            for key in [key for key in self.objects if key[0] == pack and claim in (None, key[1])]:
                self.remove(key)

    def _tick(self) -> None:
        if self.dead or self.over:
            return
        if self.life.now >= self.frozen_until:
            self.dispatcher.tick(self.life.now)
            self._after_change(due=True)
        self.life.after(TICK_S, self._tick)

    # The store

    def put(self, pack: PackId, claim: int, size: int, segment: str) -> bool:
        """Store rows in this segment, or in any other that lives; False if there is no room."""
        lent = [rank.segment for rank in self.ranks if rank.segment]
        for name in sorted(lent, key=lambda name: name != segment):
            if self.used[name] + size <= self.life.segment_bytes:
                self.objects[pack, claim] = Object(size, name)
                self.used[name] += size
                return True
        return False

    def remove(self, key: tuple[PackId, int]) -> None:
        """Remove rows, if they are there."""
        found = self.objects.pop(key, None)
        if found is not None:
            self.used[found.segment] -= found.bytes

    # Who comes and goes

    def start_engine(self) -> None:
        """Add another one."""
        if not (self.dead or self.over):
            self.engines.append(Engine(self, f"engine-{next(self._names)}"))

    def start_ranks(self) -> None:
        """All ranks, from the newest snapshot."""
        if self.dead or self.over:
            return
        self.life.rewind()
        self.generation += 1
        self.ranks = [Rank(self, number, self.generation) for number in range(RANKS)]

    def kill_ranks(self) -> None:
        """Kill all ranks, as when one of them dies; their memory is lost, too."""
        for rank in self.ranks:
            rank.dead, rank.segment = True, ""
            for key in [key for key, found in self.objects.items() if found.segment == rank.lent]:
                self.remove(key)
        self.ranks = []
        self.life.after(self.draw.uniform(0.5, 5.0), self.start_ranks)

    def end(self) -> None:
        """Head, store and all components are gone; the next attempt begins."""
        self.dead = True
        for engine in self.engines:
            engine.dead = True
        for rank in self.ranks:
            rank.dead = True
        self.life.after(self.draw.uniform(1.0, 5.0), self.life.begin_attempt)

    def stepped(self) -> None:
        """A rank has all packs of a step that it was let into: when all have, the step is made."""
        steps = {rank.ready_for for rank in self.ranks}
        if len(self.ranks) != RANKS or len(steps) != 1 or 0 in steps:
            return
        (step,) = steps
        packs = [item for rank in self.ranks for item in rank.contents(step)]
        for rank in self.ranks:
            rank.ready_for = 0
        ranks = list(self.ranks)
        self.life.after(self.draw.uniform(0.05, 0.3), lambda: self._made(ranks, step, packs))

    def _made(self, ranks: list[Rank], step: int, packs: list[tuple[PackId, bool]]) -> None:
        if any(rank.dead for rank in ranks):
            return
        self.life.trained(step, packs)
        if step % SNAPSHOT_STEPS == 0 or step == self.life.plan.steps:
            self.life.saved = step
        for rank in ranks:
            rank.made(step)

    def left(self) -> None:
        """A rank stopped or trained its last step: when all have, the attempt is over."""
        if len(self.ranks) < RANKS or not all(rank.stopped is not None for rank in self.ranks):
            return
        steps = {rank.stopped for rank in self.ranks}
        if len(steps) != 1:
            raise Broken(f"ranks stopped after steps {steps}")
        (step,) = steps
        if step == self.life.plan.steps:
            self.over = True
        else:
            assert step is not None
            self.life.saved = step
            self.end()

    # Faults

    def fault(self) -> None:
        """One, of any kind."""
        kind = self.draw.choices(FAULTS, WEIGHTS)[0]
        self.life.stats.faults[kind] += 1
        getattr(self, kind)()

    def head_or_store_dies(self) -> None:
        if not self.dead:
            self.end()

    def drain(self) -> None:
        self.send(("drain", self.life.now), Drain("a signal"), lambda reply: None)

    def rank_dies(self) -> None:
        if self.ranks:
            self.kill_ranks()

    def rank_dies_while_it_starts(self) -> None:
        if self.ranks:
            self.kill_ranks()
            self.life.after(0.6, lambda: self.kill_ranks() if self.ranks and not self.dead else None)

    def engine_dies(self) -> None:
        if self.engines:
            engine = self.engines.pop(self.draw.randrange(len(self.engines)))
            engine.dead = True
            self.life.after(self.draw.uniform(0.5, 10.0), self.start_engine)

    def engine_joins(self) -> None:
        if len(self.engines) < 5:
            self.start_engine()

    def engine_stalls(self) -> None:
        if self.engines:
            self.draw.choice(self.engines).frozen_until = self.life.now + self.draw.uniform(0.1, 12.0)

    def engine_hangs_on_its_claims(self) -> None:
        if self.engines:
            self.draw.choice(self.engines).hangs = True

    def rank_stalls(self) -> None:
        if self.ranks:
            self.draw.choice(self.ranks).frozen_until = self.life.now + self.draw.uniform(0.1, 12.0)

    def dispatcher_stalls(self) -> None:
        self.frozen_until = self.life.now + self.draw.uniform(0.1, 12.0)

    def network_loses_and_repeats(self) -> None:
        self.lossy_until = self.life.now + self.draw.uniform(0.5, 8.0)

    def objects_vanish(self) -> None:
        for key in self._some_objects():
            self.remove(key)

    def objects_are_overwritten(self) -> None:
        for key in self._some_objects():
            self.objects[key].good = False

    def store_is_fragmented(self) -> None:
        taken = Counter({rank.lent: self.life.segment_bytes // 2 for rank in self.ranks})
        self.used.update(taken)
        self.life.after(self.draw.uniform(0.5, 5.0), lambda: self.used.subtract(taken))

    def engine_breaks(self) -> None:
        if self.engines:
            self.draw.choice(self.engines).breaks = True

    def _some_objects(self) -> list[tuple[PackId, int]]:
        return [key for key in self.objects if self.draw.random() < 0.5]


FAULTS = (
    "objects_vanish",
    "objects_are_overwritten",
    "store_is_fragmented",
    "engine_dies",
    "engine_joins",
    "engine_breaks",
    "engine_stalls",
    "engine_hangs_on_its_claims",
    "rank_stalls",
    "dispatcher_stalls",
    "network_loses_and_repeats",
    "rank_dies",
    "rank_dies_while_it_starts",
    "drain",
    "head_or_store_dies",
)
WEIGHTS = (8, 8, 4, 8, 3, 4, 6, 3, 6, 4, 8, 4, 1, 1, 1)
