"""The dispatcher's state machine: who computes which pack, and which step may be trained. Pure.

No I/O, no threads, no clock: the time is an argument. Every request may arrive twice, late, or after its sender
died, and is harmless then.

- Nothing is handed out before all ranks joined: only then is it known in whose memory a pack shall lie.
- Claims go out in plan order; what came back is nearer than what was never claimed, so it goes first.
- An engine keeps its claims as long as it names them in its heartbeats.
- Held-out packs are stored before the first step that ranks train together, and asked for only then.
- A step is begun by all ranks or by none: the first that is let in decides for all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from specbatch.dispatch.engines import Engines, Journal
from specbatch.dispatch.messages import (
    AnyReply,
    Beat,
    Begin,
    Claim,
    Claims,
    Done,
    Drain,
    Failed,
    Go,
    Heartbeat,
    Join,
    Lost,
    PackRequest,
    Packs,
    Phase,
    Refused,
    Report,
    Status,
    Stored,
    Trained,
    Trouble,
    Wait,
)
from specbatch.dispatch.window import State, Window
from specbatch.manifest import Manifest, PackId
from specbatch.plan import HELD_OUT, Pack, Plan


@dataclass(slots=True)
class World:
    """The ranks that train together, from one start of theirs to the next."""

    size: int
    generation: int
    step: int
    """Steps that were trained when it began."""
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
    """The state of an attempt.

    Args:
        steps: last step to train, at most the plan's.
        bytes_of: bytes that a pack's objects will occupy in the store.
        usable: bytes of a segment of given size that objects can fill.
        heartbeat_s: interval at which engines are heard.
        ranks_per_pack: ranks that train each pack together.
        claim_timeout_s: how long an engine that is heard may take for a pack before it is given to another.
    """

    def __init__(
        self,
        plan: Plan,
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
        self._journal = Journal()
        numbers = itertools.count(1)
        self._window = Window(plan, steps, bytes_of, self._void, lambda: next(numbers), ranks_per_pack)
        self._engines = Engines(
            self._window,
            self._journal,
            numbers,
            self._void,
            heartbeat_s=heartbeat_s,
            claim_timeout_s=claim_timeout_s,
        )
        self._world: World | None = None
        self._waiting: dict[int, PackId] = {}
        self._told: set[int] = set()
        """Ranks that were told the phase by a reply to `Wait` that had nothing else to say."""
        self._let_in = 0
        self._draining = ""
        self._troubles: dict[str, str] = {}

    def handle(self, request: PackRequest, now: float, *, last: bool = False) -> AnyReply | None:
        """Answer a request.

        Args:
            now: seconds on any clock that only goes forward.
            last: answer now, even with nothing to say.

        Returns:
            None if it should be asked again when `version` has changed; only for `Claim`, `Wait` and `Begin`.
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
            case Heartbeat():
                revoked = self._engines.beat(request, now)
                return Beat(self._engine_phase(), revoked)
            case Join():
                return self._join(request)
            case Drain():
                return self._drain(request)
            case Trouble():
                return self._trouble(request)
            case Status():
                return self.report(now)
        world = self._world
        if world is None or request.rank not in world.segments or request.generation != world.generation:
            return Refused(f"rank {request.rank} is not of the present world: it has to join")
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
        """Take the claims of engines that are silent or stuck. To be called more often than engines are heard."""
        self._engines.tick(now)

    @property
    def version(self) -> int:
        """Changes whenever a request that was held back may have an answer."""
        return self._journal.version

    def take_events(self) -> list[tuple[str, dict[str, object]]]:
        """What happened since the last call: name and facts."""
        events, self._journal.events = self._journal.events, []
        return events

    def take_garbage(self) -> list[tuple[PackId, int | None]]:
        """Claims (None: all claims of a pack) whose objects nobody needs, since the last call."""
        garbage, self._journal.garbage = self._journal.garbage, []
        return garbage

    def report(self, now: float) -> Report:
        """The state of all, for people and for the head."""
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
        """What trainers are to do."""
        if self._window.step >= self._window.steps:
            return Phase.TRAINED
        return Phase.STOP if self._why() else Phase.WORK

    def _engine_phase(self) -> Phase:
        """Engines stay until the steps that ranks were let into are trained: till then packs of them may be lost."""
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
            return Refused(f"there is no rank {request.rank} of {request.world} with {request.segment_bytes} bytes")
        groups, odd = divmod(request.world, self._ranks_per_pack)
        if odd:
            return Refused(f"{request.world} ranks can't train packs {self._ranks_per_pack} together")
        if self._plan.packs_per_step % groups:
            return Refused(f"{groups} groups of ranks do not divide {self._plan.packs_per_step} packs of a step")
        if not 0 <= request.step <= self._window.steps:
            return Refused(f"rank {request.rank} starts after step {request.step} of {self._window.steps}")
        if world and request.generation < world.generation:
            return Refused(f"rank {request.rank} is of generation {request.generation}, now is {world.generation}")
        if world and (world.generation, world.size, world.step) == (request.generation, request.world, request.step):
            if request.rank not in world.segments:
                return self._add(world, request)
            if world.segments[request.rank] == request.segment:
                return Done()
        self._world = world = World(request.world, request.generation, request.step)
        self._journal.event("world", ranks=request.world, step=request.step, generation=request.generation)
        self._engines.forget(self._window.restart(request.step, 0, 0))
        self._let_in = request.step
        self._waiting.clear()
        self._told.clear()
        return self._add(world, request)

    def _add(self, world: World, request: Join) -> AnyReply:
        world.segments[request.rank] = request.segment
        world.segment_bytes[request.rank] = request.segment_bytes
        world.trained[request.rank] = request.step
        self._journal.event("joined", rank=request.rank, segment=request.segment, bytes=request.segment_bytes)
        if world.complete:
            capacity = sum(self._usable(size) for size in world.segment_bytes.values())
            self._window.restart(request.step, world.size, capacity)
            self._extend()
        self._journal.changed()
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
                return Refused(f"rank {request.rank} waits for pack {pack}, which is trained or none")
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
            return Refused(f"rank {request.rank} trained step {trained} of {steps} and asks for step {request.step}")
        phase = self.phase
        if request.step <= self._let_in:
            return Go(True, phase)
        if phase is not Phase.WORK:
            return Go(False, phase, self._why())
        if world.complete and self._window.complete(request.step):
            self._let_in = request.step
            self._waiting.pop(request.rank, None)
            self._journal.changed()
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
            return Refused(f"rank {request.rank} was not let into step {request.step}")
        world.trained[request.rank] = request.step
        while min(world.trained.values()) > self._window.step:
            self._engines.trained(self._window.leave())
            self._journal.event("trained", step=self._window.step)
            self._extend()
            self._journal.changed()
        return Done()

    def _drain(self, request: Drain) -> AnyReply:
        if not self._draining:
            self._draining = request.why or "drained"
            self._journal.event("drain", why=self._draining)
            self._journal.changed()
        return Done()

    def _trouble(self, request: Trouble) -> AnyReply:
        if request.why != self._troubles.get(request.what, ""):
            self._journal.event("trouble", what=request.what, why=request.why)
        self._troubles.pop(request.what, None)
        if request.why:
            self._troubles[request.what] = request.why
        return Done()

    def _extend(self) -> None:
        self._window.extend(0)
        if self._window.error:
            self._journal.event("error", why=self._window.error)
