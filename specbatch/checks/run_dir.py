"""The run directory: it is new or a run of the same draft, and its disk has room for recordings."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from specbatch.config import Config
from specbatch.drafts.base import Algorithm, CaptureContract
from specbatch.errors import UserError
from specbatch.rundir import RunDir
from specbatch.units import bytes_text

if TYPE_CHECKING:
    from specbatch.plan import Plan


def check_run_dir(config: Config) -> None:
    """Check that a new run can have its directory.

    Raises:
        UserError: it is a run already, has other files, or can't be written.
    """
    root = Path(config.run.dir)
    if root.exists() and not root.is_dir():
        raise UserError(f"run.dir: {root} is a file; give another path")
    if (root / "config.yaml").exists() and any((root / "attempts").glob("*")):
        raise UserError(
            f"run.dir: {root} exists already as a run; continue it with `specbatch resume {root}`, or give another "
            "run.dir"
        )
    # Data may have been prepared before the run begins.
    cache = Path(config.data.cache_dir).expanduser().absolute() if config.data.cache_dir else None
    foreign = [
        name for name in RunDir(root).foreign if cache is None or not cache.is_relative_to(root.absolute() / name)
    ]
    if foreign:
        shown = ", ".join(foreign[:3]) + (" ..." if len(foreign) > 3 else "")
        raise UserError(
            f"run.dir: {root} has files that do not belong to a run ({shown}) and could be overwritten; give the path "
            "of a new or empty directory"
        )
    parent = next(folder for folder in (root, *root.parents) if folder.is_dir())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"run.dir: {root}: no permission to write in {parent}; give another run.dir")


def check_snapshot(folder: Path, algorithm: Algorithm) -> None:
    """Check that a run's snapshots belong to the draft that it is going to train.

    Args:
        folder: the snapshots.

    Raises:
        UserError: they belong to another one.
    """
    from specbatch.snapshot.manifest import differences, read_manifest, snapshot_path, whole_snapshots

    for step in whole_snapshots(folder)[-1:]:
        snapshot = snapshot_path(folder, step)
        before, now = read_manifest(snapshot).facts.get("draft", {}), algorithm.facts()
        if before.get("algorithm", now["algorithm"]) != now["algorithm"]:
            raise UserError(
                f"draft.algorithm: {now['algorithm']} can't continue from {snapshot}, which has a draft of "
                f"{before['algorithm']}; set draft.algorithm: {before['algorithm']}, or start a new run with another "
                "run.dir"
            )
        if changed := differences({"draft": before}, {"draft": now}):
            raise UserError(
                f"{snapshot} belongs to another training: {'; '.join(changed)}; set these back, or start a new run "
                "with another run.dir"
            )


def check_recording(config: Config, plan: Plan, contract: CaptureContract) -> str | None:
    """Return a text that says how many bytes recordings will take at most; None if nothing is recorded.

    Raises:
        UserError: the disk of the run directory has less room.
    """
    keep = config.snapshot.record
    if not keep:
        return None
    # Rows, and an id and a mask for each token. While a step is written, there is one more than are kept.
    each = contract.bytes_per_token + 9
    tokens = int(plan.step_sums(plan.lengths, plan.steps).max())
    most = (keep + 1) * tokens * each
    free = shutil.disk_usage(next(folder for folder in Path(config.run.dir).absolute().parents if folder.is_dir())).free
    if most > free:
        raise UserError(
            f"snapshot.record: {keep} steps of up to {tokens} tokens are {bytes_text(most)}, but {config.run.dir} has "
            f"{bytes_text(free)} free; record at most {max(0, int(free / (tokens * each)) - 1)}, or make room"
        )
    return f"recording the last {keep} steps in at most {bytes_text(most)}; {bytes_text(free)} are free"
