"""Error feedback against a brute-force float64 reference, and what it promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from joulesmith.compress.quantize.gptq import curvature, feedback_codes, gptq, output_error
from joulesmith.compress.quantize.grids import Grid, grid
from joulesmith.compress.quantize.refine import descend
from joulesmith.errors import JoulesmithError

TYPES = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4", "NVFP4"]
SUPER = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def layer(seed: int, rows: int, n: int, tokens: int | None = None):
    """A weight matrix and the Hessian of correlated inputs."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((n, n)) * 0.4 / np.sqrt(n) + np.diag(rng.gamma(2, 0.5, n))
    x = rng.standard_normal((tokens or 4 * n, n)) @ mix
    w = (rng.standard_normal((rows, n)) * 0.05).astype(np.float32)
    return w, (x.T @ x).astype(np.float32)


def reference_codes(w, hessian, g, lattice, damping):
    """GPTQ by its definition: after each column, solve exactly for the columns left."""
    h = hessian.astype(np.float64) / hessian.diagonal().astype(np.float64).mean()
    h += damping * np.diag(h.diagonal()) + damping / 10 * np.eye(len(h))
    order = np.argsort(-hessian.diagonal().astype(np.float64), kind="stable")
    left = list(order)
    now, codes = w.astype(np.float64).copy(), np.zeros(w.shape, np.uint8)
    levels = np.array(g.levels, np.float64)
    for j in order:
        step = lattice.step[:, j // g.group].numpy().astype(np.float64)
        codes[:, j] = np.abs(now[:, j, None] - step[:, None] * levels).argmin(1)
        left.remove(j)
        miss = now[:, j] - step * levels[codes[:, j]]
        if left:
            # minimise tr(d H d^T) over the columns left with this one's miss held fixed
            pull = np.linalg.solve(h[np.ix_(left, left)], h[left, j])
            now[:, left] += np.outer(miss, pull)
    return codes


@pytest.mark.parametrize("name", ["Q4_0", "IQ4_NL", "Q5_0"])
def test_feedback_is_the_definition(name):
    g = grid(name)
    assert isinstance(g, Grid)
    w, h = layer(0, 6, 64)
    lattice = g.fit(w)
    mine = feedback_codes(torch.from_numpy(w), curvature(h, damping=0.05), g, lattice)
    assert (mine.numpy() == reference_codes(w, h, g, lattice, 0.05)).mean() > 0.99


def test_identity_hessian_is_nearest_rounding():
    w, _ = layer(1, 16, 128)
    for name in TYPES:
        g = grid(name)
        assert np.array_equal(gptq(w, np.eye(128), g, sweeps=0), g.pack(w)), name


@pytest.mark.parametrize("name", TYPES + SUPER)
def test_each_stage_lowers_the_output_error(name):
    g = grid(name)
    w, h = layer(2, 48, 512)
    nearest = output_error(w, g.pack(w, h.diagonal()), h, g)
    plain = output_error(w, gptq(w, h, g, sweeps=0), h, g)
    refined = output_error(w, gptq(w, h, g, sweeps=2), h, g)
    assert refined <= plain * (1 + 1e-6)
    assert plain <= nearest
    if name not in ("Q8_0", "MXFP4", "Q6_K"):
        assert refined < 0.9 * nearest


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "IQ4_NL", "MXFP4", "Q4_K"])
def test_descent_never_rises(name):
    g = grid(name)
    assert isinstance(g, Grid)
    w, h = layer(3, 24, 256)
    c = curvature(h)
    t = torch.from_numpy(w)
    lattice = g.fit(t)
    codes = g.codes(t, lattice)
    error = output_error(w, g.write(codes, lattice), c.hessian, g)
    for _ in range(3):
        codes, lattice = descend(t, c.hessian, g, codes, lattice, sweeps=1)
        now = output_error(w, g.write(codes, lattice), c.hessian, g)
        assert now <= error * (1 + 1e-5)
        error = now


def test_descent_finds_the_best_codes_of_a_tiny_case():
    """Two live columns, all code pairs tried: descent ends in a minimum no single move betters."""
    g = grid("Q4_0")
    assert isinstance(g, Grid)
    w, h = layer(4, 1, 32)
    t = torch.from_numpy(w)
    codes, lattice = descend(t, curvature(h).hessian, g, g.codes(t, g.fit(t)), g.fit(t), sweeps=20)
    h64 = curvature(h).hessian.double().numpy()

    def cost(codes):
        d = w.astype(np.float64) - g.values(codes, lattice).double().numpy()
        return float((d @ h64 @ d.T)[0, 0])

    best = cost(codes)
    for j in range(32):
        for code in range(16):
            other = codes.clone()
            other[0, j] = code
            assert cost(other) >= best * (1 - 1e-4)


def test_output_error_is_the_change_of_outputs():
    g = grid("Q4_1")
    rng = np.random.default_rng(5)
    x = rng.standard_normal((40, 64))
    w = rng.standard_normal((9, 64)).astype(np.float32)
    packed = g.pack(w)
    change = x @ (w - g.unpack(packed, 64)).astype(np.float64).T
    assert output_error(w, packed, x.T @ x, g) == pytest.approx((change**2).sum(), rel=1e-6)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "IQ4_NL", "MXFP4"])
def test_dead_columns_and_singular_hessians(name):
    g = grid(name)
    w, h = layer(6, 12, 96, tokens=20)  # rank 20 of 96
    h[:, 10:40] = h[10:40] = 0
    out = g.unpack(gptq(w, h, g), 96)
    assert np.isfinite(out).all()
    # dead columns keep sensible values: they may wake up on other text
    assert np.abs(out[:, 10:40] - w[:, 10:40]).max() < 0.06
    assert output_error(w, gptq(w, h, g), h, g) < output_error(w, g.pack(w), h, g)
    nothing = g.unpack(gptq(w, np.zeros((96, 96)), g), 96)
    assert np.abs(nothing - w).max() < 0.06


def test_same_bytes_twice_and_rows_do_not_meet(monkeypatch):
    g = grid("IQ4_NL")
    w, h = layer(7, 40, 96)
    packed = gptq(w, h, g)
    assert np.array_equal(packed, gptq(w.copy(), curvature(h), g))
    monkeypatch.setattr("joulesmith.compress.quantize.gptq.ROWS", 16)
    assert (gptq(w, h, g) == packed).mean() > 0.999  # sums may differ in the last bit


def test_inputs_are_left_alone():
    w, h = layer(8, 8, 64)
    before = w.copy(), h.copy()
    gptq(torch.from_numpy(w), torch.from_numpy(h), grid("Q4_1"))
    assert np.array_equal(w, before[0])
    assert np.array_equal(h, before[1])


def test_zero_rows_stay_zero_and_casts_pass():
    w, h = layer(9, 4, 64)
    w[1] = 0
    assert (grid("IQ4_NL").unpack(gptq(w, h, grid("IQ4_NL")), 64)[1] == 0).all()
    assert np.array_equal(gptq(w, h, grid("BF16")), grid("BF16").pack(w))


def test_refusals():
    w, h = layer(10, 4, 64)
    g = grid("Q4_0")
    with pytest.raises(JoulesmithError, match="does not belong"):
        gptq(w, h[:32, :32], g)
    with pytest.raises(JoulesmithError, match="square"):
        gptq(w, h[:32], g)
    with pytest.raises(JoulesmithError, match="NaN"):
        gptq(w, h * np.nan, g)
    with pytest.raises(JoulesmithError, match="negative"):
        gptq(w, -h, g)
    with pytest.raises(JoulesmithError, match="damping"):
        gptq(w, h, g, damping=-1)
    w[0, 0] = np.nan
    with pytest.raises(JoulesmithError, match="NaN"):
        gptq(w, h, g)
