"""Integer grids under ranges that a recipe names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from joulesmith.compress.quantize import lsq, ranges, second_order
from joulesmith.compress.quantize.chosen import WAYS, lattice_of, levels_of, round_chosen
from joulesmith.compress.quantize.gptq import curvature, output_error
from joulesmith.compress.quantize.grids import grid
from joulesmith.compress.quantize.integers import IntGrid
from joulesmith.compress.quantize.scales import half
from joulesmith.compress.quantize.step import Quantize
from joulesmith.compress.quantize.tiles import group
from joulesmith.errors import JoulesmithError
from joulesmith.models import load
from tiny import write_tiny

GRIDS = ("INT4-G32", "INT3-G16-ZP", "INT2-G32", "TERNARY-G32")


def layer() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(256, 64, generator=g) * torch.linspace(0.1, 3, 64)
    x[:, 1:] += 0.7 * x[:, :-1]
    return torch.randn(24, 64, generator=g) + 0.2, x.T @ x / 256


def integer(name: str) -> IntGrid:
    g = grid(name)
    assert isinstance(g, IntGrid)
    return g


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("way", WAYS)
def test_scales_are_those_of_the_way_as_stored(name: str, way: str) -> None:
    w, h = layer()
    g, c = integer(name), curvature(h)
    levels, by_group = levels_of(g), group(g.group)
    weight = c.importance.expand_as(w)
    wanted = {
        "absmax": lambda: ranges.absmax(w, levels, by_group),
        "percentile": lambda: ranges.percentile(w, levels, by_group),
        "mse": lambda: ranges.mse(w, levels, by_group, weight=weight, snap=half),
        "lsq": lambda: lsq.learned(w, levels, by_group, weight=weight),
        "second-order": lambda: second_order.curved(w, c.hessian, levels, g.group)[0],
    }[way]()
    found = lattice_of(w, g, way, c)
    assert torch.equal(found.step.flatten(), half(wanted.step))
    packed = round_chosen(w, c, g, way, sweeps=2)
    _, stored = g.read(packed, 64)
    assert torch.equal(stored.step, found.step), "codes move, scales do not"
    if not g.symmetric:
        assert torch.equal(stored.stored[1].flatten(), wanted.zero)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("way", WAYS)
def test_codes_are_nearest_or_better(name: str, way: str) -> None:
    w, h = layer()
    g, c = integer(name), curvature(h)
    lattice = lattice_of(w, g, way, c)
    # plain nearest rounding to these scales, by brute force over all levels
    x = w.view(24, -1, g.group, 1)
    offset = 0 if lattice.offset is None else lattice.offset[..., None, None]
    values = torch.tensor(g.levels) * lattice.step[..., None, None] + offset
    best = (x - values).abs().amin(-1).view(24, 64)
    packed = g.write(g.codes(w, lattice), lattice)
    assert torch.allclose((w - torch.as_tensor(g.unpack(packed, 64))).abs(), best, atol=1e-5)
    nearest = output_error(w, packed, h, g)
    assert output_error(w, round_chosen(w, c, g, way, sweeps=2), h, g) <= nearest * (1 + 1e-5)
    if way != "second-order":
        assert np.array_equal(
            round_chosen(w, None, g, way, sweeps=None),
            g.write(g.codes(w, lattice_of(w, g, way, None)), lattice_of(w, g, way, None)),
        )


def test_second_order_ranges_lose_least() -> None:
    w, h = layer()
    g, c = integer("INT3-G32"), curvature(h)
    errors = {way: output_error(w, round_chosen(w, c, g, way, sweeps=2), h, g) for way in WAYS}
    assert errors["second-order"] <= min(errors["absmax"], errors["percentile"])


@pytest.mark.parametrize("way", WAYS)
def test_in_a_recipe(tmp_path: Path, way: str) -> None:
    model = load(write_tiny(tmp_path / "model", steps=0))
    windows = np.arange(128, dtype=np.int32).reshape(2, 64)
    plain = Quantize(default="INT4-G32").apply(model, windows).packed
    record = Quantize(default="INT4-G32", ranges=way).apply(model, windows)
    assert set(record.packed) == set(plain) and len(plain) == 14
    name = "blk.0.ffn_up.weight"
    _, stored = integer("INT4-G32").read(record.packed[name][1], 64)
    _, other = integer("INT4-G32").read(plain[name][1], 64)
    assert not torch.equal(stored.step, other.step)
    if way == "absmax":
        w = model.module.model.layers[0].mlp.up_proj.weight.detach()
        peaks = w.abs().view(96, 2, 32).amax(-1)
        assert torch.equal(stored.step, half(peaks / 7))


def test_refusals(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "model", steps=0))
    windows = np.arange(128, dtype=np.int32).reshape(2, 64)
    with pytest.raises(JoulesmithError, match="Q4_0 searches its own scales"):
        Quantize(default="Q4_0", ranges="mse").apply(model, windows)
    with pytest.raises(ValueError, match="need the Hessian"):
        Quantize(default="INT4-G32", ranges="second-order", effort="nearest")
    with pytest.raises(JoulesmithError, match="no way to choose ranges"):
        round_chosen(torch.ones(1, 32), None, grid("INT4-G32"), "guess", sweeps=None)
