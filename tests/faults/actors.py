"""Engines and ranks on a simulated clock: what each does about the dispatcher's answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

from specbatch.dispatch.messages import (
    LONG_POLL_S,
    AnyReply,
    AnyRequest,
    Begin,
    Claim,
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
from specbatch.pack_manifest import PackId
from tests.dispatch.cluster import HEARTBEAT_S, manifest_of

if TYPE_CHECKING:
    from tests.faults.attempt import Attempt

RANKS = 2
RESEND_S = LONG_POLL_S + 4.0
AHEAD = 2


class Broken(AssertionError):
    """An invariant is violated."""


class Actor:
    """A client of the dispatcher that is stopped now and then, and may die."""

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
        # Told to stop, an engine leaves for good.
        if getattr(reply, "phase", Phase.WORK) is Phase.WORK:
            self.soon(0.0, self._claim)

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
        """Settle a claim as `specbatch.inference.engine` does: it is no longer in flight."""
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
