"""A process whose parent is already dead does not start its work."""

from __future__ import annotations

import os
import subprocess
import sys

from specbatch import parent_death


def started_by(parent: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-S", parent_death.__file__, str(parent), "/bin/echo", "here"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_runs_only_if_its_parent_is_there() -> None:
    assert started_by(os.getpid()).stdout == "here\n"
    gone = started_by(os.getpid() + 1)
    assert (gone.returncode, gone.stdout) == (1, "")
