"""The engines' side of the dispatcher: claims, from the moment they are granted until their objects are no longer
needed. Pure.

A claim is the right of one engine to compute one pack; its number is never used again. A report about any claim but a
pack's current one has no effect, except that its objects become garbage.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from specbatch.dispatch.messages import EngineReport, Failed, Fault, Granted, Heartbeat, Lost, Stored
from specbatch.dispatch.window import Entry, State
from specbatch.pack_manifest import Manifest, PackId

SILENT_HEARTBEATS = 4
"""Missed heartbeats after which an engine's claims go to others."""
UNNAMED_HEARTBEATS = 2
"""Heartbeats within which an engine must name a new claim, since its grant may have been lost on the way."""
AVOID_HEARTBEATS = 12
"""Heartbeats for which another engine is preferred after a failure."""
GONE_HEARTBEATS = 60
"""Missed heartbeats after which a silent engine is no longer reported."""
RETRY_S = 1.0
"""Delay before a pack is handed out again if it failed through no fault of its own."""
VOID_ENGINES = 2
VOID_FAILURES = 3
"""A pack is void after it failed on this many engines, or this many times in total."""
VOID_LOSSES = 10
"""A pack is void, too, after it was stored and lost this often: else a store that loses everything would go
unnoticed."""


class Claimable(Protocol):
    """A source of packs or prompts that can be claimed, such as `specbatch.dispatch.window.Window`."""

    @property
    def entries(self) -> Mapping[PackId, Entry]:
        """All entries that can be claimed, are claimed, or are stored."""
        ...

    def take(self, most: int, last_step: int, usable: Callable[[Entry], bool]) -> list[Entry]:
        """Return free entries, in order."""
        ...

    def claim(self, entry: Entry, claim: int, engine: str, now: float) -> None:
        """Hand out a free entry."""
        ...

    def store(self, entry: Entry, manifest: Manifest) -> None:
        """Mark an entry as stored by its claim."""
        ...

    def free(self, entry: Entry) -> None:
        """Make an entry free again."""
        ...

    def void(self, entry: Entry) -> None:
        """Mark an entry that no engine can compute."""
        ...

    def shrink(self, keep_through: int) -> list[Entry]:
        """Make room in a full store; return the entries that left."""
        ...


@dataclass(slots=True)
class Outbox:
    """Events and garbage that the state machine has produced and its caller has not yet taken."""

    events: list[tuple[str, dict[str, object]]] = field(default_factory=list)
    garbage: list[tuple[PackId, int | None]] = field(default_factory=list)
    """Claims (None: all claims of a pack) whose objects are no longer needed."""
    version: int = 0
    """Changes whenever a held request may have an answer."""

    def event(self, name: str, **facts: object) -> None:
        """Record an event for the log."""
        self.events.append((name, facts))

    def changed(self) -> None:
        """Note that held requests may have an answer now."""
        self.version += 1


@dataclass(slots=True)
class EngineRecord:
    """State of an engine."""

    heard_s: float
    state: str = ""
    tokens_per_s: float = 0.0
    packs: int = 0
    silent: bool = False
    claims: set[int] = field(default_factory=set)
    """The claims that it computes."""


class ClaimTable:
    """The claims of all engines.

    Args:
        numbers: source of claim numbers.
        void: packs that no engine can compute, and why; this table adds to it.
    """

    def __init__(
        self,
        window: Claimable,
        outbox: Outbox,
        numbers: itertools.count[int],
        void: dict[PackId, str],
        *,
        heartbeat_s: float,
        claim_timeout_s: float,
    ) -> None:
        self._window, self._outbox, self._numbers, self._void = window, outbox, numbers, void
        self._heartbeat_s, self._claim_timeout_s = heartbeat_s, claim_timeout_s
        self._engines: dict[str, EngineRecord] = {}
        self._held: dict[int, PackId] = {}
        self._failures: dict[PackId, list[tuple[str, str]]] = {}
        self._losses: Counter[PackId] = Counter()
        self.lost = self.failed = 0

    def hear(self, name: str, now: float) -> EngineRecord:
        """Note a sign of life of an engine; return its record."""
        engine = self._engines.get(name)
        if engine is None:
            engine = self._engines[name] = EngineRecord(now)
            self._outbox.event("engine", engine=name)
        if engine.silent:
            engine.silent = False
            self._outbox.event("heard", engine=name)
        engine.heard_s = now
        return engine

    def grant(self, name: str, most: int, segments: dict[int, str], last_step: int, now: float) -> list[Granted]:
        """Hand out packs of steps up to ``last_step``, in plan order.

        Args:
            segments: name of each rank's segment.
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
        """Mark packs as stored; those of expired claims become garbage. Return what is wrong with the request, if
        anything."""
        engine = self.hear(request.engine, now)
        for manifest in request.manifests:
            entry = self._current(manifest.claim, manifest.pack)
            if entry is None:
                self._outbox.garbage.append((manifest.pack, manifest.claim))
                self._outbox.event("late", engine=request.engine, claim=manifest.claim, pack=manifest.pack)
            elif entry.engine != request.engine:
                return f"claim {manifest.claim} is not {request.engine}'s"
            elif entry.state is State.CLAIMED:
                self._store(entry, engine, manifest, now)
        return None

    def fail(self, request: Failed, now: float, keep_through: int) -> None:
        """Take back a claim that failed.

        Args:
            keep_through: if the store is full, packs of steps up to this one stay in the window.
        """
        self.hear(request.engine, now)
        entry = self._window.entries.get(self._held.get(request.claim, (-1, -1)))
        if entry is None or entry.state is not State.CLAIMED or entry.engine != request.engine:
            return
        self._blame(entry, request.why, request.fault, now)
        if request.fault is Fault.FULL:
            self.forget(self._window.shrink(keep_through))

    def beat(self, request: Heartbeat, now: float) -> tuple[int, ...]:
        """Note an engine's heartbeat. Return the claims in it that are no longer the engine's."""
        engine = self.hear(request.engine, now)
        engine.state, engine.tokens_per_s = request.state, request.tokens_per_s
        for claim in sorted(engine.claims.difference(request.claims)):
            entry = self._window.entries[self._held[claim]]
            if now - entry.since_s > UNNAMED_HEARTBEATS * self._heartbeat_s:
                self._outbox.event("unnamed", engine=request.engine, claim=claim, pack=entry.id)
                self._take_back(entry)
        return tuple(claim for claim in request.claims if not self._is_own(claim, request.engine))

    def tick(self, now: float) -> None:
        """Take back the claims of engines that are silent or stuck."""
        for name, engine in list(self._engines.items()):
            silent = now - engine.heard_s > SILENT_HEARTBEATS * self._heartbeat_s
            if silent and not engine.silent:
                engine.silent = True
                self._outbox.event("silent", engine=name, claims=sorted(engine.claims))
            for claim in sorted(engine.claims):
                entry = self._window.entries[self._held[claim]]
                stuck = now - entry.since_s > self._claim_timeout_s
                if stuck and not silent:
                    self._outbox.event("stuck", engine=name, claim=claim, pack=entry.id)
                    entry.avoid[name] = now + AVOID_HEARTBEATS * self._heartbeat_s
                if stuck or silent:
                    self._take_back(entry)
            if now - engine.heard_s > GONE_HEARTBEATS * self._heartbeat_s:
                del self._engines[name]

    def lose(self, request: Lost) -> None:
        """Take back a stored pack whose objects are lost. No effect if the pack has another claim by now."""
        entry = self._current(request.claim, request.pack)
        if entry is not None and entry.state is State.STORED and entry.bytes:
            self.lost += 1
            self._losses[entry.id] += 1
            self._outbox.event("lost", rank=request.rank, claim=entry.claim, pack=entry.id, why=request.why)
            self._take_back(entry)
            if self._losses[entry.id] >= VOID_LOSSES:
                self._give_up(entry, f"lost {VOID_LOSSES} times after it was stored, the last time: {request.why}")

    def forget(self, entries: Iterable[Entry]) -> None:
        """End the current claims of these packs; their objects become garbage."""
        for entry in entries:
            if not entry.claim:
                continue
            self._held.pop(entry.claim, None)
            if entry.engine in self._engines:
                self._engines[entry.engine].claims.discard(entry.claim)
            if entry.bytes:
                self._outbox.garbage.append((entry.id, entry.claim))

    def trained(self, entries: Iterable[Entry]) -> None:
        """Forget packs that are trained and removed; objects that dead claims left of them become garbage."""
        for entry in entries:
            self._held.pop(entry.claim, None)
            self._failures.pop(entry.id, None)
            self._losses.pop(entry.id, None)
            if entry.suspect:
                self._outbox.garbage.append((entry.id, None))

    def reports(self, now: float) -> tuple[EngineReport, ...]:
        """Return a report on each engine, for people."""
        return tuple(
            EngineReport(name, e.state, len(e.claims), now - e.heard_s, e.tokens_per_s, e.packs)
            for name, e in self._engines.items()
        )

    def _store(self, entry: Entry, engine: EngineRecord, manifest: Manifest, now: float) -> None:
        stored = sum(chunk.bytes for chunk in manifest.chunks)
        if stored != entry.bytes:
            self._blame(entry, f"stored {stored} bytes instead of {entry.bytes}", Fault.PACK, now)
            return
        self._window.store(entry, manifest)
        engine.claims.discard(manifest.claim)
        engine.packs += 1
        self._outbox.changed()
        self._outbox.event(
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
        self._outbox.event("failed", engine=engine, claim=entry.claim, pack=entry.id, why=why, fault=fault.value)
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
        self._outbox.event("void", pack=entry.id, why=why)

    def _take_back(self, entry: Entry) -> None:
        self.forget([entry])
        self._window.free(entry)
        self._outbox.changed()

    def _current(self, claim: int, pack: PackId) -> Entry | None:
        """Return the entry of a pack if this is the claim that computes it or has stored it, else None."""
        entry = self._window.entries.get(pack)
        return entry if entry is not None and entry.claim == claim and claim else None

    def _is_own(self, claim: int, engine: str) -> bool:
        entry = self._window.entries.get(self._held.get(claim, (-1, -1)))
        return entry is not None and entry.claim == claim and entry.engine == engine


def _reasons(failures: Sequence[tuple[str, str]]) -> str:
    return "; ".join(f"{engine}: {why}" for engine, why in failures)
