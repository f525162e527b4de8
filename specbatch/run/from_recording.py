"""Starts a run that trains its draft on recorded steps of another run, and checks what has to stay as recorded.

Otherwise it is an ordinary run: prepared, started, watched, stopped, resumed and exported like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from specbatch.config import Config, dump_config, load_config
from specbatch.config.change import changes
from specbatch.errors import UserError
from specbatch.recorded_plan import RecordingSource, recording_source
from specbatch.rundir import RunDir, read_json, write_json, write_whole

ANEW = ("--training.epochs=1", "--training.max_steps=null", "--snapshot.record=0")
"""Settings that are not taken from the recorded run."""
CAPTURED_WITH = ("target", "data", "draft.aux_layers", "training.packs_per_step", "training.tokens_per_pack")
"""Sections and fields that the recordings depend on."""


def begin(recorded: RunDir, out: RunDir, overrides: Sequence[str]) -> None:
    """Create the directory of a run that trains a new draft on the recorded steps of another, in their order,
    ``training.epochs`` times (default: once). An existing one is left unchanged.

    Args:
        out: run directory of the new draft.
        overrides: settings that differ from the recorded run's.

    Raises:
        UserError: nothing is recorded, a setting can't work or can't be changed, or the directory is another run's.
    """
    from specbatch.snapshot.recording import consecutive, recorded_steps

    source = recording_source(out)
    if out.config.exists():
        if source is None or source.run != str(recorded.root):
            raise UserError(f"run.dir: {out.root} is another run; give another run.dir")
        return
    if source is None and out.foreign:
        raise UserError(f"{out.root}: has other files ({out.foreign[0]}); give a new or empty directory")
    config = load_config(recorded.config, [*ANEW, *overrides, f"--run.dir={out.root}"])
    steps = recorded_steps(recorded.recordings)
    if not steps:
        raise UserError(f"{recorded.root}: has no recorded steps; record some with snapshot.record")
    source = RecordingSource(str(recorded.root), steps[0], consecutive(steps, steps[0]))
    check_recorded(source, config)
    out.make()
    write_json(out.recording, msgspec.to_builtins(source))
    write_json(out.corpus, read_json(recorded.corpus))
    write_whole(out.config, dump_config(config).encode())


def check_recorded(source: RecordingSource, config: Config) -> None:
    """Check that a draft can be trained on recorded steps with these settings.

    Raises:
        UserError: steps are gone, or a setting differs from the recording, or can't work.
    """
    from specbatch.drafts.base import algorithm_of
    from specbatch.snapshot.recording import recorded_steps
    from specbatch.target import read_target
    from specbatch.training.preflight import check_memory, check_ranks

    recorded = RunDir(Path(source.run))
    if not recorded.config.exists():
        raise UserError(f"{recorded.root}: the recorded run no longer exists")
    there = recorded_steps(recorded.recordings)
    gone = [step for step in range(source.first, source.first + source.count) if step not in there]
    if gone:
        raise UserError(
            f"{recorded.root}: the recorded steps {gone}, on which the draft in {config.run.dir} is trained, no longer "
            "exist (a run keeps only its last ones); give another run.dir"
        )
    wrong = [
        change
        for change in changes(load_config(recorded.config), config)
        if change.field in CAPTURED_WITH or change.field.partition(".")[0] in CAPTURED_WITH
    ]
    if wrong:
        named = "; ".join(f"{change.field} was {change.was} and would be {change.now}" for change in wrong)
        raise UserError(f"{wrong[0].field}: the recordings depend on it: {named}; leave it out")
    if config.snapshot.record:
        raise UserError("snapshot.record: recorded steps are not recorded again; set it to 0, or leave it out")
    check_ranks(config)
    check_memory(config, algorithm_of(config, read_target(config.target.path)))
