"""The engines' side of the dispatcher: claims, from the moment they are given until nobody needs them. Pure.

A claim is one engine's for one pack, and its number is never given again. What is said about another claim than a
pack's current one changes nothing, except that its objects are garbage.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from specbatch.dispatch.messages import EngineReport, Failed, Fault, Granted, Heartbeat, Lost, Stored
from specbatch.dispatch.window import Entry, State, Window
from specbatch.manifest import Manifest, PackId

SILENT_HEARTBEATS = 4
"""Heartbeats that may fail to come before an engine's claims go to others."""
UNNAMED_HEARTBEATS = 2
"""Heartbeats within which an engine must begin to name a claim: its grant may have been lost on the way."""
AVOID_HEARTBEATS = 12
"""Heartbeats for which another engine is preferred after a failure."""
GONE_HEARTBEATS = 60
"""Heartbeats after which a silent engine is no longer spoken of."""
RETRY_S = 1.0
"""Before a pack is handed out again that failed for no fault of its own."""
VOID_ENGINES = 2
VOID_FAILURES = 3
"""A pack is void after failures on so many engines, or so many failures in all."""
VOID_LOSSES = 10
"""A pack that was stored and lost so often is void, too: else a store that keeps nothing whole would go unnoticed."""


@dataclass(slots=True)
class Journal:
    """What the state machine has to tell the world."""

    events: list[tuple[str, dict[str, object]]] = field(default_factory=list)
    garbage: list[tuple[PackId, int | None]] = field(default_factory=list)
    """Claims (None: all claims of a pack) whose objects nobody needs."""
    version: int = 0
    """Changes whenever a request that was held back may have an answer."""

    def event(self, name: str, **facts: object) -> None:
        """Something happened that people may want to know."""
        self.events.append((name, facts))

    def changed(self) -> None:
        """Requests that were held back may have an answer."""
        self.version += 1


@dataclass(slots=True)
class Engine:
    """What is known of an engine."""

    heard_s: float
    state: str = ""
    tokens_per_s: float = 0.0
    packs: int = 0
    silent: bool = False
    claims: set[int] = field(default_factory=set)
    """Those that it computes."""


class Engines:
    """Who computes what.

    Args:
        numbers: of the claims.
        void: packs that no engine can compute, and why; added to here.
    """

    def __init__(
        self,
        window: Window,
        journal: Journal,
        numbers: itertools.count[int],
        void: dict[PackId, str],
        *,
        heartbeat_s: float,
        claim_timeout_s: float,
    ) -> None:
        self._window, self._journal, self._numbers, self._void = window, journal, numbers, void
        self._heartbeat_s, self._claim_timeout_s = heartbeat_s, claim_timeout_s
        self._engines: dict[str, Engine] = {}
        self._held: dict[int, PackId] = {}
        self._failures: dict[PackId, list[tuple[str, str]]] = {}
        self._losses: Counter[PackId] = Counter()
        self.lost = self.failed = 0

    def hear(self, name: str, now: float) -> Engine:
        """An engine lives."""
        engine = self._engines.get(name)
        if engine is None:
            engine = self._engines[name] = Engine(now)
            self._journal.event("engine", engine=name)
        if engine.silent:
            engine.silent = False
            self._journal.event("heard", engine=name)
        engine.heard_s = now
        return engine

    def grant(self, name: str, most: int, segments: dict[int, str], last_step: int, now: float) -> list[Granted]:
        """Hand out packs of steps up to ``last_step``, in plan order.

        Args:
            segments: of each rank.
        """
        engine = self.hear(name, now)
        others = [other for other, record in self._engines.items() if not record.silent and other != name]

        def usable(entry: Entry) -> bool:
            if now < entry.not_before_s:
                return False
            return now >= entry.avoid.get(name, 0.0) or all(now < entry.avoid.get(other, 0.0) for other in others)

        granted: list[Granted] = []
        for entry in self._window.take(most, last_step, usable):
            claim = next(self._numbers)
            self._window.claim(entry, claim, name, now)
            self._held[claim] = entry.id
            engine.claims.add(claim)
            granted.append(Granted(claim, entry.id, segments[entry.rank]))
        return granted

    def stored(self, request: Stored, now: float) -> str | None:
        """Packs are in the store; those of claims that are over are garbage. Returns what is wrong with the request."""
        engine = self.hear(request.engine, now)
        for manifest in request.manifests:
            entry = self._current(manifest.claim, manifest.pack)
            if entry is None:
                self._journal.garbage.append((manifest.pack, manifest.claim))
                self._journal.event("late", engine=request.engine, claim=manifest.claim, pack=manifest.pack)
            elif entry.engine != request.engine:
                return f"claim {manifest.claim} is not {request.engine}'s"
            elif entry.state is State.CLAIMED:
                self._store(entry, engine, manifest, now)
        return None

    def fail(self, request: Failed, now: float, keep_through: int) -> None:
        """A claim failed.

        Args:
            keep_through: where the store is full, packs of steps up to this one stay in the window.
        """
        self.hear(request.engine, now)
        entry = self._window.entries.get(self._held.get(request.claim, (-1, -1)))
        if entry is None or entry.state is not State.CLAIMED or entry.engine != request.engine:
            return
        self._blame(entry, request.why, request.fault, now)
        if request.fault is Fault.FULL:
            self.forget(self._window.shrink(keep_through))

    def beat(self, request: Heartbeat, now: float) -> tuple[int, ...]:
        """An engine says what it works on. Returns the claims that are not its own any more."""
        engine = self.hear(request.engine, now)
        engine.state, engine.tokens_per_s = request.state, request.tokens_per_s
        for claim in sorted(engine.claims.difference(request.claims)):
            entry = self._window.entries[self._held[claim]]
            if now - entry.since_s > UNNAMED_HEARTBEATS * self._heartbeat_s:
                self._journal.event("unnamed", engine=request.engine, claim=claim, pack=entry.id)
                self._take_back(entry)
        return tuple(claim for claim in request.claims if not self._is_own(claim, request.engine))

    def tick(self, now: float) -> None:
        """Take the claims of engines that are silent or stuck."""
        for name, engine in list(self._engines.items()):
            silent = now - engine.heard_s > SILENT_HEARTBEATS * self._heartbeat_s
            if silent and not engine.silent:
                engine.silent = True
                self._journal.event("silent", engine=name, claims=sorted(engine.claims))
            for claim in sorted(engine.claims):
                entry = self._window.entries[self._held[claim]]
                stuck = now - entry.since_s > self._claim_timeout_s
                if stuck and not silent:
                    self._journal.event("stuck", engine=name, claim=claim, pack=entry.id)
                    entry.avoid[name] = now + AVOID_HEARTBEATS * self._heartbeat_s
                if stuck or silent:
                    self._take_back(entry)
            if now - engine.heard_s > GONE_HEARTBEATS * self._heartbeat_s:
                del self._engines[name]

    def lose(self, request: Lost) -> None:
        """What a claim stored is gone; nothing happens if the pack has another claim by now."""
        entry = self._current(request.claim, request.pack)
        if entry is not None and entry.state is State.STORED and entry.bytes:
            self.lost += 1
            self._losses[entry.id] += 1
            self._journal.event("lost", rank=request.rank, claim=entry.claim, pack=entry.id, why=request.why)
            self._take_back(entry)
            if self._losses[entry.id] >= VOID_LOSSES:
                self._give_up(entry, f"lost {VOID_LOSSES} times after it was stored, the last time: {request.why}")

    def forget(self, entries: Iterable[Entry]) -> None:
        """The current claims of these packs are over, and their objects garbage."""
        for entry in entries:
            if not entry.claim:
                continue
            self._held.pop(entry.claim, None)
            if entry.engine in self._engines:
                self._engines[entry.engine].claims.discard(entry.claim)
            if entry.bytes:
                self._journal.garbage.append((entry.id, entry.claim))

    def trained(self, entries: Iterable[Entry]) -> None:
        """These packs are trained and removed; what dead claims left behind of them is garbage."""
        for entry in entries:
            self._held.pop(entry.claim, None)
            self._failures.pop(entry.id, None)
            self._losses.pop(entry.id, None)
            if entry.suspect:
                self._journal.garbage.append((entry.id, None))

    def reports(self, now: float) -> tuple[EngineReport, ...]:
        """For people."""
        return tuple(
            EngineReport(name, e.state, len(e.claims), now - e.heard_s, e.tokens_per_s, e.packs)
            for name, e in self._engines.items()
        )

    def _store(self, entry: Entry, engine: Engine, manifest: Manifest, now: float) -> None:
        stored = sum(chunk.bytes for chunk in manifest.chunks)
        if stored != entry.bytes:
            self._blame(entry, f"stored {stored} bytes instead of {entry.bytes}", Fault.PACK, now)
            return
        self._window.store(entry, manifest)
        engine.claims.discard(manifest.claim)
        engine.packs += 1
        self._journal.changed()
        self._journal.event(
            "stored",
            engine=entry.engine,
            claim=entry.claim,
            pack=entry.id,
            bytes=stored,
            seconds=round(now - entry.since_s, 3),
        )

    def _blame(self, entry: Entry, why: str, fault: Fault, now: float) -> None:
        engine = entry.engine
        self.failed += 1
        self._journal.event("failed", engine=engine, claim=entry.claim, pack=entry.id, why=why, fault=fault.value)
        self._take_back(entry)
        if fault is not Fault.FULL:
            entry.avoid[engine] = now + AVOID_HEARTBEATS * self._heartbeat_s
        if fault is not Fault.PACK:
            entry.not_before_s = now + RETRY_S
            return
        failures = self._failures.setdefault(entry.id, [])
        failures.append((engine, why))
        if len({name for name, _ in failures}) >= VOID_ENGINES or len(failures) >= VOID_FAILURES:
            self._give_up(entry, _reasons(failures))

    def _give_up(self, entry: Entry, why: str) -> None:
        self._void[entry.id] = why
        self._window.void(entry)
        self._journal.event("void", pack=entry.id, why=why)

    def _take_back(self, entry: Entry) -> None:
        self.forget([entry])
        self._window.free(entry)
        self._journal.changed()

    def _current(self, claim: int, pack: PackId) -> Entry | None:
        """The pack, if this is the claim that computes it or stored it."""
        entry = self._window.entries.get(pack)
        return entry if entry is not None and entry.claim == claim and claim else None

    def _is_own(self, claim: int, engine: str) -> bool:
        entry = self._window.entries.get(self._held.get(claim, (-1, -1)))
        return entry is not None and entry.claim == claim and entry.engine == engine


def _reasons(failures: Sequence[tuple[str, str]]) -> str:
    return "; ".join(f"{engine}: {why}" for engine, why in failures)
