"""The window: packs after the last trained step, as many as fit into the store. Pure.

Packs enter in plan order and leave with their step. A pack's bytes stay reserved from entering to leaving, whatever
happens to it, so stored bytes never exceed the capacity of the store.

After each restart, held-out packs come before all others. They are needed for the first step and leave with it, once
the ranks have copied them.
"""

from __future__ import annotations

import enum
import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from specbatch.pack_manifest import Manifest, PackId
from specbatch.plan import Pack, PackPlan


class State(enum.Enum):
    """State of a pack in the window."""

    FREE = "free"
    CLAIMED = "claimed"
    STORED = "stored"
    VOID = "void"


@dataclass(slots=True)
class Entry:
    """A pack in the window."""

    id: PackId
    step: int
    """Step that trains the pack; 0 for held-out packs, which are not trained."""
    rank: int
    """Rank that stores the pack in its memory until it is trained; one of those that train it."""
    bytes: int
    state: State = State.FREE
    claim: int = 0
    """Claim that computes or has stored the pack."""
    engine: str = ""
    since_s: float = 0.0
    """Time of the claim."""
    manifest: Manifest | None = None
    not_before_s: float = 0.0
    """Time before which the pack is not handed out."""
    avoid: dict[str, float] = field(default_factory=dict)
    """Engines to avoid for this pack, each with the time until which others are preferred."""
    suspect: bool = False
    """Whether the store may have objects of dead claims."""


class Window:
    """The packs that have entered, and which of them can be handed out.

    Args:
        steps: last step of the plan to be trained.
        bytes_of: returns the bytes that the pack ``(epoch, index)`` with these samples will occupy in the store.
        void: packs that train as zero, and why; owned by the caller, who may add to it.
        new_claim: returns claim numbers for packs that need no engine.
        ranks_per_pack: ranks that train each pack together: consecutive ones, which take turns in storing packs.
    """

    def __init__(
        self,
        plan: PackPlan,
        steps: int,
        bytes_of: Callable[..., int],
        void: dict[PackId, str],
        new_claim: Callable[[], int],
        ranks_per_pack: int = 1,
    ) -> None:
        self._ranks_per_pack = ranks_per_pack
        self._plan, self.steps, self._bytes_of = plan, steps, bytes_of
        self._void, self._new_claim = void, new_claim
        self.step = 0
        """The last step that all ranks trained."""
        self.capacity = self.budget = self.reserved = 0
        self.error = ""
        """Why the next step can never be stored."""
        self.entries: dict[PackId, Entry] = {}
        self._ranks = 0
        self._admitted: deque[Entry] = deque()
        self._ahead: deque[Entry] = deque()
        self._ahead_step = 0
        self._free: list[PackId] = []
        self._ready: dict[int, int] = {}
        self._suspects: set[PackId] = set()

    def restart(self, step: int, ranks: int, capacity: int) -> list[Entry]:
        """Restart after ``step``, with ``capacity`` bytes; nothing is handed out while ``ranks`` is 0.

        Returns:
            the entries that were in the window.
        """
        dropped = list(self._admitted)
        # Those ahead may also have been in the window, before the store was full.
        self._suspects.update(entry.id for entry in [*dropped, *self._ahead] if entry.claim or entry.suspect)
        self.step = self._ahead_step = step
        self._ranks, self.capacity, self.budget, self.reserved, self.error = ranks, capacity, capacity, 0, ""
        self.entries.clear()
        self._admitted.clear()
        self._ahead.clear()
        self._free.clear()
        self._ready.clear()
        if ranks:
            self._ahead.extend(self._heldout(ranks))
            self._ready[0] = 0
        return dropped

    def extend(self, more: int) -> int:
        """Let packs enter: always those of the next step, and ``more`` free ones within the budget.

        Returns:
            number of packs that entered and can be handed out.
        """
        entered = 0
        while self._ranks and (self._ahead or self._ahead_step < self.steps):
            if not self._ahead and not self._look_ahead():
                break
            entry = self._ahead[0]
            if entry.step > self.step + 1 and (entered >= more or self.reserved + entry.bytes > self.budget):
                break
            self._enter(self._ahead.popleft())
            entered += entry.state is State.FREE
        return entered

    def take(self, most: int, last_step: int, usable: Callable[[Entry], bool]) -> list[Entry]:
        """Return ``usable`` free packs of steps up to ``last_step``, in plan order."""
        taken: list[Entry] = []
        passed: list[PackId] = []
        while self._free and len(taken) < most:
            pack = heapq.heappop(self._free)
            entry = self.entries.get(pack)
            if entry is None or entry.state is not State.FREE or (taken and entry is taken[-1]):
                continue
            if entry.step > last_step:
                passed.append(pack)
                break
            if usable(entry):
                taken.append(entry)
            elif not passed or passed[-1] != pack:
                passed.append(pack)
        for pack in passed:
            heapq.heappush(self._free, pack)
        return taken

    def claim(self, entry: Entry, claim: int, engine: str, now: float) -> None:
        """Hand out a free pack."""
        entry.state, entry.claim, entry.engine, entry.since_s = State.CLAIMED, claim, engine, now

    def store(self, entry: Entry, manifest: Manifest) -> None:
        """Mark an entry as stored by its claim."""
        entry.state, entry.manifest = State.STORED, manifest
        self._ready[entry.step] += 1

    def free(self, entry: Entry) -> None:
        """Make an entry free again; in plan order it comes before all that were never claimed."""
        if entry.state is State.STORED:
            self._ready[entry.step] -= 1
        entry.state, entry.manifest, entry.claim, entry.engine = State.FREE, None, 0, ""
        entry.suspect = True
        heapq.heappush(self._free, entry.id)

    def void(self, entry: Entry) -> None:
        """Mark an entry that no engine can compute."""
        entry.state, entry.manifest, entry.claim, entry.engine = State.VOID, None, 0, ""
        self._ready[entry.step] += 1

    def complete(self, step: int) -> bool:
        """Return whether all packs of a step, and held-out packs that have not left yet, are stored or void."""
        heldout = len(self._plan.heldout)
        return self._ready.get(step, 0) == self._plan.packs_per_step and self._ready.get(0, heldout) == heldout

    def leave(self) -> list[Entry]:
        """Remove the packs of the next step, which is trained, and return them."""
        self.step += 1
        left: list[Entry] = []
        while self._admitted and self._admitted[0].step <= self.step:
            entry = self._admitted.popleft()
            del self.entries[entry.id]
            self._suspects.discard(entry.id)
            self.reserved -= entry.bytes
            left.append(entry)
        self._ready.pop(self.step, None)
        self._ready.pop(0, None)
        self.budget = min(self.capacity, self.budget + self.capacity // 100)
        return left

    def shrink(self, keep_through: int) -> list[Entry]:
        """Reduce the budget by a tenth, since the store was full before it was used up.

        Args:
            keep_through: packs of steps up to this one always stay.

        Returns:
            the last packs in plan order, which left the window and will enter it again later; with their old state.
        """
        keep_through = max(keep_through, self.step + 1)
        self.budget = self.budget * 9 // 10
        left: list[Entry] = []
        while self.reserved > self.budget and self._admitted and self._admitted[-1].step > keep_through:
            entry = self._admitted.pop()
            del self.entries[entry.id]
            self.reserved -= entry.bytes
            if entry.state in (State.STORED, State.VOID):
                self._ready[entry.step] -= 1
            again = Entry(entry.id, entry.step, entry.rank, entry.bytes, suspect=True, avoid=entry.avoid)
            self._ahead.appendleft(again)
            left.append(entry)
        return left

    def count(self) -> dict[State, int]:
        """Return the number of packs in each state."""
        counts = dict.fromkeys(State, 0)
        for entry in self._admitted:
            counts[entry.state] += 1
        return counts

    def _enter(self, entry: Entry) -> None:
        self._admitted.append(entry)
        self.entries[entry.id] = entry
        self.reserved += entry.bytes
        self._ready.setdefault(entry.step, 0)
        if entry.id in self._void:
            self.void(entry)
        elif not entry.bytes:
            entry.claim = self._new_claim()
            self.store(entry, Manifest(entry.claim, entry.id, ()))
        else:
            heapq.heappush(self._free, entry.id)

    def _look_ahead(self) -> bool:
        """Compute the packs of the next step; return false if the store can't hold all of them at once."""
        step = self._ahead_step + 1
        together = self._ranks_per_pack
        rank_of = {
            pack.id: group * together + turn % together
            for group, packs in enumerate(self._plan.assign(step, self._ranks // together))
            for turn, pack in enumerate(packs)
        }
        entries = [self._entry(pack, step, rank_of[pack.id]) for pack in self._plan.packs(step)]
        needed = sum(entry.bytes for entry in entries)
        heldout = self.reserved if step == self.step + 1 else 0
        needed += heldout
        if needed > self.capacity:
            if step == self.step + 1:
                self.error = (
                    f"step {step} needs {needed} bytes in the store at once"
                    f"{f', {heldout} of them for held-out packs' if heldout else ''}, and the memory that "
                    f"{self._ranks} ranks lend it holds {self.capacity}: raise store.bytes_per_rank by a factor of "
                    f"{needed / max(self.capacity, 1):.2f}, or lower training.packs_per_step"
                )
            return False
        self._ahead_step = step
        self._ahead.extend(entries)
        return True

    def _heldout(self, ranks: int) -> list[Entry]:
        """Return the held-out packs, in the plan's order."""
        dealt = enumerate(self._plan.assign_heldout(ranks))
        return sorted((self._entry(pack, 0, rank) for rank, packs in dealt for pack in packs), key=lambda e: e.id)

    def _entry(self, pack: Pack, step: int, rank: int) -> Entry:
        size = self._bytes_of(pack) if pack.samples else 0
        return Entry(pack.id, step, rank, size, suspect=pack.id in self._suspects)
