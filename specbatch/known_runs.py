"""The user's runs, wherever their directories are: one small file for each run in the user's state directory.

The list only helps to find runs. A run that is missing from it works as well, and wrong entries are skipped.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from specbatch.rundir import RunDir, write_whole


def register(run_dir: RunDir) -> None:
    """Add a run to the list. A home directory that can't be written to does not prevent the run."""
    root = run_dir.root.absolute()
    with contextlib.suppress(OSError, RuntimeError):
        write_whole(_folder() / hashlib.sha256(os.fsencode(root)).hexdigest()[:16], os.fsencode(root))


def known_runs() -> list[RunDir]:
    """Runs that were registered and are still there, and those in ``runs/`` of the current directory."""
    paths = {Path(os.fsdecode(file.read_bytes())) for file in _files()}
    paths |= {config.parent.absolute() for config in Path("runs").glob("*/config.yaml")}
    return [run_dir for run_dir in map(RunDir, sorted(paths)) if run_dir.config.is_file()]


def _files() -> list[Path]:
    with contextlib.suppress(OSError, RuntimeError):
        return [path for path in _folder().iterdir() if not path.name.startswith(".")]
    return []


def state_folder() -> Path:
    """Return the folder for state of this user. Raises RuntimeError if the user has no home directory."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "specbatch"


def _folder() -> Path:
    return state_folder() / "runs"
