"""Sums over windows: what is unknown stays unknown, and a state comes back whole."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.energy.reading import Reading
from joulesmith.energy.totals import POINT_COLUMNS, Totals

JOULES = st.none() | st.floats(0, 1e9)
WINDOWS = st.lists(
    st.tuples(JOULES, st.integers(0, 5), st.none() | st.integers(0, 999)), max_size=8
)


def filled(windows: list[tuple[float | None, int, int | None]]) -> Totals:
    totals = Totals(parameters=10)
    for joules, steps, tokens in windows:
        pedigree = None if joules is None else "modelled"
        totals.add(Reading(joules, 1.0, joules, joules, pedigree), steps, tokens, None)
    return totals


@given(WINDOWS)
def test_sums_are_known_when_every_part_is(windows: list[tuple[float | None, int, int | None]]):
    totals = filled(windows)
    known = [j for j, _, _ in windows if j is not None]
    if windows and len(known) == len(windows):
        assert totals.joules == pytest.approx(sum(known))
        assert totals.joules_per_parameter == pytest.approx(sum(known) / 10)
    else:
        assert totals.joules is None
        assert totals.joules_per_step is None
    assert totals.spent == pytest.approx(sum(known)), "the least that was spent"
    tokens = [t for _, steps, t in windows if steps]
    if windows and None not in tokens:
        assert totals.tokens == sum(tokens)
    else:
        assert totals.tokens is None
    assert totals.steps == sum(steps for _, steps, _ in windows)
    assert set(totals.row(None, None, {})) == set(POINT_COLUMNS)


@given(WINDOWS)
def test_a_state_comes_back_whole(windows: list[tuple[float | None, int, int | None]]):
    totals, other = filled(windows), Totals(10)
    other.load_totals(json.loads(json.dumps(totals.totals())))
    assert other.totals() == totals.totals()
    assert other.joules == totals.joules


def test_what_lies_aside_is_spent_but_not_trained_with() -> None:
    totals = filled([(3.0, 1, 2)])
    totals.add_aside(Reading(4.0, 1.0))
    totals.add_aside(Reading(None, 1.0))
    assert (totals.joules, totals.aside, totals.spent) == (3.0, 4.0, 7.0)
