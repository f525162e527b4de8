"""Dispatcher, engines, ranks, store and network on a simulated clock, and faults by the million.

The dispatcher is the state machine that production runs. Around it everything is simulated, event by event: messages
take time, overtake each other, get lost and come twice; requests are held back and asked again as
`specbatch.dispatch.server` and `client` do it. Everything follows from the seed.

What must hold, whatever happens (`Broken` otherwise):

- the steps and packs that end up trained are the plan's, each once and in its order, with the rows that were captured
  for them, and void only where engines said that they can't compute a pack;
- all ranks stop after the same step;
- what the dispatcher reserves never exceeds what the ranks lend, and the store never fills for want of planning;
- whatever waits goes on: a time without faults brings a step.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from specbatch.dispatch.messages import (
    LONG_POLL_S,
    AnyReply,
    AnyRequest,
    Begin,
    Claim,
    Drain,
    Failed,
    Fault,
    Heartbeat,
    Join,
    Lost,
    Phase,
    Refused,
    Stored,
    Trained,
    Wait,
)
from specbatch.dispatch.messages import Granted as Grant
from specbatch.dispatch.state import Dispatcher
from specbatch.manifest import PackId
from specbatch.plan import Plan
from tests.dispatch.cluster import HEARTBEAT_S, make_dispatcher, make_plan, manifest_of

RANKS = 2
RESEND_S = LONG_POLL_S + 4.0
TICK_S = 0.1
PATIENCE_S = 400.0
"""Longest simulated time without a trained step, after the last fault; stuck claims alone take 60 s."""
CLAIM_TIMEOUT_S = 60.0
SNAPSHOT_STEPS = 3
AHEAD = 2
FAULTS_A_SECOND = 2.0


class Broken(AssertionError):
    """Something that must hold does not."""


@dataclass
class Stats:
    """Over many lives."""

    faults: Counter[str] = field(default_factory=Counter)
    lives: int = 0
    events: int = 0
    steps: int = 0
    """Trained, those that were trained again included."""
    retrained: int = 0
    simulated_s: float = 0.0


@dataclass(slots=True)
class Object:
    """All rows of one claim's pack in the store."""

    bytes: int
    segment: str
    good: bool = True


class Life:
    """One run, from its first step to its last, over as many attempts as it takes.

    Args:
        faults: how many happen, unless the run ends before.
        stats: added to.
    """

    def __init__(self, seed: int, faults: int, stats: Stats) -> None:
        self.draw = random.Random(seed)
        self.stats = stats
        self.plan: Plan = make_plan(self.draw.randint(30, 90), self.draw.choice([2, 4]), self.draw.randint(1, 3))
        self.segment_bytes = self.draw.randint(60, 200)
        self.packs = [self.plan.assign(step, RANKS) for step in range(1, self.plan.steps + 1)]
        all_packs = [pack for step in self.packs for rank in step for pack in rank if pack.samples]
        self.poison = {pack.id for pack in all_packs if self.draw.random() < 0.01}
        """Packs that no engine can compute."""
        self.left = faults
        self.now = 0.0
        self.progress_s = 0.0
        self.history: list[tuple[int, PackId, bool]] = []
        """Step, pack and whether it trained as zero: of the line of steps that counts."""
        self.saved = 0
        self.attempt: Attempt
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.begin_attempt()
        self.after(self.draw.expovariate(FAULTS_A_SECOND), self._next_fault)

    def live(self) -> None:
        """Until all is trained."""
        while not self.attempt.over:
            self.now, _, action = heapq.heappop(self._events)
            action()
            self.stats.events += 1
            if not self.left and self.now - self.progress_s > PATIENCE_S:
                raise Broken(f"nothing is trained for {PATIENCE_S} s: {self.attempt.dispatcher.report(self.now)}")
        expected = [
            (step, pack.id, pack.id in self.poison)
            for step in range(1, self.plan.steps + 1)
            for pack in sorted((pack for rank in self.packs[step - 1] for pack in rank), key=lambda pack: pack.id)
        ]
        if self.history != expected:
            raise Broken("what was trained is not the plan")
        self.stats.lives += 1
        self.stats.simulated_s += self.now

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something later."""
        heapq.heappush(self._events, (self.now + seconds, next(self._order), action))

    def begin_attempt(self) -> None:
        """Everything anew, from the newest snapshot."""
        self.rewind()
        self.attempt = Attempt(self)

    def rewind(self) -> None:
        """Forget what was trained since the newest snapshot."""
        kept = [line for line in self.history if line[0] <= self.saved]
        packs = self.plan.packs_per_step
        self.stats.retrained += (len(self.history) - len(kept)) // packs
        self.history = kept

    def trained(self, step: int, packs: list[tuple[PackId, bool]]) -> None:
        """All ranks made a step."""
        if step != (self.history[-1][0] if self.history else 0) + 1:
            raise Broken(f"step {step} follows {self.history[-1:]}")
        self.history += [(step, pack, void) for pack, void in sorted(packs)]
        self.stats.steps += 1
        self.progress_s = self.now

    def _next_fault(self) -> None:
        if self.left and not self.attempt.over:
            self.left -= 1
            self.progress_s = self.now
            self.attempt.fault()
            self.after(self.draw.expovariate(FAULTS_A_SECOND), self._next_fault)


class Attempt:
    """One dispatcher and all that talk to it."""

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
        """One more."""
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
        """One died, and the others with it; their memory goes too."""
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


class Actor:
    """Somebody who talks to the dispatcher, is stopped now and then, and may die."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt, self.life, self.draw = attempt, attempt.life, attempt.draw
        self.dead = False
        self.frozen_until = 0.0
        self._requests = itertools.count()

    def soon(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something later, if it lives then; when it is stopped, when it goes on."""

        def act() -> None:
            if self.dead:
                return
            if self.life.now < self.frozen_until:
                self.life.after(self.frozen_until - self.life.now, act)
                return
            action()

        self.life.after(seconds, act)

    def ask(self, request: AnyRequest, use: Callable[[AnyReply], None]) -> None:
        """Ask until there is an answer, each time on a new connection."""
        done = False

        def answer(reply: AnyReply) -> None:
            nonlocal done
            if not done and not self.dead:
                done = True
                self.soon(0.0, lambda: use(reply))

        def send() -> None:
            if not done:
                number = next(self._requests)
                key = request.engine if isinstance(request, Claim) else (id(self), number)
                self.attempt.send(key, request, answer)
                self.soon(RESEND_S, send)

        send()


class Engine(Actor):
    """Claims, computes, stores."""

    def __init__(self, attempt: Attempt, name: str) -> None:
        super().__init__(attempt)
        self.name = name
        self.claims: dict[int, Grant] = {}
        self.most = self.draw.randint(1, 4)
        self.hangs = self.breaks = False
        self.soon(self.draw.uniform(0.0, 3.0), self._claim)
        self._beat()

    def _beat(self) -> None:
        self.attempt.send((id(self), "beat"), Heartbeat(self.name, tuple(self.claims), "ready"), self._beaten)
        self.soon(HEARTBEAT_S, self._beat)

    def _beaten(self, reply: AnyReply) -> None:
        for claim in getattr(reply, "revoked", ()):
            self.claims.pop(claim, None)

    def _claim(self) -> None:
        if len(self.claims) >= self.most:
            self.soon(0.05, self._claim)
        else:
            self.ask(Claim(self.name, self.most - len(self.claims)), self._granted)

    def _granted(self, reply: AnyReply) -> None:
        for granted in getattr(reply, "granted", ()):
            self.claims[granted.claim] = granted
            if self.hangs:
                self.hangs = False  # this one is never computed
            else:
                self.soon(self.draw.uniform(0.02, 0.5), lambda granted=granted: self._computed(granted))
        stays = getattr(reply, "phase", Phase.WORK) is Phase.WORK
        self.soon(0.0 if stays else HEARTBEAT_S, self._claim)

    def _computed(self, granted: Grant) -> None:
        if granted.claim not in self.claims:
            return
        manifest = manifest_of(self.life.plan, granted)
        size = sum(chunk.bytes for chunk in manifest.chunks)
        if granted.pack in self.life.poison:
            self._answer(granted, Failed(self.name, granted.claim, "it can't be computed", Fault.PACK))
        elif self.breaks:
            self.breaks = False
            self._answer(granted, Failed(self.name, granted.claim, "the engine broke", Fault.OTHER))
        elif not self.attempt.put(granted.pack, granted.claim, size, granted.segment):
            self._answer(granted, Failed(self.name, granted.claim, "no room", Fault.FULL))
        else:
            self._answer(granted, Stored(self.name, (manifest,)))

    def _answer(self, granted: Grant, request: AnyRequest) -> None:
        """As `specbatch.inference.engine`: what is answered for is not in flight any more."""
        del self.claims[granted.claim]
        self.ask(request, lambda reply: None)


class Rank(Actor):
    """Fetches ahead and trains, as `specbatch.training` does."""

    def __init__(self, attempt: Attempt, number: int, generation: int) -> None:
        super().__init__(attempt)
        self.number, self.generation = number, generation
        self.lent = self.segment = f"segment-{number}.{generation}"
        self.step = self.life.saved
        self.ready_for = 0
        self.stopped: int | None = None
        self._fetched: dict[PackId, int | None] = {}
        """Claim of each pack that was got, None for void ones."""
        self._let_in = 0
        join = Join(number, RANKS, self.segment, self.life.segment_bytes, self.step, generation)
        self.soon(self.draw.uniform(0.0, 2.0), lambda: self.ask(join, self._joined))

    def contents(self, step: int) -> list[tuple[PackId, bool]]:
        """This rank's packs of a step, and whether they are void."""
        return [(pack.id, self._fetched[pack.id] is None) for pack in self.life.packs[step - 1][self.number]]

    def made(self, step: int) -> None:
        """The step is trained: remove its packs, and say so."""
        self.step = step
        for pack in self.life.packs[step - 1][self.number]:
            claim = self._fetched.pop(pack.id)
            if claim is not None:
                self.attempt.remove((pack.id, claim))
        self.ask(Trained(self.number, step, self.generation), self._next)

    def _joined(self, reply: AnyReply) -> None:
        if isinstance(reply, Refused):
            raise Broken(f"rank {self.number} may not join: {reply.why}")
        self._fetch()
        self._next(reply)

    def _next(self, reply: AnyReply) -> None:
        if isinstance(reply, Refused):
            raise Broken(f"rank {self.number} was refused: {reply.why}")
        if self.step == self.life.plan.steps:
            self.stopped = self.step
            self.attempt.left()
        else:
            self.ask(Begin(self.number, self.step + 1, self.generation), self._may_begin)

    def _may_begin(self, reply: AnyReply) -> None:
        if getattr(reply, "go", False):
            self._let_in = self.step + 1
            self._check_ready()
        elif getattr(reply, "phase", None) is Phase.STOP:
            self.stopped = self.step
            self.attempt.left()
        else:
            self._next(reply)

    def _check_ready(self) -> None:
        if self._let_in == self.step + 1 and not self._missing(self._let_in):
            self.ready_for, self._let_in = self._let_in, 0
            self.attempt.stepped()

    def _missing(self, step: int) -> list[PackId]:
        return [pack.id for pack in self.life.packs[step - 1][self.number] if pack.id not in self._fetched]

    def _fetch(self) -> None:
        """Ask for the packs of the next steps that are not there."""
        if self.stopped is not None:
            return
        last = min(self.step + 1 + AHEAD, self.life.plan.steps)
        wanted = [pack for step in range(self.step + 1, last + 1) for pack in self._missing(step)]
        if wanted:
            self.ask(Wait(self.number, tuple(wanted), self.generation), self._found)
        else:
            self.soon(0.05, self._fetch)

    def _found(self, reply: AnyReply) -> None:
        if isinstance(reply, Refused):
            raise Broken(f"rank {self.number} was refused: {reply.why}")
        for pack, _ in getattr(reply, "void", ()):
            self._fetched[pack] = None
        for manifest in getattr(reply, "stored", ()):
            found = self.attempt.objects.get((manifest.pack, manifest.claim))
            if not manifest.chunks or (found is not None and found.good):
                self._fetched[manifest.pack] = manifest.claim
            else:
                why = "gone or other bytes"
                lost = Lost(self.number, manifest.pack, manifest.claim, why, self.generation)
                self.ask(lost, lambda reply: None)
        self._check_ready()
        self.soon(0.01, self._fetch)


def simulate(seed: int, faults: int, faults_per_life: int = 100) -> Iterator[Stats]:
    """Live until so many faults happened; yields after each life.

    Raises:
        Broken: naming the seed of the life, which alone makes it happen again.
    """
    stats = Stats()
    lives = itertools.count(seed << 32)
    while stats.faults.total() < faults:
        life_seed = next(lives)
        try:
            Life(life_seed, min(faults_per_life, faults - stats.faults.total()), stats).live()
        except Exception as error:
            raise Broken(f"life {life_seed}: {error}") from error
        yield stats
