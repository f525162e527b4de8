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

from specbatch.pack_manifest import PackId
from specbatch.plan import Plan
from tests.dispatch.cluster import make_plan
from tests.faults.actors import RANKS, Broken
from tests.faults.attempt import Attempt

PATIENCE_S = 400.0
"""Longest simulated time without a trained step, after the last fault; stuck claims alone take 60 s."""
FAULTS_A_SECOND = 2.0


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
