"""Curves with fewer points and all their extremes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from specbatch.report.thin import buckets, most_buckets

VALUES = st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=1, max_size=300)


@given(VALUES, st.integers(1, 50))
def test_each_step_is_in_one_bucket_and_no_extreme_is_lost(values, most):
    values_S, cut = np.array(values), buckets(len(values), most)
    assert len(cut) <= most
    assert np.concatenate([np.arange(a, b) for a, b in zip(cut.first_N, cut.end_N, strict=True)]).tolist() == list(
        range(len(values))
    )
    for i, (first, end) in enumerate(zip(cut.first_N, cut.end_N, strict=True)):
        known = values_S[first:end][np.isfinite(values_S[first:end])]
        assert np.isnan(cut.mean(values_S)[i]) == (len(known) == 0)
        if len(known):
            assert (cut.least(values_S)[i], cut.greatest(values_S)[i]) == (known.min(), known.max())
            assert known.min() - 1e-6 <= cut.mean(values_S)[i] <= known.max() + 1e-6


def test_a_short_run_is_shown_step_by_step():
    assert buckets(300, most_buckets(1)).whole
    assert not buckets(100_000, most_buckets(1)).whole
    assert len(buckets(0, 10)) == 0


def test_many_runs_share_the_points_of_a_few():
    assert 20 * most_buckets(20) <= 2 * most_buckets(2)
