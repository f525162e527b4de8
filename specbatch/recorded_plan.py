"""A run that trains a new draft on recorded steps of another run: its mark, and its plan. It has no engines and no
store: its ranks read the recordings.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from specbatch.config import Config, load_config
from specbatch.rundir import RunDir

if TYPE_CHECKING:
    from specbatch.corpus import Corpus
    from specbatch.pack_manifest import PackId
    from specbatch.plan import Pack, PackPlan


class RecordingSource(msgspec.Struct, frozen=True):
    """The recorded steps that a draft is trained on: ``recording.json`` of its run directory."""

    run: str
    """The recorded run."""
    first: int
    count: int


def recording_source(run_dir: RunDir) -> RecordingSource | None:
    """Return the recorded steps that a run trains on; None if engines compute its packs."""
    if not run_dir.recording.exists():
        return None
    return msgspec.json.decode(run_dir.recording.read_bytes(), type=RecordingSource)


def plan_of_run(run_dir: RunDir, config: Config, corpus: Corpus) -> PackPlan:
    """Return the plan of a run, the same in every process, with engines or recordings as the source of packs."""
    from specbatch.corpus import make_plan

    source = recording_source(run_dir)
    if source is None:
        return make_plan(config, corpus)
    recorded = RunDir(Path(source.run))
    return RecordedPlan(make_plan(load_config(recorded.config), corpus), source, config.training.epochs)


class RecordedPlan:
    """Repeats the recorded steps of a plan; step 1 is the first of them (`specbatch.plan.PackPlan`).

    Args:
        epochs: passes over them.
    """

    heldout: tuple[Pack, ...] = ()

    def __init__(self, plan: PackPlan, source: RecordingSource, epochs: int) -> None:
        self._plan, self.source, self.epochs = plan, source, epochs

    @property
    def packs_per_step(self) -> int:
        return self._plan.packs_per_step

    @property
    def steps(self) -> int:
        return self.source.count * self.epochs

    def recorded(self, step: int) -> int:
        """Return the recorded step that a step repeats."""
        return self.source.first + (step - 1) % self.source.count

    def packs(self, step: int) -> list[Pack]:
        return self._plan.packs(self.recorded(step))

    def step_of(self, pack: PackId) -> int:
        """Return the first step that trains a pack."""
        return self._plan.step_of(pack) - self.source.first + 1

    def assign(self, step: int, ranks: int) -> list[list[Pack]]:
        return self._plan.assign(self.recorded(step), ranks)

    def assign_heldout(self, ranks: int) -> list[list[Pack]]:
        return [[] for _ in range(ranks)]

    def tokens(self, pack: Pack) -> int:
        return self._plan.tokens(pack)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that determines the plan."""
        recorded = {"first": self.source.first, "count": self.source.count, "epochs": self.epochs}
        return {**self._plan.fingerprint, "recorded": recorded}
