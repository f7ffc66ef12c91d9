"""Structured OBS against brute force: least squares on every subset, in float64."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.compress.prune.columns import damp, refit, remove_groups, targets
from joulesmith.errors import JoulesmithError


def problem(seed: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g, dtype=torch.float64)
    x = torch.randn(60, columns, generator=g, dtype=torch.float64) @ mix
    w = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    return w, x, torch.rand(rows, generator=g, dtype=torch.float64) + 0.1


def excess(w: torch.Tensor, x: torch.Tensor, kept: list[int], f: torch.Tensor) -> float:
    """Half the weighted mean squared error of the best fit on these columns, by lstsq."""
    y = x @ w.T
    fitted = x[:, kept] @ torch.linalg.lstsq(x[:, kept], y).solution
    return float(((y - fitted).square() * f).sum() / len(x) / 2)


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(3, 7))
def test_the_cost_of_a_column_is_the_best_fit_without_it(seed: int, rows: int, n: int) -> None:
    w, x, f = problem(seed, rows, n)
    found = remove_groups(w, x.T @ x / 60, torch.arange(n)[:, None], n - 1, rows=f, at_once=1)
    each = [excess(w, x, [k for k in range(n) if k != j], f) for j in range(n)]
    assert float(found.costs[0]) == pytest.approx(min(each), rel=1e-4, abs=1e-9)
    assert each[int(found.gone[0])] == pytest.approx(min(each), rel=1e-4, abs=1e-9)


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 3]), st.integers(1, 5))
def test_costs_add_up_to_the_excess_of_what_went(seed: int, at_once: int, keep: int) -> None:
    w, x, f = problem(seed, 3, 6)
    found = remove_groups(w, x.T @ x / 60, torch.arange(6)[:, None], keep, rows=f, at_once=at_once)
    assert sorted([*found.kept.tolist(), *found.gone.tolist()]) == list(range(6))
    wanted = excess(w, x, found.kept.tolist(), f)
    assert float(found.costs.sum()) == pytest.approx(wanted, rel=1e-4, abs=1e-9)
    best = min(excess(w, x, list(s), f) for s in combinations(range(6), keep))
    assert wanted >= best - 1e-9


@given(st.integers(0, 10_000))
def test_blocks_of_columns(seed: int) -> None:
    w, x, f = problem(seed, 2, 6)
    groups = torch.tensor([[0, 3], [1, 4], [2, 5]])
    found = remove_groups(w, x.T @ x / 60, groups, 2, rows=f)
    each = [excess(w, x, [k for k in range(6) if k not in g], f) for g in groups.tolist()]
    assert float(found.costs[0]) == pytest.approx(min(each), rel=1e-4, abs=1e-9)


@given(st.integers(0, 10_000), st.integers(1, 5))
def test_refit_is_least_squares(seed: int, keep: int) -> None:
    w, x, _ = problem(seed, 3, 6)
    columns = torch.randperm(6, generator=torch.Generator().manual_seed(seed))[:keep]
    fitted = refit(*targets(w, x.T @ x / 60, None, 0.0, ridge=0.0), columns)
    wanted = torch.linalg.lstsq(x[:, columns], x @ w.T).solution.T
    assert torch.allclose(fitted, wanted, rtol=1e-5, atol=1e-7)
    t = torch.randn(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    fitted = refit(*targets(w, x.T @ x / 60, t.T @ x / 60, 1.0, ridge=0.0))
    assert torch.allclose(fitted, torch.linalg.lstsq(x, t).solution.T, rtol=1e-5, atol=1e-7)


def test_a_large_ridge_keeps_the_weights() -> None:
    w, x, _ = problem(0, 3, 6)
    cross = torch.zeros(3, 6, dtype=torch.float64)
    assert torch.allclose(refit(*targets(w, x.T @ x / 60, cross, 1.0, ridge=1e9)), w, atol=1e-6)
    assert torch.allclose(refit(*targets(w, x.T @ x / 60, cross, 0.0)), w, atol=1e-9)


def test_what_does_nothing_goes_first_and_costs_nothing() -> None:
    w, x, _ = problem(1, 4, 8)
    w[:, [2, 5]] = 0
    c = damp(x.T @ x / 60)
    found = remove_groups(w, c, torch.arange(8)[:, None], 6, at_once=1)
    assert sorted(found.gone.tolist()) == [2, 5]
    assert float(found.costs.sum()) == pytest.approx(0, abs=1e-12)
    assert torch.allclose(refit(*targets(w, x.T @ x / 60, None, 0.0), found.kept), w[:, found.kept])


def test_classes_keep_their_number() -> None:
    w, x, _ = problem(2, 4, 8)
    w[:, :4] *= 1e-3  # all of the first class would go
    found = remove_groups(
        w, damp(x.T @ x), torch.arange(8)[:, None], 4, classes=[0] * 4 + [1] * 4, class_keep=2
    )
    assert (found.kept < 4).sum() == 2


def test_bad_input_is_refused() -> None:
    w, x, _ = problem(3, 2, 4)
    c, groups = damp(x.T @ x), torch.arange(4)[:, None]
    for bad in (
        lambda: remove_groups(w, c, groups, 0),
        lambda: remove_groups(w, c, groups, 5),
        lambda: remove_groups(w, c, groups + 1, 2),
        lambda: remove_groups(w, c, torch.tensor([[0], [0]]), 1),
        lambda: remove_groups(w, -c, groups, 2),
        lambda: remove_groups(w * float("nan"), c, groups, 2),
        lambda: remove_groups(w, c, groups, 2, rows=torch.ones(3)),
        lambda: remove_groups(w, c, groups, 2, classes=[0, 0, 1, 1], class_keep=2),
        lambda: damp(c[:2]),
        lambda: damp(c * float("inf")),
        lambda: damp(c, -1.0),
        lambda: targets(w, c[:3, :3], None, 0.5),
        lambda: targets(w, c, w[:, :2], 0.5),
        lambda: targets(w, c, w, 1.5),
    ):
        with pytest.raises(JoulesmithError):
            bad()
    zero = damp(torch.zeros(4, 4))
    assert len(remove_groups(w, zero, groups, 2).kept) == 2
