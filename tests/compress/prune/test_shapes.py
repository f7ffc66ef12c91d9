"""The search over shapes, on damages that are known; widths, on streams that are known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from joulesmith.compress.prune import width
from joulesmith.compress.prune.prices import Prices
from joulesmith.compress.prune.shapes import neurons_for, search
from joulesmith.compress.prune.shrink import Shape
from joulesmith.errors import JoulesmithError

DENSE = Shape(12, 64, 256, 4, 2, 16, True)


def count(s: Shape) -> int:
    return s.layers * (3 * s.hidden * s.neurons + 2 * s.hidden * s.dim * s.kv * (s.queries + 1))


@given(st.floats(0.3, 1.0), st.integers(0, 4), st.sampled_from([8, 32]))
def test_neurons_meet_the_budget_closely(share: float, gone: int, multiple: int) -> None:
    budget = int(share * count(DENSE))
    s = Shape(12 - gone, 64, 256, 4, 2, 16, True)
    found = neurons_for(s, budget, count, multiple)
    if found is None:
        assert count(Shape(12 - gone, 64, 64, 4, 2, 16, True)) > budget - 3 * 64 * 12 * multiple
        return
    assert count(found) <= budget
    assert found.neurons == 256 or found.neurons % multiple == 0
    more = Shape(12 - gone, 64, found.neurons + multiple, 4, 2, 16, True)
    assert found.neurons == 256 or count(more) > budget or more.neurons >= 256


@given(st.floats(0.1, 9), st.floats(0.1, 9), st.floats(0.1, 9))
def test_the_search_finds_the_valley(a: float, b: float, c: float) -> None:
    def damage(s: Shape) -> float:
        lost = (1 - s.neurons / 256, 1 - s.layers / 12, 1 - s.kv * s.queries / 8)
        return sum(w * x**2 for w, x in zip((a, b, c), lost, strict=True))

    budget = int(0.7 * count(DENSE))
    found = search(
        DENSE, budget, count, damage, multiple=8, trials=40, read=count, parameters=count, deepest=4
    )
    assert all(t.parameters <= budget for t in found)
    assert [t.damage for t in found] == sorted(t.damage for t in found)
    every = [
        neurons_for(Shape(12 - g, 64, 256, k, q, 16, True), budget, count, 8)
        for g in range(5) for k in (2, 3, 4) for q in (1, 2) if k * q >= 4
    ]  # fmt: skip
    best = min(damage(s) for s in every if s is not None)
    assert found[0].damage <= 2 * best + 1e-9


def test_an_unreachable_budget_is_refused() -> None:
    with pytest.raises(JoulesmithError, match="cannot be reached"):
        search(
            DENSE, 10, count, lambda _: 0.0, multiple=8, trials=9, read=count, parameters=count,
            deepest=3,
        )  # fmt: skip


PRICES = st.builds(
    Prices,
    **{name: st.floats(0, 1e-3) for name in Prices.model_fields},
)


@given(PRICES, st.floats(0.3, 1.0), st.integers(0, 4))
def test_neurons_meet_a_budget_of_joules(prices: Prices, share: float, gone: int) -> None:
    budget = share * prices.of(DENSE)
    shape = replace(DENSE, layers=12 - gone)
    found = neurons_for(shape, budget, prices.of, 8)
    fits = [n for n in range(64, 257, 8) if prices.of(replace(shape, neurons=n)) <= budget]
    if found is None:
        assert not fits or prices.of(replace(shape, neurons=fits[-1])) > budget * (1 - 1e-9)
    else:
        assert prices.of(found) <= budget * (1 + 1e-9)
        assert found.neurons == pytest.approx(fits[-1], abs=8)


def test_prices_are_a_sum_of_parts() -> None:
    p = Prices(layer=1000, neuron=1, query=10, kv=100, rest=1e6)
    assert p.of(DENSE) == 1e6 + 12 * (1000 + 256 + 8 * 10 + 4 * 100)
    with pytest.raises(ValidationError):
        Prices(layer=-1, neuron=1, query=1, kv=1, rest=1)


@given(st.integers(0, 999), st.integers(1, 6))
def test_principal_directions(seed: int, keep: int) -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    m = x.T @ x / 50
    into = width.principal(m, keep)
    assert torch.allclose(into.T @ into, torch.eye(keep, dtype=torch.float64), atol=1e-9)
    energy = float((into.T @ m @ into).trace())
    assert energy == pytest.approx(float(torch.linalg.eigvalsh(m)[-keep:].sum()))
    factor = width.norm_factor(m, into)
    assert factor == pytest.approx(math.sqrt(6 / keep * energy / float(m.trace())))


def test_channels_are_picked() -> None:
    kept = width.channels(torch.tensor([3.0, 1.0, 2.0, 2.0]), 2)
    assert kept.tolist() == [0, 2]
    x = torch.randn(5, 4, dtype=torch.float64)
    assert torch.equal(x @ width.selection(kept, 4), x[:, kept])
    for bad in (0, 5):
        with pytest.raises(JoulesmithError, match="width"):
            width.channels(torch.ones(4), bad)
    with pytest.raises(JoulesmithError, match="NaN"):
        width.principal(torch.full((3, 3), float("nan")), 2)
