"""Error feedback by vectors against its definition, and what it and descent promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from joulesmith.compress.quantize import gptq as module
from joulesmith.compress.quantize.codebooks import GRIDS
from joulesmith.compress.quantize.gptq import curvature, gptq, output_error
from joulesmith.compress.quantize.rounding import round_weight
from joulesmith.compress.quantize.vector_feedback import descend, feedback_codes
from joulesmith.compress.quantize.vectors import WIDTH
from joulesmith.errors import JoulesmithError

NAMES = list(GRIDS)


def layer(seed: int, rows: int, n: int, tokens: int | None = None):
    """A weight matrix and the Hessian of correlated inputs."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((n, n)) * 0.4 / np.sqrt(n) + np.diag(rng.gamma(2, 0.5, n))
    x = rng.standard_normal((tokens or 2 * n, n)) @ mix
    w = (rng.standard_normal((rows, n)) * 0.05).astype(np.float32)
    return w, (x.T @ x).astype(np.float32)


def test_vectors_stay_together_and_go_by_their_summed_diagonal():
    _, h = layer(0, 1, 256)
    c = curvature(h)
    order, factor = c.by_vectors
    vectors = order.view(-1, WIDTH)
    assert torch.equal(vectors - vectors[:, :1], torch.arange(WIDTH).expand_as(vectors))
    sums = c.hessian.diagonal()[order].view(-1, WIDTH).sum(1)
    assert (sums[1:] <= sums[:-1] + 1e-5).all()
    assert torch.equal(order.sort().values, torch.arange(256))
    inverse = torch.linalg.inv(c.hessian.double()[order][:, order])
    assert torch.allclose(factor.double().T @ factor.double(), inverse, atol=1e-5)
    assert (factor.tril(-1) == 0).all()


@pytest.mark.parametrize("name", ["IQ2_XS", "IQ3_S", "IQ1_S"])
def test_feedback_is_the_definition(name):
    """After each vector, solve exactly for the columns left; its metric is the Schur complement."""
    g = GRIDS[name]
    w, h = layer(1, 6, 256)
    c = curvature(h)
    order, factor = c.by_vectors
    lattice = g.fit(w, c.importance)
    mine = feedback_codes(torch.from_numpy(w), order, factor, g, lattice)
    h64 = c.hessian.double()
    now, level = torch.from_numpy(w).double(), torch.zeros(w.shape)
    shift = lattice.stored[2].reshape(6, -1) if len(lattice.stored) > 2 else None
    for i in range(0, 256, WIDTH):
        own, left = order[i : i + WIDTH], order[i + WIDTH :]
        group = int(own[0]) // g.group
        step = lattice.step[:, group, None]
        pull = torch.linalg.solve(h64[left][:, left], h64[left][:, own])
        metric = h64[own][:, own] - h64[own][:, left] @ pull
        u = (now[:, own] / step).float() - (0 if shift is None else shift[:, group, None])
        found = g.choose(u, metric.float())[1]
        found = found if shift is None else found + shift[:, group, None]
        level[:, own] = found
        now[:, left] += (now[:, own] - step * found) @ pull.T
    assert (g.levels_of(mine, lattice) == level).float().mean() > 0.97


@pytest.mark.parametrize("name", NAMES)
def test_each_stage_lowers_the_output_error(name):
    g = GRIDS[name]
    w, h = layer(2, 24, 256)
    nearest = output_error(w, g.pack(w, h.diagonal()), h, g)
    plain = output_error(w, gptq(w, h, g, sweeps=0), h, g)
    refined = output_error(w, gptq(w, h, g, sweeps=2), h, g)
    assert plain < 0.9 * nearest
    assert refined < 0.97 * plain


@pytest.mark.parametrize("name", NAMES)
def test_descent_never_rises_and_keeps_what_it_says(name):
    g = GRIDS[name]
    w, h = layer(3, 12, 256)
    c = curvature(h)
    t = torch.from_numpy(w)
    lattice = g.fit(t)
    codes = g.codes(t, lattice, torch.ones_like(t))
    error = output_error(w, g.write(codes, lattice), c.hessian, g)
    for _ in range(3):
        codes, lattice = descend(t, c.hessian, g, codes, lattice, sweeps=1)
        packed = g.write(codes, lattice)
        assert np.array_equal(g.unpack(packed, 256), g.values(codes, lattice).numpy())
        now = output_error(w, packed, c.hessian, g)
        assert now <= error * (1 + 1e-5)
        error = now


@pytest.mark.parametrize("name", ["IQ3_XXS", "IQ2_S", "IQ1_S"])
def test_no_integer_is_better_after_descent(name):
    g = GRIDS[name]
    w, h = layer(4, 3, 256)
    c = curvature(h)
    t = torch.from_numpy(w)
    lattice = g.fit(t, c.importance)
    codes = g.codes(t, lattice, torch.ones_like(t))
    codes, lattice = descend(t, c.hessian, g, codes, lattice, sweeps=12)
    best = output_error(w, g.write(codes, lattice), c.hessian, g)
    for group in range(256 // g.group):
        for move in (-1, 1):
            s = lattice.stored[1].clone()
            s[:, 0, group] = (s[:, 0, group] + move).clamp(0, g.top)
            other = g.lattice((lattice.stored[0], s, *lattice.stored[2:]))
            assert output_error(w, g.write(codes, other), c.hessian, g) >= best * (1 - 1e-4)


@pytest.mark.parametrize("name", ["IQ3_S", "IQ2_XXS", "IQ1_M"])
def test_dead_columns_singular_hessians_and_zero_rows(name):
    g = GRIDS[name]
    w, h = layer(6, 6, 256, tokens=20)  # rank 20 of 256
    h[:, 10:40] = h[10:40] = 0
    w[1] = 0
    packed = gptq(w, h, g)
    out = g.unpack(packed, 256)
    assert np.isfinite(out).all()
    assert (out[1] == 0).all()
    assert np.abs(out[:, 10:40] - w[:, 10:40]).max() < 0.2
    assert output_error(w, packed, h, g) < output_error(w, g.pack(w), h, g)


def test_same_bytes_twice_rows_do_not_meet_and_one_door(monkeypatch):
    g = GRIDS["IQ2_XS"]
    w, h = layer(7, 20, 256)
    before = w.copy()
    packed = gptq(w, h, g)
    assert np.array_equal(packed, gptq(w.copy(), curvature(h), g))
    assert np.array_equal(packed, round_weight(torch.from_numpy(w), curvature(h), g))
    assert np.array_equal(w, before)
    monkeypatch.setattr(module, "ROWS", 8)
    assert (gptq(w, h, g) == packed).mean() > 0.99  # sums may differ in the last bit


def test_refusals():
    w, h = layer(8, 2, 256)
    g = GRIDS["IQ3_S"]
    with pytest.raises(JoulesmithError, match="does not belong"):
        gptq(w, h[:128, :128], g)
    with pytest.raises(JoulesmithError, match="do not cut"):
        gptq(w[:, :128], h[:128, :128], g)
    w[0, 0] = np.nan
    with pytest.raises(JoulesmithError, match="NaN"):
        gptq(w, h, g)
