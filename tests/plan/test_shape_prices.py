"""Prices of parts, from costs that are known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.compress.prune.shrink import Shape
from joulesmith.errors import JoulesmithError
from joulesmith.plan.shape_prices import cells, shape_prices

SHAPE = Shape(6, 64, 256, 4, 2, 16, True)


def matrices(s: Shape) -> list[tuple[int, int]]:
    """All that a token is multiplied by, written out."""
    q, kv = s.kv * s.queries * s.dim, s.kv * s.dim
    block = [(q, s.hidden), (kv, s.hidden), (kv, s.hidden), (s.hidden, q)]
    block += [(s.neurons, s.hidden), (s.neurons, s.hidden), (s.hidden, s.neurons)]
    return s.layers * block + [(400, s.hidden)]


@given(
    st.floats(1e-9, 1e-6), st.floats(0, 1e-3), st.integers(1, 9), st.integers(1, 8),
    st.integers(1, 3), st.integers(1, 4),
)  # fmt: skip
def test_lines_are_found(
    each: float, fixed: float, layers: int, neurons: int, kv: int, queries: int
) -> None:
    def decode(rows: int, columns: int, kind: str) -> float:
        return fixed + each * rows * columns

    prices = shape_prices(SHAPE, 400, "F16", decode)
    other = Shape(layers, 64, 32 * neurons, kv, queries, 16, True)
    assert prices.of(other) == pytest.approx(sum(decode(*m, "F16") for m in matrices(other)))


@given(st.lists(st.floats(1e-6, 1.0), min_size=40, max_size=40))
def test_whatever_was_measured_the_model_costs_what_its_matrices_do(costs: list[float]) -> None:
    known = dict(zip(dict.fromkeys(cells(SHAPE, 400, "Q8_0")), costs, strict=False))
    prices = shape_prices(SHAPE, 400, "Q8_0", lambda r, c, _: known[r, c])
    assert prices.of(SHAPE) == pytest.approx(sum(known[m] for m in matrices(SHAPE)))
    assert min(prices.model_dump().values()) >= 0


def test_rows_are_whole_blocks() -> None:
    assert all(c % 32 == 0 for _, c in cells(SHAPE, 400, "Q8_0"))
    with pytest.raises(JoulesmithError, match="do not divide rows of 64"):
        shape_prices(SHAPE, 400, "Q4_K", lambda *_: 1.0)
