"""Faults by the hundred: runs one after the other, each disturbed from a seed and compared with one that was not."""

from __future__ import annotations

import itertools
import math
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from specbatch.compare import compare, report
from specbatch.rundir import RunDir
from tests.faults.clock import Clock
from tests.faults.kinds import KINDS, Kind
from tests.faults.scene import Scene
from tests.faults.tally import KEPT, Tally, read, write

HASTY = 0.1
"""Share of the faults that do not wait until the one before is over."""
TRIES = 40
"""Number of times that a fault looks for something to hit, a little later each time."""


class Campaign:
    """Runs, faults and what came of them.

    Args:
        folder: for all runs; those that differ or did not recover stay there. What earlier campaigns counted there is
            added to.
        steps: of each run.
        say: called with what happens.
    """

    def __init__(
        self,
        folder: Path,
        target: Path,
        seed: int,
        steps: int,
        say: Callable[[str], None] = print,
        kinds: Sequence[Kind] = KINDS,
    ) -> None:
        self.folder, self.target, self.steps, self.say = folder, target, steps, say
        self._kept = folder / KEPT
        self.tallies: dict[str, Tally] = defaultdict(Tally)
        self.runs = 0
        if self._kept.exists():
            self.runs, known = read(self._kept)
            self.tallies.update(known)
        self._seed = seed
        self._clock = Clock(folder)
        self._schedule = itertools.islice(schedule(seed, kinds), self.injected(), None)
        self._next: Kind | None = None

    def undisturbed(self) -> RunDir:
        """The run to compare with."""
        scene = Scene(self.folder / "undisturbed", self.target, self.steps)
        try:
            scene.go_on()
            scene.finish()
        finally:
            scene.kill()
        return scene.run_dir

    def disturb(self, faults: int, expected: RunDir, prompts: int = 0, seconds: float = math.inf) -> None:
        """One run with so many faults, or as many as happen before its end.

        Args:
            seconds: since the run's start, after which no fault is begun.

        Raises:
            AssertionError: it did not recover, or came to something else.
        """
        self.runs += 1
        self._clock.set(0)
        # An earlier campaign may have been ended in the middle of it.
        shutil.rmtree(self.folder / f"run-{self.runs}", ignore_errors=True)
        scene = Scene(self.folder / f"run-{self.runs}", self.target, self.steps, self._clock, prompts)
        until = time.monotonic() + seconds
        try:
            scene.go_on()
            open_faults: list[Kind] = []
            if scene.await_step():
                self._inject(scene, faults, until, open_faults)
            if prompts:
                self._kill_evaluator(scene)
            scene.finish()
        finally:
            scene.kill()
        for kind in open_faults:
            self.tallies[kind.name].recovered += 1
        history = scene.trained()
        found = compare(expected, scene.run_dir)
        if not found.equal or found.steps != self.steps or found.snapshot != self.steps:
            raise AssertionError("\n".join([f"run {self.runs} in {scene.folder} differs", *report(found)]))
        write(self._kept, self.runs, self.tallies)
        shutil.rmtree(scene.folder)
        again = len(history) - self.steps
        self.say(f"run {self.runs}: equal to the last bit, {scene.starts} starts, {again} steps trained again")

    def injected(self) -> int:
        """Faults so far."""
        return sum(tally.count for tally in self.tallies.values())

    def _inject(self, scene: Scene, faults: int, until: float, open_faults: list[Kind]) -> None:
        """Faults until so many were injected or the run has ended; those not waited for are left in ``open_faults``."""
        for _ in range(faults):
            if time.monotonic() > until:
                return
            kind, self._next = self._next or next(self._schedule), None
            draw = random.Random(f"{self._seed}/{self.injected()}")
            time.sleep(draw.uniform(0.0, 0.3))
            # In this order: of a step that ends between, the sign is old.
            trained, after, began = len(scene.trained()), scene.marks(), time.monotonic()
            if not self._hit(scene, kind, draw):
                self._next = kind
                return
            self.tallies[kind.name].count += 1
            open_faults.append(kind)
            if draw.random() < HASTY:
                self.say(f"{kind.name}: and at once the next")
                continue
            if not scene.await_signs(kind.back, after):
                return
            history = scene.trained()
            again = max(0, max(history[:trained]) - min(history[trained:]) + 1)
            tally = self.tallies[kind.name]
            tally.retrained.append(again)
            tally.seconds.append(time.monotonic() - began)
            self.say(f"{kind.name}: step {max(history)}, {again} again, {tally.seconds[-1]:.1f} s")
            for recovered in open_faults:
                self.tallies[recovered.name].recovered += 1
            open_faults.clear()

    def _hit(self, scene: Scene, kind: Kind, draw: random.Random) -> bool:
        """Inject, as soon as there is something to hit; False if the run ended before."""
        for _ in range(TRIES):
            if scene.ended() or max(scene.trained(), default=0) >= self.steps - 1:
                return False
            if scene.stage() == kind.stage and kind.inject(scene, draw):
                return True
            if not scene.await_step():
                return False
        self.say(f"{kind.name}: there was nothing to hit in {TRIES} steps; the next run begins with it")
        return False

    def _kill_evaluator(self, scene: Scene) -> None:
        kind = next(kind for kind in KINDS if kind.stage == "evaluating")
        while not scene.ended():
            if scene.stage() == kind.stage and kind.inject(scene, random.Random(0)):
                self.tallies[kind.name].count += 1
                # The run ends as it should, or `finish` raises.
                self.tallies[kind.name].recovered += 1
                return
            time.sleep(0.1)


def schedule(seed: int, kinds: Sequence[Kind]) -> Iterator[Kind]:
    """Kinds without end: at first each once, those before that cost least, then as their weights say."""
    draw = random.Random(seed)
    drawn = [kind for kind in kinds if kind.weight]
    draw.shuffle(drawn)
    yield from sorted(drawn, key=lambda kind: -kind.weight)
    while True:
        yield draw.choices(drawn, [kind.weight for kind in drawn])[0]
