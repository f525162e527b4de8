"""Checks each node before an attempt's components start: ``python -m specbatch.doctor.quick COMPONENT``.

A failure here would happen in every attempt, so it becomes the task's final record. Nothing heavy is imported.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

from specbatch.config import load_config
from specbatch.doctor.finding import guarded
from specbatch.doctor.site import QUICK, CheckTask
from specbatch.errors import UserError
from specbatch.run.attempts import read_attempt
from specbatch.run.exit_records import ExitRecord, write_exit_record
from specbatch.rundir import RunDir
from specbatch.slurm.task import Name

LONGEST_S = 100
"""Time limit in seconds. If a file system hangs, a signal ends the process, and the attempt starts nevertheless."""


def main(component: Name) -> int:
    """Run one task's checks, in the run directory; return the exit code."""
    signal.alarm(LONGEST_S)
    run_dir = RunDir(Path.cwd())
    attempt, task = int(os.environ["SPECBATCH_ATTEMPT"]), int(os.environ["SLURM_PROCID"])
    began, node = read_attempt(run_dir, attempt), socket.gethostname()
    place = CheckTask(
        load_config(run_dir.config),
        component,
        run_dir.root,
        task,
        int(os.environ.get("SLURM_LOCALID", "0")),
        tuple({name for of in began.nodes.values() for name in of} if began else ()),
    )
    for what, check in QUICK:
        for finding in guarded(what, lambda check=check: check(place)):  # type: ignore[misc]
            if finding.verdict == "failed":
                why = finding.found if node in finding.found else f"{finding.found} (on {node})"
                why += f"; {finding.remedy}" if finding.remedy else ""
                write_exit_record(run_dir, attempt, ExitRecord(component, task, why))
                return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1]))  # type: ignore[arg-type]
    except UserError as error:
        sys.exit(f"{sys.argv[1]}: {error}")
