"""The solver against a brute force over all choices."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from joulesmith.errors import JoulesmithError
from joulesmith.plan.solve import Option, solve, undominated

number = st.floats(0.001, 10, allow_nan=False)
option = st.builds(Option, st.text("ABC", min_size=1, max_size=3), number, number, st.just(1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=4), st.floats(0, 1))
def test_equals_brute_force(tensors: list[list[Option]], share: float) -> None:
    options = {f"t{i}": o for i, o in enumerate(tensors)}
    least = sum(min(o.damage for o in os) for os in tensors)
    most = sum(max(o.damage for o in os) for os in tensors)
    budget = least + share * (most - least) + 1e-9
    best = min(
        sum(o.joules for o in combo)
        for combo in itertools.product(*tensors)
        if sum(o.damage for o in combo) <= budget
    )
    choice = solve(options, budget)
    assert choice.damage <= budget * (1 + 1e-6)
    assert choice.joules == pytest.approx(best, rel=1e-4)


def test_impossible_budget_says_the_least() -> None:
    with pytest.raises(JoulesmithError, match=r"the least is 0\.5"):
        solve({"a": [Option("X", 1, 0.5, 1)]}, 0.1)


def test_bytes_break_ties() -> None:
    options = {"a": [Option("big", 1, 0.1, 100), Option("small", 1, 0.1, 10)]}
    assert solve(options, 1).types == {"a": "small"}


def test_dominated_options_go() -> None:
    good, bad = Option("g", 1, 1, 1), Option("b", 2, 2, 2)
    assert undominated([bad, good]) == [good]
