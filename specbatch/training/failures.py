"""How often a run failed so far, by what its attempts left."""

from __future__ import annotations

from specbatch.rundir import RunDir, read_json

IN_ORDER = ("completed", "stopped")
"""How an attempt ends that loses no step."""


def failures(run_dir: RunDir, attempt: int) -> tuple[int, float]:
    """Attempts before this one that ended without a snapshot of their last step, and seconds that all of them ran."""
    count, ran_s = 0, 0.0
    for number in run_dir.attempts():
        if number >= attempt:
            continue
        status = read_json(run_dir.last_status(number))
        count += status is None or status["state"] not in IN_ORDER
        if status is not None:
            # Not what its times are apart: a wall clock may have jumped by years between them.
            ran_s += status.get("ran_s", 0.0)
    return count, ran_s
