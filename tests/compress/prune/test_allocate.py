"""Shares of zeros: right sums, least damage, one threshold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.compress.prune.allocate import Curve, Thresholds, by_damage, uniform

CURVES = st.builds(
    lambda size, low, factor: Curve(size, (0.4, low), (0.6, low * factor)),
    st.integers(10, 10_000),
    st.floats(1e-8, 1e2),
    st.floats(1.01, 1e4),
)


def summed(curves: dict[str, Curve], shares: dict[str, float]) -> float:
    sizes = np.array([c.size for c in curves.values()])
    return float(np.array(list(shares.values())) @ sizes / sizes.sum())


@given(st.lists(CURVES, min_size=1, max_size=6), st.floats(0.01, 0.99))
def test_sums_and_bounds(found: list[Curve], sparsity: float) -> None:
    curves = {str(i): c for i, c in enumerate(found)}
    shares = by_damage(curves, sparsity)
    assert list(shares) == list(curves)
    assert summed(curves, shares) == pytest.approx(sparsity, abs=1e-6)
    assert all(0 <= s <= max(0.95, (1 + sparsity) / 2) for s in shares.values())


@given(CURVES, CURVES, st.floats(0.1, 0.9))
def test_two_layers_against_a_grid(a: Curve, b: Curve, sparsity: float) -> None:
    shares = by_damage({"a": a, "b": b}, sparsity)

    def damage(x: float) -> float:
        y = (sparsity * (a.size + b.size) - x * a.size) / b.size
        return a.damage(x) + b.damage(y) if -1e-9 <= y <= 0.95 + 1e-9 else np.inf

    best = min(damage(x) for x in np.linspace(0, 0.95, 2001))
    assert a.damage(shares["a"]) + b.damage(shares["b"]) <= best * (1 + 1e-5) + 1e-12


def test_curves_go_through_their_points() -> None:
    c = Curve(10, (0.4, 1e-3), (0.6, 4e-3))
    assert c.damage(0.4) == pytest.approx(1e-3) and c.damage(0.6) == pytest.approx(4e-3)
    assert c.damage(0.5) == pytest.approx(2e-3)
    odd = {
        "dead": Curve(10, (0.4, 0.0), (0.6, 0.0)),
        "less": Curve(10, (0.4, 2.0), (0.6, 1.0)),
        "c": c,
    }
    assert summed(odd, by_damage(odd, 0.5)) == pytest.approx(0.5)
    assert by_damage(odd, 0.5)["dead"] == 0.95, "it costs nothing"
    assert uniform({"a": 3, "b": 5}, 0.3) == {"a": 0.3, "b": 0.3}


@given(st.integers(0, 1000), st.floats(0.01, 0.99))
def test_one_threshold_against_a_sort(seed: int, sparsity: float) -> None:
    rng = np.random.default_rng(seed)
    scores = {n: np.abs(rng.normal(size=(20, 50))) * 4.0**i for i, n in enumerate("abc")}
    found = Thresholds()
    for name, s in scores.items():
        found.add(name, torch.from_numpy(s))
    shares = found.shares(sparsity)
    assert np.mean(list(shares.values())) == pytest.approx(sparsity)
    limit = np.sort(np.concatenate([s.ravel() for s in scores.values()]))[int(sparsity * 3000)]
    for name, s in scores.items():
        # scores are told apart to a 32nd of an octave
        spread = float(((s > limit / 1.025) & (s < limit * 1.025)).mean())
        assert abs(shares[name] - float((s < limit).mean())) <= spread + 1e-3


def test_scores_at_the_ends() -> None:
    found = Thresholds()
    found.add("zero", torch.tensor([0.0, -3.0, 0.0, -1.0]))
    found.add("large", torch.tensor([1e38, 1.0, 1e30, 1.0]))
    assert found.shares(0.5) == {"zero": 1.0, "large": 0.0}
    assert found.shares(0.25) == {"zero": 0.5, "large": 0.0}
