"""Quantities as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.errors import JoulesmithError
from joulesmith.units import parse_count, si


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8e9", 8e9), ("8B", 8e9), ("70b", 7e10), ("15T", 1.5e13), ("135M", 1.35e8), ("1.5k", 1500),
        ("15_000", 15000), ("1,000,000", 1e6), ("8.03 B", 8.03e9), ("1e6", 1e6), ("4e+11", 4e11),
        ("2g", 2e9),
    ],
)  # fmt: skip
def test_counts(text: str, value: float) -> None:
    assert parse_count(text, "--params") == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    "text", ["", "8 billion", "-8B", "0", "8e99", "nan", "inf", "8BB", "B", "1e-3", "8.B", "1" * 99]
)
def test_no_counts(text: str) -> None:
    with pytest.raises(JoulesmithError, match=r"--params .*give a number such as") as e:
        parse_count(text, "--params")
    assert "\n" not in str(e.value)


@given(st.floats(1e-12, 9e17))
def test_prefixes_keep_the_value(x: float) -> None:
    number, _, unit = si(x, "J", 6).partition(" ")
    factor = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1, "m": 1e-3, "µ": 1e-6,
              "n": 1e-9, "p": 1e-12}[unit.removesuffix("J")]  # fmt: skip
    assert float(number) * factor == pytest.approx(x, rel=1e-5)
    assert 0.999 <= float(number) <= 1000
