"""Changes settings of a run that continues: refused if that would be another training, otherwise recorded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict

from specbatch.config import Config, dump_config, load_config
from specbatch.config.change import Change, changes, refuse_fixed
from specbatch.recorded_plan import recording_source
from specbatch.run.from_recording import check_recorded
from specbatch.rundir import RunDir, read_json, write_json, write_whole
from specbatch.timestamps import timestamp


def change_settings(run_dir: RunDir, overrides: Sequence[str], here: bool = True) -> tuple[Config, list[Change]]:
    """Override settings of an existing run: its ``config.yaml`` is rewritten, and ``provenance.json`` lists what
    changed, when and before which attempt.

    Args:
        overrides: as on the command line: ``--section.field value``, ...
        here: whether the run continues on this machine.

    Returns:
        the settings that the run continues with, and what changed.

    Raises:
        UserError: a setting can't be changed, or can't work.
    """
    old = load_config(run_dir.config)
    new = load_config(run_dir.config, overrides)
    found, source = changes(old, new), recording_source(run_dir)
    if source is not None:
        check_recorded(source, new)
    if not found:
        return old, found
    from specbatch.checks import check
    from specbatch.metrics_lines import last_step

    refuse_fixed(found, old.training.schedule, last_step(run_dir.metrics))
    for warning in check(new, new_run=False, here=here) if source is None else []:
        print(f"specbatch: warning: {warning}", file=sys.stderr)
    tell_changes(run_dir, found)
    write_whole(run_dir.config, dump_config(new).encode())
    return new, found


def tell_changes(run_dir: RunDir, found: Sequence[Change]) -> None:
    """List in ``provenance.json`` the changes that apply from the next attempt on."""
    made_from = read_json(run_dir.provenance)
    if made_from is None or not found:
        return
    entry = {
        "time": timestamp(),
        "before_attempt": max(run_dir.attempts(), default=0) + 1,
        "changes": [asdict(change) for change in found],
    }
    write_json(run_dir.provenance, {**made_from, "changed": [*made_from.get("changed", []), entry]})
