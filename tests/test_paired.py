"""Ratios within rounds, and the bootstrap interval of a median."""

from __future__ import annotations

from statistics import median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from joulesmith.paired import median_interval, paired_ratio, rotated

positive = st.floats(1e-3, 1e3)


def test_order_rotates_evenly() -> None:
    orders = [rotated(["a", "b", "c"], i) for i in range(6)]
    assert orders[0] == ["a", "b", "c"] and orders[1] == ["b", "c", "a"]
    for place in range(3):
        assert sorted(o[place] for o in orders) == ["a", "a", "b", "b", "c", "c"]
    assert rotated([], 3) == []


@settings(max_examples=20, deadline=None)
@given(st.lists(positive, min_size=1, max_size=12), st.floats(0.1, 10))
def test_drift_cancels(ours: list[float], factor: float) -> None:
    r = paired_ratio([factor * x for x in ours], ours, "joules")
    assert r.ratio == pytest.approx(factor)
    assert r.low == pytest.approx(factor) and r.high == pytest.approx(factor)
    assert r.pairs == len(ours)


@settings(max_examples=20, deadline=None)
@given(st.lists(positive, min_size=1, max_size=15))
def test_interval_holds_the_median_and_lies_in_the_spread(values: list[float]) -> None:
    low, high = median_interval(values)
    assert min(values) <= low <= median(values) <= high <= max(values)


def test_interval_is_that_of_order_statistics() -> None:
    """For a large sample the bootstrap agrees with the binomial interval of the median."""
    values = sorted(np.random.default_rng(3).normal(10, 1, 101))
    low, high = median_interval(values)
    # Binomial(101, 1/2): ranks 41 and 61 of 101 bound the median at 95 %.
    assert low == pytest.approx(values[40], abs=0.1)
    assert high == pytest.approx(values[60], abs=0.1)


def test_rounds_without_a_base_are_left_out() -> None:
    assert paired_ratio([1.0, 4.0], [0.0, 2.0], "seconds").pairs == 1
    with pytest.raises(ValueError, match="no values"):
        paired_ratio([1.0], [0.0], "joules")
