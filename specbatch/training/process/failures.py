"""Counts the failures of a run so far, from the files of its attempts."""

from __future__ import annotations

from specbatch.rundir import RunDir
from specbatch.status_file import read_status

IN_ORDER = ("completed", "stopped")
"""Ends of an attempt that lose no step."""


def failures(run_dir: RunDir, attempt: int) -> tuple[int, float]:
    """Return the number of earlier attempts that ended without a snapshot of their last step, and the seconds that all
    earlier attempts ran."""
    count, ran_s = 0, 0.0
    for number in run_dir.attempts():
        if number >= attempt:
            continue
        status = read_status(run_dir.last_status(number))
        count += status is None or status.state not in IN_ORDER
        if status is not None:
            # Not the difference of its timestamps: the wall clock may have jumped in between.
            ran_s += status.ran_s
    return count, ran_s
