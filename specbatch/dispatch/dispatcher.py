"""The dispatcher's state machine: who computes which pack, and which step may be trained. Pure.

No I/O, no threads, no clock: the time is an argument. A request that arrives twice, late, or after its sender died does
no harm.

- Nothing is handed out before all ranks have joined, because it is not known earlier which rank's memory holds a pack.
- Claims are granted in plan order. Packs that came back are earlier in it than packs never claimed, so they go first.
- An engine keeps its claims as long as it names them in its heartbeats.
- Held-out packs are stored before the first step that the ranks train together, and fetched only then.
- A step is begun by all ranks or none: the first rank that may begin decides for all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from specbatch.dispatch.claims import ClaimTable, Outbox
from specbatch.dispatch.engine_nodes import EngineNodes
from specbatch.dispatch.messages import (
    Answered,
    AnyReply,
    Beat,
    Begin,
    Claim,
    Claims,
    Done,
    Drain,
    Failed,
    Follow,
    Go,
    Heartbeat,
    Join,
    Lead,
    Lost,
    PackRequest,
    Packs,
    Phase,
    Refused,
    Report,
    StatusRequest,
    Stored,
    Trained,
    Trouble,
    Wait,
)
from specbatch.dispatch.window import State, Window
from specbatch.pack_manifest import Manifest, PackId
from specbatch.plan import HELD_OUT, Pack, PackPlan


@dataclass(slots=True)
class World:
    """The ranks that train together, between two starts of the ranks."""

    size: int
    generation: int
    step: int
    """Number of trained steps when it began."""
    segments: dict[int, str] = field(default_factory=dict)
    segment_bytes: dict[int, int] = field(default_factory=dict)
    trained: dict[int, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.segments) == self.size

    def absent(self) -> list[int]:
        """Ranks that have not joined."""
        return [rank for rank in range(self.size) if rank not in self.segments]


class Dispatcher:
    """The state machine of an attempt.

    Args:
        steps: last step to train, at most the plan's.
        bytes_of: bytes that a pack's objects will occupy in the store.
        usable: returns the bytes that objects can fill in a segment of a given size.
        heartbeat_s: interval of the engines' heartbeats.
        ranks_per_pack: ranks that train each pack together.
        claim_timeout_s: seconds that a live engine may take for a pack before it is given to another.
    """

    def __init__(
        self,
        plan: PackPlan,
        *,
        steps: int,
        bytes_of: Callable[[Pack], int],
        usable: Callable[[int], int],
        heartbeat_s: float,
        claim_timeout_s: float = 900.0,
        ranks_per_pack: int = 1,
    ) -> None:
        self._ranks_per_pack = ranks_per_pack
        self._plan, self._usable = plan, usable
        self._void: dict[PackId, str] = {}
        self._outbox = Outbox()
        numbers = itertools.count(1)
        self._window = Window(plan, steps, bytes_of, self._void, lambda: next(numbers), ranks_per_pack)
        self._engines = ClaimTable(
            self._window,
            self._outbox,
            numbers,
            self._void,
            heartbeat_s=heartbeat_s,
            claim_timeout_s=claim_timeout_s,
        )
        self._nodes = EngineNodes()
        self._world: World | None = None
        self._waiting: dict[int, PackId] = {}
        self._told: set[int] = set()
        """Ranks that got the phase in an otherwise empty reply to `Wait`."""
        self._let_in = 0
        self._draining = ""
        self._troubles: dict[str, str] = {}

    def handle(self, request: PackRequest, now: float, *, last: bool = False) -> AnyReply | None:
        """Answer a request.

        Args:
            now: seconds of a monotonic clock.
            last: answer now, even if there is nothing new.

        Returns: the reply, or None if the request should be handled again once `version` has changed (`Claim`, `Wait`
            and `Begin` only).
        """
        match request:
            case Claim():
                return self._claim(request, now, last)
            case Stored():
                wrong = self._engines.stored(request, now)
                return Refused(wrong) if wrong else Done()
            case Failed():
                self._engines.fail(request, now, self._let_in)
                return Done()
            case Answered():
                return Refused(f"{request.engine} answers prompts, but this attempt computes packs")
            case Heartbeat():
                revoked = self._engines.beat(request, now)
                return Beat(self._engine_phase(), revoked)
            case Lead():
                return self._nodes.lead(request, now)
            case Follow():
                return self._nodes.follow(request, now)
            case Join():
                return self._join(request)
            case Drain():
                return self._drain(request)
            case Trouble():
                return self._trouble(request)
            case StatusRequest():
                return self.report(now)
        world = self._world
        if world is None or request.rank not in world.segments or request.generation != world.generation:
            return Refused(f"rank {request.rank} does not belong to the current world: it has to join")
        match request:
            case Wait():
                return self._wait(world, request, last)
            case Begin():
                return self._begin(world, request, last)
            case Trained():
                return self._train(world, request)
            case Lost():
                self._engines.lose(request)
                return Done()

    def tick(self, now: float) -> None:
        """Take back the claims of engines that are silent or stuck. Must be called more often than heartbeats come."""
        self._engines.tick(now)

    @property
    def version(self) -> int:
        """Changes whenever a held request may have an answer."""
        return self._outbox.version

    def take_events(self) -> list[tuple[str, dict[str, object]]]:
        """Return the events since the last call: name and facts."""
        events, self._outbox.events = self._outbox.events, []
        return events

    def take_garbage(self) -> list[tuple[PackId, int | None]]:
        """Return the claims (None: all claims of a pack) whose objects became unneeded since the last call."""
        garbage, self._outbox.garbage = self._outbox.garbage, []
        return garbage

    def report(self, now: float) -> Report:
        """Return the state of everything, for people and for the head."""
        counts = self._window.count()
        return Report(
            phase=self.phase,
            why=self._why(),
            step=self._window.step,
            steps=self._window.steps,
            free=counts[State.FREE],
            claimed=counts[State.CLAIMED],
            stored=counts[State.STORED],
            stored_bytes=sum(e.bytes for e in self._window.entries.values() if e.state is State.STORED),
            budget_bytes=self._window.budget,
            engines=self._engines.reports(now),
            ranks=len(self._world.segments) if self._world else 0,
            waiting=tuple(sorted(self._waiting.items())),
            lost=self._engines.lost,
            failed=self._engines.failed,
            void=tuple(self._void.items()),
            error=self._window.error,
            troubles=tuple(self._troubles.items()),
        )

    @property
    def phase(self) -> Phase:
        """The phase that the trainers are in."""
        if self._window.step >= self._window.steps:
            return Phase.TRAINED
        return Phase.STOP if self._why() else Phase.WORK

    def _engine_phase(self) -> Phase:
        """Return the phase for engines. They stay until the steps that ranks began are trained, since their packs may
        be lost until then."""
        phase = self.phase
        return Phase.WORK if phase is Phase.STOP and self._let_in > self._window.step else phase

    def _why(self) -> str:
        return self._window.error or self._draining

    def _claim(self, request: Claim, now: float, last: bool) -> AnyReply | None:
        if request.most < 1:
            return Refused(f"{request.engine} asks for {request.most} packs")
        self._engines.hear(request.engine, now)
        phase, world = self._engine_phase(), self._world
        if phase is not Phase.WORK:
            return Claims((), phase)
        if world is None or not world.complete:
            return Claims((), phase) if last else None
        last_step = self._window.steps if self.phase is Phase.WORK else self._let_in
        granted = self._engines.grant(request.engine, request.most, world.segments, last_step, now)
        while len(granted) < request.most and self._window.extend(request.most - len(granted)):
            more = self._engines.grant(request.engine, request.most - len(granted), world.segments, last_step, now)
            if not more:
                break
            granted += more
        return Claims(tuple(granted), phase) if granted or last else None

    def _join(self, request: Join) -> AnyReply:
        world = self._world
        if not 0 <= request.rank < request.world or request.segment_bytes < 0:
            return Refused(f"rank {request.rank} of {request.world} with {request.segment_bytes} bytes is impossible")
        groups, odd = divmod(request.world, self._ranks_per_pack)
        if odd:
            return Refused(f"{request.world} ranks can't train packs {self._ranks_per_pack} together")
        if self._plan.packs_per_step % groups:
            return Refused(f"{groups} groups of ranks do not divide {self._plan.packs_per_step} packs of a step")
        if not 0 <= request.step <= self._window.steps:
            return Refused(f"rank {request.rank} starts after step {request.step} of {self._window.steps}")
        if world and request.generation < world.generation:
            return Refused(
                f"rank {request.rank} has generation {request.generation}; the current is {world.generation}"
            )
        if world and (world.generation, world.size, world.step) == (request.generation, request.world, request.step):
            if request.rank not in world.segments:
                return self._add(world, request)
            if world.segments[request.rank] == request.segment:
                return Done()
        self._world = world = World(request.world, request.generation, request.step)
        self._outbox.event("world", ranks=request.world, step=request.step, generation=request.generation)
        self._engines.forget(self._window.restart(request.step, 0, 0))
        self._let_in = request.step
        self._waiting.clear()
        self._told.clear()
        return self._add(world, request)

    def _add(self, world: World, request: Join) -> AnyReply:
        world.segments[request.rank] = request.segment
        world.segment_bytes[request.rank] = request.segment_bytes
        world.trained[request.rank] = request.step
        self._outbox.event("joined", rank=request.rank, segment=request.segment, bytes=request.segment_bytes)
        if world.complete:
            capacity = sum(self._usable(size) for size in world.segment_bytes.values())
            self._window.restart(request.step, world.size, capacity)
            self._extend()
        self._outbox.changed()
        return Done()

    def _wait(self, world: World, request: Wait, last: bool) -> AnyReply | None:
        stored: list[Manifest] = []
        void: list[tuple[PackId, str]] = []
        missing: list[PackId] = []
        for pack in request.packs:
            entry = self._window.entries.get(pack)
            if entry is not None and entry.manifest is not None:
                stored.append(entry.manifest)
            elif entry is not None and entry.state is State.VOID:
                void.append((pack, self._void[pack]))
            elif not self._to_come(pack, world.trained[request.rank]):
                return Refused(f"rank {request.rank} waits for pack {pack}, which is already trained or does not exist")
            else:
                missing.append(pack)
        self._waiting.pop(request.rank, None)
        if missing:
            self._waiting[request.rank] = min(missing)
        phase = self.phase
        news = phase is not Phase.WORK and request.rank not in self._told
        if not (stored or void or last or news or not missing):
            return None
        if phase is not Phase.WORK:
            self._told.add(request.rank)
        return Packs(tuple(stored), tuple(void), phase)

    def _to_come(self, pack: PackId, trained: int) -> bool:
        if pack[0] == HELD_OUT:
            return pack in self._window.entries
        return 0 <= pack[0] < self._plan.epochs and self._plan.step_of(pack) > trained

    def _begin(self, world: World, request: Begin, last: bool) -> AnyReply | None:
        trained = world.trained[request.rank]
        if request.step > min(trained + 1, self._window.steps):
            steps = self._window.steps
            return Refused(f"rank {request.rank} asks for step {request.step} after step {trained} of {steps}")
        phase = self.phase
        if request.step <= self._let_in:
            return Go(True, phase)
        if phase is not Phase.WORK:
            return Go(False, phase, self._why())
        if world.complete and self._window.complete(request.step):
            self._let_in = request.step
            self._waiting.pop(request.rank, None)
            self._outbox.changed()
            return Go(True, phase)
        if not last:
            return None
        absent = world.absent()
        missing = f"packs of step {request.step} are missing"
        return Go(False, phase, f"ranks {absent} have not joined" if absent else missing)

    def _train(self, world: World, request: Trained) -> AnyReply:
        trained = world.trained[request.rank]
        if request.step <= trained:
            return Done()
        if request.step != trained + 1 or request.step > self._let_in:
            return Refused(f"rank {request.rank} was not allowed to begin step {request.step}")
        world.trained[request.rank] = request.step
        while min(world.trained.values()) > self._window.step:
            self._engines.trained(self._window.leave())
            self._outbox.event("trained", step=self._window.step)
            self._extend()
            self._outbox.changed()
        return Done()

    def _drain(self, request: Drain) -> AnyReply:
        if not self._draining:
            self._draining = request.why or "drained"
            self._outbox.event("drain", why=self._draining)
            self._outbox.changed()
        return Done()

    def _trouble(self, request: Trouble) -> AnyReply:
        if request.why != self._troubles.get(request.what, ""):
            self._outbox.event("trouble", what=request.what, why=request.why)
        self._troubles.pop(request.what, None)
        if request.why:
            self._troubles[request.what] = request.why
        return Done()

    def _extend(self) -> None:
        self._window.extend(0)
        if self._window.error:
            self._outbox.event("error", why=self._window.error)
