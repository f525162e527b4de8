import math

import pytest

from specbatch.snapshot.interval import FIRST_S, PRIOR_BETWEEN_FAILURES_S, SnapshotInterval


def test_a_given_time_runs_from_the_first_question_and_from_each_snapshot():
    pace = SnapshotInterval(10.0)
    assert [pace.due(now) for now in (100.0, 105.0, 109.9, 110.0)] == [False, False, False, True]
    assert pace.due(111.0), "until one is begun"
    pace.begun(111.5)
    assert [pace.due(now) for now in (112.0, 121.0, 121.5)] == [False, False, True]
    pace.measured(5.0, 50.0)
    assert pace.interval_s == 10.0


def test_before_anything_is_measured_a_snapshot_comes_soon():
    assert SnapshotInterval(None).interval_s == FIRST_S


def test_the_time_between_is_youngs_optimum():
    pace = SnapshotInterval(None)
    pace.measured(2.0, 3.0)
    assert pace.interval_s == pytest.approx(math.sqrt(2 * 2.0 * PRIOR_BETWEEN_FAILURES_S))


def test_it_minimises_what_snapshots_and_failures_cost_together():
    pace = SnapshotInterval(None, failures=23, ran_s=0.0)
    pace.measured(4.0, 4.0)

    def lost(interval_s):
        return 4.0 / interval_s + interval_s / 2 / pace.between_failures_s

    best = min((lost(s), s) for s in range(1, 5000))[1]
    assert pace.interval_s == pytest.approx(best, rel=0.01)


def test_more_failures_mean_more_snapshots_and_dearer_ones_fewer():
    def interval(failures, cost_s):
        pace = SnapshotInterval(None, failures=failures, ran_s=3600.0)
        pace.measured(cost_s, cost_s)
        return pace.interval_s

    assert interval(9, 1.0) < interval(1, 1.0) < interval(0, 1.0) < interval(0, 4.0)


def test_the_disk_is_not_kept_busy():
    pace = SnapshotInterval(None, failures=1000)
    pace.measured(0.01, 30.0)
    assert pace.interval_s == pytest.approx(300.0)
