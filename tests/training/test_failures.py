"""Counting a run's failures and its time, from the files of its attempts."""

from __future__ import annotations

from pathlib import Path

from specbatch.rundir import RunDir, write_json
from specbatch.snapshot.interval import PRIOR_BETWEEN_FAILURES_S, SnapshotInterval
from specbatch.training.process.failures import failures


def test_attempts_that_lost_steps_are_counted_and_all_of_their_time(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    for attempt, state in ((1, "running"), (2, "stopped"), (3, "failed"), (5, "running")):
        write_json(run_dir.last_status(attempt), {"state": state, "ran_s": 100.0})
    run_dir.attempt(4).mkdir()  # it never came to a status
    assert failures(run_dir, 5) == (3, 300.0)
    assert failures(run_dir, 1) == (0, 0.0)


def test_a_wall_clock_that_was_put_right_by_years_changes_nothing(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    times = {"began": "2062-01-01T00:00:00+00:00", "updated": "2026-01-01T00:00:00+00:00"}
    write_json(run_dir.last_status(1), {"state": "failed", **times, "ran_s": 60.0})
    count, ran_s = failures(run_dir, 2)
    pace = SnapshotInterval(None, failures=count, ran_s=ran_s)
    pace.measured(1.0, 1.0)
    assert 0 < pace.interval_s < PRIOR_BETWEEN_FAILURES_S
    assert not pace.due(0.0)
