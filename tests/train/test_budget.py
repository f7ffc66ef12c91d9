"""When to stop: on curves whose next percent is known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.train.budget import PERCENT, enough, next_percent


@given(st.floats(0.01, 5), st.floats(1, 1e6), st.integers(3, 9))
def test_the_next_percent_of_a_straight_line(fall: float, first: float, points: int) -> None:
    def loss(joules: float) -> float:
        return 9 - fall * math.log(joules)

    curve = [(first * 1.5**i, loss(first * 1.5**i)) for i in range(points)]
    cost = next_percent(curve)
    assert cost is not None
    now = curve[-1][0]
    assert loss(now) - loss(now + cost) == pytest.approx(PERCENT, rel=1e-6)
    assert enough(curve, cost / 3) == (points > 3)
    assert not enough(curve, cost * 1.01)


def test_what_does_not_fall_costs_without_end() -> None:
    flat = [(1.0, 2.0), (2.0, 2.0), (3.0, 2.1), (4.0, 2.1)]
    assert next_percent(flat) == math.inf
    assert enough(flat, 1e9)


def test_two_points_say_nothing() -> None:
    assert next_percent([(0.0, 3.0), (1.0, 2.0), (2.0, 1.9)]) is None, "nothing was spent at 0"
    assert next_percent([(1.0, 2.0)] * 4) is None
    assert not enough([(1.0, 2.0), (2.0, 2.0), (3.0, 2.0)], 1.0), "one evaluation may be noise"
