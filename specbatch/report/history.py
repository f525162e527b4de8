"""The history of a run, from the events of all attempts: when each step was trained, what engines and store did, what
went wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from specbatch.metrics_lines import whole_lines
from specbatch.report.reading import RunRecord
from specbatch.timestamps import seconds_of

FAULTS = {
    "silent": "an engine is silent",
    "stuck": "an engine does not finish a pack",
    "lost": "the store lost a pack",
    "failed": "an engine failed on a pack",
    "void": "a pack was given up",
    "trouble": "something can't be written",
    "error": "the run can't continue",
}
"""Events that report a fault, with their wording."""
MOST_MARKS = 300


class _Event(msgspec.Struct):
    time: str
    event: str
    engine: str = ""
    pack: tuple[int, int] | None = None
    bytes: int = 0
    seconds: float | None = None
    step: int = 0
    generation: int = 0
    why: str = ""
    what: str = ""


@dataclass
class Mark:
    """Something that happened, on the axis of steps."""

    step: int
    """The last step that was trained before it."""
    kind: str
    """``attempt``, ``restart``, ``snapshot``, ``fault`` or ``stop``."""
    text: str
    count: int = 1


@dataclass
class History:
    """``S`` steps, as in the run's metrics."""

    time_S: np.ndarray
    """float64, seconds since 1970 at the end of the valid training of each step; NaN where events are missing."""
    attempt_S: np.ndarray
    """int64, the attempt whose training of each step is valid; 0 where events are missing."""
    store_S: np.ndarray
    """float64, bytes in the store when each step was trained; NaN where events are missing."""
    spans: dict[int, tuple[float, float]] = field(default_factory=dict)
    """When the first and the last step of each attempt ended; attempts without a step are left out."""
    trained: dict[int, int] = field(default_factory=dict)
    """Steps that each attempt trained, those that were trained again included."""
    restarted: set[int] = field(default_factory=set)
    """Attempts whose ranks were restarted."""
    busy: dict[str, np.ndarray] = field(default_factory=dict)
    """When each engine of each attempt began and finished each pack, ``[packs, 2]``."""
    alive: dict[str, tuple[float, float]] = field(default_factory=dict)
    """When each engine of each attempt was first and last heard of."""
    marks: list[Mark] = field(default_factory=list)

    def engine_idle(self, edges: np.ndarray) -> np.ndarray:
        """Share of the engines' time without a pack to compute.

        Args:
            edges: ``[N + 1]``, seconds since 1970, ascending.

        Returns:
            ``[N]``, of the time between two edges; NaN where there was no engine.
        """
        working, there = np.zeros(len(edges)), np.zeros(len(edges))
        for name, (first, last) in self.alive.items():
            there += np.clip(edges, first, last) - first
            working += _covered_until(self.busy.get(name, np.empty((0, 2))), edges)
        spans = np.diff(there)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(spans > 0, np.clip(1 - np.diff(working) / spans, 0, 1), np.nan)


def read_history(run: RunRecord) -> History:
    """Read the events of all attempts of a run."""
    count = len(run.metrics)
    found = History(np.full(count, np.nan), np.zeros(count, dtype=np.int64), np.full(count, np.nan))
    where = {int(step): i for i, step in enumerate(run.metrics.step_S)}
    marks: Counter[tuple[int, str, str]] = Counter()
    step = 0
    for attempt in run.attempts:
        if attempt.number > 1 or len(run.attempts) > 1:
            marks[step, "attempt", f"attempt {attempt.number} began"] += 1
        step = _Reader(run, attempt.number, found, where, marks, step).read()
    waited = run.metrics.scalars["snapshot_s"]
    saved = {int(step) - 1 for step in run.metrics.step_S[np.nan_to_num(waited) > 0]} | set(run.snapshots)
    marks.update((step, "snapshot", "snapshot") for step in saved)
    marks.update((step, "fault", f"step skipped: {why}") for step, why in run.metrics.skipped.items())
    void = run.metrics.step_S[run.metrics.void_S > 0]
    marks.update((int(step), "fault", "a pack trained as zero") for step in void)
    found.marks = _merged([Mark(*key, count) for key, count in sorted(marks.items())], step)
    return found


class _Reader:
    """Reads the events of one attempt into a history."""

    def __init__(
        self, run: RunRecord, attempt: int, found: History, where: dict[int, int], marks: Counter[Any], step: int
    ) -> None:
        self._run, self._attempt, self._found, self._where = run, attempt, found, where
        self._marks, self._step = marks, step
        plan = run.provenance.get("plan") or {}
        self._per_step = int(plan.get("packs_per_step") or run.setting("training.packs_per_step", 8))
        self._stored: dict[tuple[int, int], int] = {}
        """Bytes in the store, by pack."""
        self._bytes = 0
        self._busy: dict[str, list[tuple[float, float]]] = {}

    def read(self) -> int:
        """Read all events; return the last step that was trained."""
        decode = msgspec.json.Decoder(_Event, strict=False).decode
        for line in whole_lines(self._run.dir.events(self._attempt)):
            try:
                event = decode(line)
            except msgspec.DecodeError:
                continue
            self._take(event, seconds_of(event.time))
        for engine, spans in self._busy.items():
            self._found.busy[self._key(engine)] = np.array(spans)
        return self._step

    def _key(self, engine: str) -> str:
        return f"{self._attempt}/{engine}"

    def _take(self, event: _Event, now: float) -> None:
        kind = event.event
        if event.engine:
            key = self._key(event.engine)
            self._found.alive[key] = (self._found.alive.get(key, (now, now))[0], now)
        if kind == "stored" and event.pack is not None:
            if event.seconds is not None:
                self._busy.setdefault(event.engine, []).append((now - event.seconds, now))
            if event.pack[0] >= 0:
                self._bytes += event.bytes - self._stored.get(event.pack, 0)
                self._stored[event.pack] = event.bytes
        elif kind == "trained":
            self._train(event.step, now)
        elif kind == "world":
            # Restarted ranks lend new memory; objects in the old memory are gone.
            self._stored, self._bytes = {}, 0
            if event.generation:
                self._found.restarted.add(self._attempt)
                self._mark("restart", f"ranks restarted at step {event.step}")
            self._step = event.step
        elif kind == "drain":
            self._mark("stop", f"asked to stop: {event.why}")
        elif kind in FAULTS and (kind != "trouble" or event.why) and not self._is_over(kind):
            if kind == "lost" and event.pack is not None:
                self._bytes -= self._stored.pop(event.pack, 0)
            self._mark("fault", FAULTS[kind] + (f": {event.why.splitlines()[0][:160]}" if event.why else ""))

    def _is_over(self, kind: str) -> bool:
        """Whether engines are silent because all is trained, and they have ended as they should."""
        return kind == "silent" and 0 < self._run.status.steps <= self._step

    def _train(self, step: int, now: float) -> None:
        self._step = step
        at = self._where.get(step)
        if at is not None:
            self._found.time_S[at], self._found.attempt_S[at] = now, self._attempt
            self._found.store_S[at] = self._bytes
        first, _ = self._found.spans.get(self._attempt, (now, now))
        self._found.spans[self._attempt] = (first, now)
        self._found.trained[self._attempt] = self._found.trained.get(self._attempt, 0) + 1
        # A step's packs are consecutive in the plan, so the oldest ones are those that were trained.
        for pack in sorted(self._stored)[: self._per_step]:
            self._bytes -= self._stored.pop(pack)

    def _mark(self, kind: str, text: str) -> None:
        self._marks[self._step, kind, text] += 1


def _covered_until(spans: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Seconds before each edge that are in any of the spans, ``[packs, 2]``."""
    if not len(spans):
        return np.zeros(len(edges))
    ordered = spans[np.argsort(spans[:, 0])]
    ends = np.maximum.accumulate(ordered[:, 1])
    begins = np.maximum(ordered[:, 0], np.concatenate([[-np.inf], ends[:-1]]))
    ends = np.maximum(ends, begins)
    times = np.stack([begins, ends], 1).ravel()
    total = np.concatenate([[0.0], np.cumsum(np.diff(times) * (np.arange(len(times) - 1) % 2 == 0))])
    return np.interp(edges, times, total, left=0.0)


def _merged(marks: list[Mark], last: int) -> list[Mark]:
    """At most about `MOST_MARKS` marks: the closest ones of a kind are merged into one, with their number."""
    if len(marks) <= MOST_MARKS:
        return marks
    width = max(1, 5 * last // MOST_MARKS)
    merged: dict[tuple[int, str], Mark] = {}
    for mark in marks:
        found = merged.setdefault((mark.step // width, mark.kind), Mark(mark.step, mark.kind, mark.text, 0))
        found.count += mark.count
    return list(merged.values())
