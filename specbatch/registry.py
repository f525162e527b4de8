"""Which runs this user has, wherever their directories are: one small file a run in the user's state directory.

It only helps to find them. A run that is not in it lacks nothing, and what it names wrongly is passed over.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from specbatch.rundir import RunDir, write_whole


def register(run_dir: RunDir) -> None:
    """Remember a run. A home directory that can't be written to is no reason not to run."""
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


def _folder() -> Path:
    """Raises RuntimeError for a user without a home directory."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "specbatch" / "runs"
