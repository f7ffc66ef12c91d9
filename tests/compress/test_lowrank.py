"""Low-rank maths against closed forms and brute force, all in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from joulesmith.compress.lowrank import svd
from joulesmith.compress.lowrank.factors import pivot, plain, stored
from joulesmith.compress.lowrank.ranks import Curve, choose_ranks, total
from joulesmith.compress.lowrank.refit import Cross, refit
from joulesmith.compress.lowrank.residual import absorb
from joulesmith.compress.lowrank.weighted import decompose, output_root, root
from joulesmith.compress.quantize.gptq import gptq
from joulesmith.compress.quantize.grids import grid
from joulesmith.errors import JoulesmithError


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(seed: int, n: int, samples: int | None = None) -> torch.Tensor:
    x = normal(seed, samples or 4 * n, n) @ (normal(seed + 1, n, n) / math.sqrt(n))
    return x.T @ x / len(x)


def cost(d: torch.Tensor, h: torch.Tensor, g: torch.Tensor) -> float:
    return float(torch.trace(g @ d @ h @ d.T))


# ------------------------------------------------------------------- truncated SVDs


def test_exact_leaves_the_singular_values_beyond() -> None:
    w = normal(0, 9, 6)
    s = np.linalg.svd(w.numpy(), compute_uv=False)
    for rank in (1, 3, 6):
        t = svd.exact(w, rank)
        left = w - t.dense()
        assert float(left.norm()) == pytest.approx(math.sqrt((s[rank:] ** 2).sum()), abs=1e-12)
        assert t.left == pytest.approx(float(left.norm()), abs=1e-12)
        assert t.bound == pytest.approx(s[rank] if rank < 6 else 0.0)


@settings(max_examples=25)
@given(
    st.integers(0, 10_000), st.integers(3, 40), st.integers(3, 40), st.floats(0.2, 1.2), st.data()
)
def test_the_bound_of_random_projection_holds(
    seed: int, rows: int, columns: int, fall: float, data: st.DataObject
) -> None:
    n = min(rows, columns)
    rank = data.draw(st.integers(1, n))
    u, _ = torch.linalg.qr(normal(seed, rows, n))
    v, _ = torch.linalg.qr(normal(seed + 1, columns, n))
    w = (u * torch.arange(1, n + 1, dtype=torch.float64).pow(-fall)) @ v.T
    t = svd.randomized(w, rank, oversample=4, power=1, seed=seed)
    true = float(torch.linalg.matrix_norm(w - t.dense(), ord=2))
    assert true <= t.bound + 1e-12
    assert t.left == pytest.approx(float((w - t.dense()).norm()), abs=1e-7)
    best = svd.exact(w, rank)
    assert best.left <= t.left + 1e-9


def test_power_iterations_come_near_the_best() -> None:
    w = normal(3, 120, 80)  # the hardest spectrum: hardly any decay
    best = svd.exact(w, 10).left
    gaps = [svd.randomized(w, 10, power=p, seed=1).left / best - 1 for p in (0, 2, 6)]
    assert gaps[0] > gaps[1] > gaps[2] >= 0
    assert gaps[2] < 0.01
    again = svd.randomized(w, 10, seed=1)
    assert torch.equal(again.u, svd.randomized(w, 10, seed=1).u)
    assert not torch.equal(again.u, svd.randomized(w, 10, seed=2).u)


def test_a_matrix_of_low_rank_is_found_exactly() -> None:
    w = normal(4, 200, 5) @ normal(5, 5, 150)
    t = svd.truncate(w, 5)  # so small a rank goes through random projection
    assert float((w - t.dense()).abs().max()) < 1e-10
    assert t.bound < 1e-9


@pytest.mark.parametrize("rank", [0, 5, -1])
def test_impossible_ranks_are_refused(rank: int) -> None:
    for f in (svd.exact, svd.randomized, svd.truncate):
        with pytest.raises(JoulesmithError, match="rank"):
            f(torch.ones(4, 7), rank)


def test_bad_matrices_are_refused() -> None:
    for bad in (torch.ones(3), torch.ones(0, 3), torch.full((2, 2), math.nan)):
        with pytest.raises(JoulesmithError):
            svd.exact(bad, 1)


# ------------------------------------------------------------------- weighted


def test_no_factors_of_the_rank_lose_less() -> None:
    """Against alternating least squares from many starts, which finds the optimum too."""
    w, h, g = normal(0, 7, 5), moment(1, 5), moment(2, 7)
    found = decompose(w, root(h), root(g))
    for rank in (1, 2, 4):
        a, b = found.cut(rank)
        mine = cost(w - a @ b, h, g)
        assert mine == pytest.approx(found.damage(rank), rel=1e-6)
        best = math.inf
        for start in range(5):
            right = normal(10 + start, rank, 5)
            for _ in range(300):
                left = w @ h @ right.T @ torch.linalg.inv(right @ h @ right.T)
                right = torch.linalg.solve(left.T @ g @ left, left.T @ g @ w)
            best = min(best, cost(w - left @ right, h, g))
        assert mine <= best * (1 + 1e-6)
        assert mine == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("outputs", ["none", "diagonal", "full"])
def test_all_ranks_give_the_matrix_back(outputs: str) -> None:
    w, g = normal(3, 6, 9), moment(4, 6)
    r = {"none": None, "diagonal": output_root(g.diagonal()), "full": root(g)}[outputs]
    found = decompose(w, root(moment(5, 9, samples=3)), r)  # a singular Hessian
    assert float((found.left @ found.right - w).abs().max()) < 1e-9
    assert bool((found.energy[:-1] >= found.energy[1:]).all())


def test_without_metric_it_is_the_plain_svd() -> None:
    w = normal(6, 5, 8)
    a, b = decompose(w).cut(2)
    assert torch.allclose(a @ b, svd.exact(w, 2).dense(), atol=1e-12)


def test_roots_of_singular_and_empty_moments() -> None:
    for h in (moment(0, 12, samples=3), torch.zeros(4, 4), torch.diag(torch.tensor([1.0, 0.0]))):
        lower = root(h)
        assert bool(torch.isfinite(lower).all())
        assert torch.equal(lower, lower.tril())
        if float(h.diagonal().sum()):
            assert torch.allclose(lower @ lower.T, h.double(), atol=1e-4 * float(h.abs().max()))
    for bad in (torch.ones(2, 3), -torch.eye(2), torch.tensor([[1.0, 9.0], [9.0, 1.0]])):
        with pytest.raises(JoulesmithError):
            root(bad)


def test_directions_that_no_input_shows_are_not_forgotten() -> None:
    """A whitening that inverts the root would answer them with noise or nothing."""
    w = normal(7, 8, 6)
    h = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    a, b = decompose(w, root(h)).cut(4)
    assert cost(w - a @ b, h, torch.eye(8, dtype=torch.float64)) < 1e-6
    unseen = (w - a @ b)[:, 4:]
    assert float(unseen.norm()) < float(w[:, 4:].norm())


def test_a_sample_of_gradients_is_shrunk_to_the_diagonal() -> None:
    g = normal(8, 400, 5) @ normal(9, 5, 5)
    true = g.T @ g / 400
    lower = output_root(true.diagonal(), g, shrink=0.25)
    expected = 0.75 * true + 0.25 * torch.diag(true.diagonal())
    assert torch.allclose(lower @ lower.T, expected, rtol=1e-6, atol=1e-7)
    assert torch.allclose(output_root(torch.zeros(3)), torch.ones(3, dtype=torch.float64))
    with pytest.raises(JoulesmithError, match="squared output gradients"):
        output_root(torch.tensor([1.0, -1.0]))


# ------------------------------------------------------------------- factors


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 12), st.data())
def test_both_forms_are_the_same_product(
    seed: int, rows: int, columns: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    a, b = normal(seed, rows, rank), normal(seed + 1, rank, columns)
    for form, pivoted in ((plain, False), (pivot, True)):
        f = form(a, b)
        assert f.shape == (rows, columns)
        assert torch.allclose(f.dense(), a @ b, atol=1e-7 * float((a @ b).abs().max() + 1))
        if rank < min(rows, columns):
            assert f.parameters == stored(rows, columns, f.rank, pivoted=pivoted)


def test_pivots_never_store_more_than_the_matrix() -> None:
    for rows, columns in ((1, 1), (4, 9), (64, 64), (1536, 576)):
        for rank in range(1, min(rows, columns) + 1, 7):
            n = stored(rows, columns, rank, pivoted=True)
            assert n <= rows * columns
            assert n <= stored(rows, columns, rank, pivoted=False)


def test_dependent_rows_and_zeros_pivot_too() -> None:
    a, b = normal(1, 6, 3), normal(2, 3, 5)
    b[2] = b[0] - b[1]
    f = pivot(a, b)
    assert f.rank == 2
    assert torch.allclose(f.dense(), a @ b, atol=1e-12)
    zero = pivot(torch.zeros(4, 2), torch.zeros(2, 3))
    assert torch.equal(zero.dense(), torch.zeros(4, 3, dtype=torch.float64))
    with pytest.raises(JoulesmithError, match="no product"):
        pivot(a, normal(3, 4, 5))


# ------------------------------------------------------------------- ranks


def curves(seed: int, shapes: list[tuple[int, int]]) -> dict[str, Curve]:
    rng = np.random.default_rng(seed)
    return {
        str(i): Curve(r, c, np.sort(rng.gamma(0.5, 10.0 ** rng.uniform(-1, 1), min(r, c)))[::-1])
        for i, (r, c) in enumerate(shapes)
    }


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.5, 1.0), st.booleans())
def test_ranks_against_trying_all(seed: int, share: float, pivoted: bool) -> None:
    """Within the budget, and never worse than the best on the hull by more than one step."""
    shapes = [(5, 4), (3, 6), (6, 6)]
    found = curves(seed, shapes)
    budget = int(share * sum(r * c for r, c in shapes))
    ranks = choose_ranks(found, parameters=budget, pivoted=pivoted)
    assert total(found, ranks, pivoted=pivoted) <= budget
    damages = {n: c.damage() for n, c in found.items()}
    mine = sum(damages[n][r] for n, r in ranks.items())
    best = min(
        sum(damages[str(i)][r] for i, r in enumerate(choice))
        for choice in itertools.product(*(range(1, min(s) + 1) for s in shapes))
        if total(found, {str(i): r for i, r in enumerate(choice)}, pivoted=pivoted) <= budget
    )
    step = max(float(c.damage()[1]) for c in found.values())
    assert best - 1e-9 <= mine <= best + step


def test_a_smooth_problem_is_solved_to_a_fraction_of_a_percent() -> None:
    k = np.arange(1, 65.0)
    found = {str(i): Curve(64, 64, 10.0 ** (i / 8) * k ** (-1 - i / 20)) for i in range(16)}
    budget = int(0.3 * 16 * 64 * 64)
    ranks = choose_ranks(found, parameters=budget, pivoted=False)
    used = total(found, ranks, pivoted=False)
    assert budget - 128 < used <= budget
    damage = sum(found[n].damage()[r] for n, r in ranks.items())
    # weak duality: no choice at all is below this for any multiplier
    bound = max(
        sum(min(found[n].damage()[r] + x * min(128 * r, 4096) for r in range(1, 65)) for n in found)
        - x * budget
        for x in np.geomspace(1e-6, 1e-1, 400)
    )
    assert bound * (1 - 1e-9) <= damage <= bound * 1.01
    even = choose_ranks(found, parameters=budget, pivoted=False, uniform=True)
    assert damage < 0.9 * sum(found[n].damage()[r] for n, r in even.items())


def test_uniform_and_energy_and_given() -> None:
    found = curves(1, [(8, 8), (16, 4)])
    even = choose_ranks(found, parameters=64, pivoted=False, uniform=True)
    assert even == {"0": 2, "1": 1}
    by_energy = choose_ranks(found, energy=0.7)
    for name, rank in by_energy.items():
        d, whole = found[name].damage(), float(found[name].energy.sum())
        assert d[rank] <= 0.3 * whole + 1e-12
        assert rank == 1 or d[rank - 1] > 0.3 * whole
    assert choose_ranks(found, given={"1": 3}) == {"0": 8, "1": 3}
    mixed = choose_ranks(found, parameters=100, given={"1": 3})
    assert mixed["1"] == 3 and total(found, mixed, pivoted=True) <= 100
    many = choose_ranks(found, parameters=90, multiple=2)
    assert all(r % 2 == 0 or r == found[n].full for n, r in many.items())
    assert choose_ranks(found, energy=1.0) == {"0": 8, "1": 4}


def test_ranks_that_cannot_be_are_refused() -> None:
    found = curves(2, [(8, 8)])
    for bad in (
        {"parameters": 10, "energy": 0.5},
        {"parameters": 3},
        {"parameters": 3, "uniform": True},
        {"energy": 0.0},
        {"given": {"0": 9}},
        {"given": {"x": 1}},
        {"parameters": 50, "multiple": 0},
    ):
        with pytest.raises(JoulesmithError):
            choose_ranks(found, **bad)  # type: ignore[arg-type]
    with pytest.raises(JoulesmithError, match="energy"):
        choose_ranks({"a": Curve(4, 4, np.ones(3))}, energy=0.5)


# ------------------------------------------------------------------- refit


@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_refit_is_the_best_of_its_rank_on_the_new_inputs(mix: float) -> None:
    """Against alternating least squares on the samples themselves."""
    w, x, g = normal(0, 6, 8), normal(1, 300, 8), moment(2, 6)
    y = x + 0.3 * normal(2, 300, 8)  # the inputs as they are by now
    sums = Cross(8)
    for part in (slice(0, 100), slice(100, 300)):
        sums.add(x[part], y[part])
    gram, cross = sums.gram / sums.tokens, sums.cross / sums.tokens
    a, b = refit(w, gram, cross, root(g), mix=mix, ridge=0).cut(3)
    wanted = (mix * x + (1 - mix) * y) @ w.T

    def loss(a: torch.Tensor, b: torch.Tensor) -> float:
        miss = wanted - y @ b.T @ a.T
        return float(torch.trace(g @ miss.T @ miss))

    best = math.inf
    for start in range(5):
        right = normal(20 + start, 3, 8)
        for _ in range(300):
            left = torch.linalg.lstsq(y @ right.T, wanted).solution.T
            whole = torch.linalg.lstsq(y, wanted).solution.T
            right = torch.linalg.solve(left.T @ g @ left, left.T @ g @ whole)
        best = min(best, loss(left, right))
    assert loss(a, b) == pytest.approx(best, rel=1e-3)
    assert loss(a, b) <= best * (1 + 1e-5)


def test_refit_without_news_is_the_first_cut() -> None:
    w, h, g = normal(3, 5, 6), moment(4, 6), moment(5, 5)
    again, first = refit(w, h, h, root(g), ridge=1e-9), decompose(w, root(h), root(g))
    assert torch.allclose(again.energy, first.energy, rtol=1e-5, atol=1e-9)
    zero = torch.zeros(6, 6, dtype=torch.float64)
    a, b = refit(w, zero, zero).cut(5)
    assert torch.allclose(a @ b, w)
    rare = moment(6, 6, samples=2)  # a singular Hessian
    found = refit(w, rare, rare, ridge=0)
    assert torch.allclose(found.left @ found.right, w, atol=1e-2)
    with pytest.raises(JoulesmithError, match="do not belong"):
        refit(w, zero[:2], zero)
    with pytest.raises(JoulesmithError, match="mix"):
        refit(w, h, h, mix=2)


# ------------------------------------------------------------------- residual


@pytest.mark.parametrize("name", ["Q4_0", "INT3-G32", "Q2_K"])
def test_a_small_factor_absorbs_what_rounding_loses(name: str) -> None:
    g, columns = grid(name), 256
    w, h = (0.05 * normal(0, 64, columns)).float(), moment(1, columns)
    lower = root(h)

    def nearest(x: torch.Tensor) -> np.ndarray:
        return g.pack(x)

    found = absorb(w, nearest, g, 8, inputs=lower, sweeps=3)
    q = torch.as_tensor(g.unpack(found.packed, columns))
    left = (w - q - found.outer @ found.inner).double()
    assert cost(left, h, torch.eye(64, dtype=torch.float64)) == pytest.approx(
        min(found.damage[1:]), rel=1e-4
    )
    assert min(found.damage[1:]) < 0.9 * found.damage[0]
    expected = (8 * g.row_bytes(columns) * 64 + 16 * 8 * (64 + columns)) / (64 * columns)
    assert found.bits_per_weight == pytest.approx(expected)
    # the factor is the best of its rank for this Q, up to its own float16
    best = decompose(w - q, lower).damage(8)
    assert min(found.damage[1:]) == pytest.approx(best, rel=2e-2)


def test_residual_with_error_feedback_and_eight_bit_factors() -> None:
    g, w, h = grid("Q4_0"), (0.05 * normal(2, 64, 128)).float(), moment(3, 128)
    lower = root(h)
    plain_rounding = absorb(w, lambda x: g.pack(x), g, 4, inputs=lower)
    fed = absorb(w, lambda x: gptq(x, h.float(), g), g, 4, inputs=lower, factor_type="Q8_0")
    assert fed.damage[0] < plain_rounding.damage[0]
    assert fed.damage[-1] < fed.damage[0]
    assert fed.bits_per_weight < plain_rounding.bits_per_weight
    packed = grid("Q8_0").pack(fed.inner)
    assert np.array_equal(grid("Q8_0").unpack(packed, 128), fed.inner.numpy())
    with pytest.raises(JoulesmithError):
        absorb(w, lambda x: g.pack(x), g, 65, inputs=lower)
    with pytest.raises(JoulesmithError, match="pass"):
        absorb(w, lambda x: g.pack(x), g, 4, sweeps=0)
