"""The state machine that assigns prompts, like the dispatcher's for packs, with the same claims. Pure except `keep`.

Prompts are handed out in the order of the input, each to one engine at a time; claims of a dead engine go to others,
before new prompts. Answers are saved and forgotten: memory does not grow with the input, nor with a long answer at its
beginning.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable

from specbatch.dispatch.claims import ClaimTable, Outbox
from specbatch.dispatch.messages import (
    Answer,
    Answered,
    AnyReply,
    Beat,
    Claim,
    Done,
    Drain,
    Failed,
    Heartbeat,
    PackRequest,
    Phase,
    Prompt,
    Prompts,
    Refused,
    Report,
    StatusRequest,
    Stored,
)
from specbatch.dispatch.window import Entry, State
from specbatch.pack_manifest import Manifest, PackId
from specbatch.regenerate.rows import InputRow

Keep = Callable[[Answer], None]
"""Saves an answer durably; raises OSError if it can't."""
CLAIM_TIMEOUT_S = 7200.0
"""Seconds that a live engine may take for a conversation."""
GRANT_BYTES = 4 << 20
"""Most bytes of rows in one reply."""


class PromptWindow:
    """The prompts that are handed out or were returned.

    Args:
        rows: rows that are not answered yet, in order, each as often as it has to be answered.
        give_up: is called with a prompt that no engine can answer.
    """

    def __init__(self, rows: Iterable[tuple[PackId, InputRow]], give_up: Callable[[PackId], None]) -> None:
        self._rows, self._give_up = iter(rows), give_up
        self.entries: dict[PackId, Entry] = {}
        self.rows: dict[PackId, InputRow] = {}
        self.exhausted = False
        self._free: list[PackId] = []

    def take(self, most: int, last_step: int, usable: Callable[[Entry], bool]) -> list[Entry]:
        """Return prompts that were returned, then new ones."""
        taken: list[Entry] = []
        passed: list[PackId] = []
        while self._free and len(taken) < most:
            entry = self.entries.get(heapq.heappop(self._free))
            if entry is None or entry.state is not State.FREE:
                continue
            if usable(entry):
                taken.append(entry)
            else:
                passed.append(entry.id)
        for prompt in passed:
            heapq.heappush(self._free, prompt)
        while len(taken) < most and (found := next(self._rows, None)) is not None:
            prompt, self.rows[prompt] = found
            self.entries[prompt] = entry = Entry(prompt, 0, 0, 0)
            taken.append(entry)
        self.exhausted = self.exhausted or len(taken) < most
        return taken

    def claim(self, entry: Entry, claim: int, engine: str, now: float) -> None:
        """Hand out a free prompt."""
        entry.state, entry.claim, entry.engine, entry.since_s = State.CLAIMED, claim, engine, now

    def store(self, entry: Entry, manifest: Manifest) -> None:
        """Mark a prompt as answered."""
        entry.state = State.STORED

    def free(self, entry: Entry) -> None:
        """Make a prompt free again, before all that were never claimed."""
        entry.state, entry.claim, entry.engine = State.FREE, 0, ""
        heapq.heappush(self._free, entry.id)

    def void(self, entry: Entry) -> None:
        """Mark a prompt that no engine can answer."""
        entry.state = State.VOID
        self._give_up(entry.id)

    def shrink(self, keep_through: int) -> list[Entry]:
        """Return nothing: prompts take no room in the store."""
        return []

    def leave(self, prompt: PackId) -> None:
        """Forget a finished prompt."""
        del self.entries[prompt], self.rows[prompt]


class PromptDispatcher:
    """The state machine of an attempt that answers prompts.

    Args:
        rows: as for `PromptWindow`.
        total: number of answers for the whole input.
        done: number of answers that earlier attempts saved.
        heartbeat_s: interval of the engines' heartbeats.
    """

    def __init__(
        self, rows: Iterable[tuple[PackId, InputRow]], keep: Keep, *, total: int, done: int, heartbeat_s: float
    ) -> None:
        self._keep, self._total, self._done = keep, total, done
        self._outbox, self._void = Outbox(), dict[PackId, str]()
        self._given_up: list[PackId] = []
        self._window = PromptWindow(rows, self._given_up.append)
        self._claims = ClaimTable(
            self._window,
            self._outbox,
            itertools.count(1),
            self._void,
            heartbeat_s=heartbeat_s,
            claim_timeout_s=CLAIM_TIMEOUT_S,
        )
        self._draining = self._error = ""
        self._window.exhausted = done >= total

    def handle(self, request: PackRequest, now: float, *, last: bool = False) -> AnyReply | None:
        """Answer a request; None if it should be handled again once `version` has changed."""
        match request:
            case Claim():
                return self._claim(request, now, last)
            case Answered():
                return self._answered(request, now)
            case Failed():
                self._claims.fail(request, now, 0)
                self._bury()
                return Done()
            case Heartbeat():
                revoked = self._claims.beat(request, now)
                return Beat(self.phase, revoked)
            case Drain():
                self._draining = self._draining or request.why or "drained"
                self._outbox.changed()
                return Done()
            case StatusRequest():
                return self.report(now)
        return Refused(f"this attempt answers prompts, so it does not handle {type(request).__name__.lower()}")

    def tick(self, now: float) -> None:
        """Take back the claims of engines that are silent or stuck."""
        self._claims.tick(now)

    @property
    def version(self) -> int:
        """Changes whenever a held request may have an answer."""
        return self._outbox.version

    def take_events(self) -> list[tuple[str, dict[str, object]]]:
        """Return the events since the last call, except answers, of which there may be millions."""
        events, self._outbox.events = self._outbox.events, []
        return [event for event in events if event[0] != "stored"]

    def take_garbage(self) -> list[tuple[PackId, int | None]]:
        """Return nothing: answers are not in the store."""
        self._outbox.garbage.clear()
        return []

    @property
    def phase(self) -> Phase:
        """The phase for engines."""
        if self._draining or self._error:
            return Phase.STOP
        return Phase.TRAINED if self._window.exhausted and not self._window.entries else Phase.WORK

    def report(self, now: float) -> Report:
        """Return the state of everything, in terms of packs: a step is an answer."""
        claimed = sum(entry.state is State.CLAIMED for entry in self._window.entries.values())
        return Report(
            phase=self.phase,
            why=self._error or self._draining,
            step=self._done,
            steps=self._total,
            free=len(self._window.entries) - claimed,
            claimed=claimed,
            stored=0,
            stored_bytes=0,
            budget_bytes=0,
            engines=self._claims.reports(now),
            ranks=0,
            waiting=(),
            lost=0,
            failed=self._claims.failed,
            void=(),
            error=self._error,
        )

    def _claim(self, request: Claim, now: float, last: bool) -> AnyReply | None:
        if request.most < 1:
            return Refused(f"{request.engine} asks for {request.most} prompts")
        self._claims.hear(request.engine, now)
        if self.phase is not Phase.WORK:
            return Prompts((), self.phase)
        found: list[Prompt] = []
        size = 0
        while len(found) < request.most and size < GRANT_BYTES:
            granted = self._claims.grant(request.engine, 1, {0: ""}, 0, now)
            if not granted:
                break
            row = self._window.rows[granted[0].pack]
            found.append(Prompt(granted[0].claim, granted[0].pack, row.place, row.content))
            size += len(row.content)
        if not found and self.phase is not Phase.WORK:
            self._outbox.changed()
        return Prompts(tuple(found), self.phase) if found or last or self.phase is not Phase.WORK else None

    def _answered(self, request: Answered, now: float) -> AnyReply:
        for answer in request.answers:
            entry = self._window.entries.get(answer.prompt)
            if entry is None or entry.claim != answer.claim or entry.engine != request.engine:
                continue  # it came twice, or after the prompt was given to others
            if not self._kept(answer):
                return Refused(self._error)
            self._claims.stored(Stored(request.engine, (Manifest(answer.claim, answer.prompt, ()),)), now)
            self._leave(entry)
        if self._window.exhausted and not self._window.entries:
            self._outbox.changed()
        return Done()

    def _bury(self) -> None:
        """Save that prompts have no answer if no engine can answer them."""
        given_up, self._given_up[:] = list(self._given_up), []
        for prompt in given_up:
            if self._kept(Answer(0, prompt, reason="no engine could answer it", detail=self._void.pop(prompt, ""))):
                self._leave(self._window.entries[prompt])

    def _kept(self, answer: Answer) -> bool:
        try:
            self._keep(answer)
        except OSError as error:
            self._error = f"answers can't be written: {error}"
            self._outbox.event("error", why=self._error)
            self._outbox.changed()
            return False
        self._done += 1
        return True

    def _leave(self, entry: Entry) -> None:
        self._claims.trained([entry])
        self._window.leave(entry.id)
