"""Float grids: levels as published, rounding as torch casts, bytes that come back, near-best scales."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from joulesmith.compress.quantize.elements import ELEMENTS, NF4
from joulesmith.compress.quantize.floats import FloatGrid
from joulesmith.compress.quantize.gptq import curvature, feedback_codes, gptq, output_error
from joulesmith.compress.quantize.grids import Grid, grid
from joulesmith.compress.quantize.refine import descend
from joulesmith.compress.quantize.step import Quantize
from joulesmith.errors import JoulesmithError
from joulesmith.models import load
from tiny import write_tiny

OWN = [f"{e}-G32" for e in ELEMENTS]
SHARED = ["FP8-E4M3-T", "FP8-E5M2-T", "FP4-E2M1-NV", "NF4-G32-DQ"]
POWERS = ["FP8-E4M3-MX", "FP8-E5M2-MX", "FP6-E2M3-MX", "FP6-E3M2-MX"]
NAMES = [*OWN, "FP8-G32", *SHARED, *POWERS]
TORCH = {"FP8-E4M3": torch.float8_e4m3fn, "FP8-E5M2": torch.float8_e5m2}

# QLoRA, appendix E
PUBLISHED_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def named(name: str) -> FloatGrid:
    found = grid(name)
    assert isinstance(found, FloatGrid)
    assert found.name == name
    return found


# -- levels -------------------------------------------------------------------


def test_nf4_is_the_published_table() -> None:
    assert NF4.levels == pytest.approx(PUBLISHED_NF4, abs=6e-8)


def test_fp4_and_fp6_are_those_of_the_specification() -> None:
    e2m1 = ELEMENTS["FP4-E2M1"]
    assert e2m1.levels[7:] == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert e2m1.patterns == (15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7)
    for name, top, smallest in (("FP6-E2M3", 7.5, 0.125), ("FP6-E3M2", 28.0, 0.0625)):
        levels = ELEMENTS[name].levels
        assert (levels[-1], levels[32]) == (top, smallest)
        assert len(levels) == 63


@pytest.mark.parametrize("name", sorted(TORCH))
def test_fp8_patterns_are_torchs(name: str) -> None:
    e = ELEMENTS[name]
    raw = torch.tensor(e.patterns, dtype=torch.uint8)
    assert raw.view(TORCH[name]).float().tolist() == list(e.levels)
    every = torch.arange(256, dtype=torch.uint8).view(TORCH[name]).float()
    assert len(e.levels) == len(set(every[torch.isfinite(every)].tolist()))


def awkward(top: float, seed: int) -> torch.Tensor:
    """Values, ties between levels and their neighbours in float32, both ends and beyond."""
    rng = np.random.default_rng(seed)
    u = rng.standard_normal(500) * 10.0 ** rng.integers(-8, 3, 500)
    return torch.from_numpy(np.concatenate([u, u * top, [0.0, -0.0, top, -top, 9 * top]])).float()


@pytest.mark.parametrize("name", sorted(TORCH))
@pytest.mark.parametrize("seed", range(4))
def test_fp8_rounding_is_torchs_cast(name: str, seed: int) -> None:
    """By `nearest_level`, by the search over borders that other grids use, and by codes."""
    g = named(f"{name}-G32")
    top = g.levels[-1]
    level = torch.tensor(g.levels)
    ties = (level[1:] + level[:-1]) / 2
    inf = torch.full_like(ties, torch.inf)
    near = [ties, torch.nextafter(ties, inf), torch.nextafter(ties, -inf)]
    u = torch.cat([awkward(top, seed), *near])
    cast = u.clamp(-top, top).to(TORCH[name]).float()
    assert torch.equal(g.nearest_level(u), cast)
    assert torch.equal(Grid.nearest_level(g, u), cast)
    assert torch.equal(level[g.nearest_code(u).long()], cast)


@pytest.mark.parametrize("name", OWN)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_rounding_is_to_nearest(name: str, seed: int) -> None:
    g = named(name)
    u = awkward(g.levels[-1], seed)
    levels = torch.tensor(g.levels, dtype=torch.float64)
    least = (u.double()[:, None] - levels).abs().amin(1)
    # a border is float32, so a value within its last bit of one may go either way
    slack = 1e-7 * (u.double().abs() + 1e-3 * least)
    assert bool(((u.double() - g.nearest_level(u).double()).abs() <= least + slack).all())
    assert torch.equal(g._levels[g.nearest_code(u).long()], g.nearest_level(u))


@given(
    levels=st.lists(st.floats(-8, 8, width=16), min_size=2, max_size=40, unique=True),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60)
def test_the_table_of_borders_is_a_binary_search(levels: list[float], seed: int) -> None:
    g = named("NF4-G32")
    level = torch.tensor(sorted(levels))
    edges = (level[1:] + level[:-1]) / 2
    g.set_borders(edges)
    inf = torch.full_like(edges, torch.inf)
    near = [edges, torch.nextafter(edges, inf), torch.nextafter(edges, -inf), inf, -inf]
    u = torch.cat([awkward(8.0, seed), *near])
    assert torch.equal(g._above(u), torch.bucketize(u, edges))


# -- bytes --------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1e-9, 0.02, 1.0, 1e6]))
@settings(max_examples=8)
def test_what_is_written_reads_back(name: str, seed: int, size: float) -> None:
    g = named(name)
    w = (np.random.default_rng(seed).standard_normal((3, 96)) * size).astype(np.float32)
    w[1, :40] = 0
    packed = g.pack(w)
    assert packed.shape == (3, g.row_bytes(96))
    codes, lattice = g.read(packed, 96)
    assert g.write(codes, lattice).tobytes() == packed.tobytes()
    assert bool((lattice.step >= 0).all()), "engines know no negative scales"
    fitted = g.fit(w)
    assert torch.equal(fitted.step, lattice.step), "what is fitted is what is stored"
    back = g.unpack(packed, 96)
    assert np.array_equal(back, g.values(codes, lattice).numpy())
    if name == "FP8-G32" and size < 1e-3:
        return  # float16 has no scale so small
    assert ((back - w) ** 2).sum() <= (w.astype(np.float64) ** 2).sum() * 0.2
    assert not back[1, :32].any()


@pytest.mark.parametrize("name", NAMES)
def test_rows_alone_read_as_rows_together(name: str) -> None:
    g = named(name)
    w = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    packed = g.pack(w)
    assert np.array_equal(g.unpack(packed[2:3], 64), g.unpack(packed, 64)[2:3])
    bound = g.bind(w)
    pieces = np.concatenate([bound.pack(w[:2]), bound.pack(w[2:])])
    assert np.array_equal(pieces, packed), "pieces of a bound grid are those of the whole"
    assert g.pack(w[:0]).shape == (0, g.row_bytes(64))


def test_stored_patterns_are_the_types_own() -> None:
    """The code bytes of a row are what torch reads as float8, times the scale."""
    g = named("FP8-E4M3-G64")
    w = np.random.default_rng(1).standard_normal((2, 64)).astype(np.float32)
    packed = torch.from_numpy(g.pack(w))
    scale = packed[:, :2].contiguous().view(torch.bfloat16).float()
    values = packed[:, 2:].contiguous().view(torch.float8_e4m3fn).float()
    assert np.array_equal((scale * values).numpy(), g.unpack(packed.numpy(), 64))


def test_nv_rows_are_laid_out_as_compressed_tensors_reads_them() -> None:
    """Head, E4M3 scales, then nibbles, low one first: vLLM's order."""
    theirs = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    g = named("FP4-E2M1-NV")
    w = np.random.default_rng(9).standard_normal((3, 64)).astype(np.float32)
    packed = torch.from_numpy(g.pack(w))
    head = packed[:, :4].contiguous().view(torch.float32)
    scale = packed[:, 4:8].contiguous().view(torch.float8_e4m3fn).float() * head
    values = theirs.unpack_fp4_from_uint8(packed[:, 8:].contiguous(), 3, 64, torch.float32)
    mine = values.view(3, 4, 16) * scale[..., None]
    assert np.array_equal(mine.view(3, 64).numpy(), g.unpack(packed.numpy(), 64))


def test_shared_scales_are_shared_and_stored_as_the_type_says() -> None:
    w = np.random.default_rng(2).standard_normal((4, 64)).astype(np.float32)
    w[0] *= 9
    whole = named("FP8-E4M3-T")
    _, lattice = whole.read(whole.pack(w), 64)
    assert len(lattice.step.unique()) == 1
    nv = named("FP4-E2M1-NV")
    _, lattice = nv.read(nv.pack(w), 64)
    head, raw = lattice.stored
    assert len(head.unique()) == 1
    assert lattice.step.shape == (4, 4)
    block = raw.view(torch.float8_e4m3fn)[..., 0].float()
    assert torch.equal(lattice.step, block * head)
    for name in POWERS:
        step = named(name).fit(w).step
        assert torch.equal(step, torch.exp2(step.log2().round()))


def test_stored_bits() -> None:
    for name, bits in {
        "FP8-E4M3-G128": 8.125,
        "FP8-E5M2-T": 8,
        "FP6-E2M3-MX": 6.25,
        "FP4-E2M1-G32": 4.5,
        "FP4-E2M1-NV": 4.5,
        "NF4-G64": 4.25,
        "NF4-G64-DQ": 4.125,
    }.items():
        g = named(name)
        assert g.bits_per_weight == bits
        shared = {"T": 4, "NV": 4, "DQ": 8}.get(name.split("-")[-1], 0)
        assert g.row_bytes(128) - shared == 128 * bits / 8


@pytest.mark.parametrize("name", ["FP8-E4M3-G32", "FP8-E4M3-MX", "FP4-E2M1-NV", "NF4-G32-DQ"])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_any_bytes_are_read_or_refused_in_one_line(name: str, seed: int) -> None:
    g = named(name)
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (2, g.row_bytes(64)), np.uint8)
    raw[rng.random(raw.shape) < rng.random()] = 0
    try:
        back = g.unpack(raw, 64)
    except JoulesmithError as error:
        assert "\n" not in str(error)
    else:
        assert not np.isnan(back).any()


def test_nan_patterns_are_refused() -> None:
    g = named("FP8-E4M3-G32")
    packed = g.pack(np.ones((1, 32), np.float32))
    packed[0, 5] = 0x7F
    with pytest.raises(JoulesmithError, match="damaged"):
        g.unpack(packed, 32)


# -- scales -------------------------------------------------------------------


def least(x: np.ndarray, levels: np.ndarray, steps: np.ndarray) -> float:
    best = np.inf
    for step in steps:
        near = levels[np.abs(x[:, None] - step * levels).argmin(1)]
        best = min(best, float(((x - step * near) ** 2).sum()))
    return best


@pytest.mark.parametrize("name", OWN)
def test_scales_are_near_the_best_there_are(name: str) -> None:
    """Within 1.5 % of the best of 1000 float64 steps."""
    g = named(name)
    w = np.random.default_rng(3).standard_t(5, (4, 64)).astype(np.float32)
    mine = ((g.unpack(g.pack(w), 64) - w) ** 2).sum()
    levels = np.array(g.levels)
    best = 0.0
    for x in w.reshape(-1, g.group).astype(np.float64):
        # FP8 is alike in every octave; the others are searched from clipping to spare room
        reach = (0.5, 1.1) if g.element.bits == 8 else (0.4, 2.2)
        steps = np.abs(x).max() / (np.linspace(*reach, 1000) * levels[-1])
        best += least(x, levels, steps)
    assert mine <= 1.015 * best


@pytest.mark.parametrize("name", ["FP4-E2M1-NV", "NF4-G32-DQ"])
def test_small_scales_are_near_the_best_there_are(name: str) -> None:
    """Within 1 % of the best of all scales that the 8 bits can say."""
    g = named(name)
    w = np.random.default_rng(3).standard_t(5, (4, 64)).astype(np.float32)
    mine = ((g.unpack(g.pack(w), 64) - w) ** 2).sum()
    head = g.bind(w).head
    assert head is not None
    every = np.array(ELEMENTS["FP8-E4M3"].levels)
    steps = every * float(head[0]) if len(head) == 1 else float(head[0]) + every * float(head[1])
    steps = steps[steps > 0]
    blocks = w.reshape(-1, g.group).astype(np.float64)
    assert mine <= 1.01 * sum(least(x, np.array(g.levels), steps) for x in blocks)


@pytest.mark.parametrize("name", POWERS)
def test_powers_are_the_best_there_are(name: str) -> None:
    g = named(name)
    w = np.random.default_rng(4).standard_t(5, (4, 64)).astype(np.float32)
    mine = ((g.unpack(g.pack(w), 64) - w) ** 2).sum()
    levels, steps = np.array(g.levels), 2.0 ** np.arange(-24, 6)
    best = sum(least(x, levels, steps) for x in w.reshape(-1, 32).astype(np.float64))
    assert mine == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("name", ["FP8-E4M3-T", "FP4-E2M1-T"])
def test_a_tensors_scale_is_near_the_best(name: str) -> None:
    g = named(name)
    w = np.random.default_rng(5).standard_normal((6, 64)).astype(np.float32)
    weight = np.random.default_rng(6).gamma(1, 1, 64).astype(np.float32)
    x, levels = w.astype(np.float64), torch.tensor(g.levels).double().numpy()
    best = np.inf
    for step in np.abs(x).max() / (np.linspace(0.4, 1.8, 400) * levels[-1]):
        near = levels[np.abs(x[..., None] - step * levels).argmin(-1)]
        best = min(best, float((weight * (x - step * near) ** 2).sum()))
    mine = (weight * (g.unpack(g.pack(w, weight), 64) - w) ** 2).sum()
    assert mine <= 1.03 * best


def test_importance_moves_the_scale() -> None:
    g = named("NF4-G32")
    w = np.random.default_rng(7).standard_normal((8, 64)).astype(np.float32)
    weight = np.where(np.arange(64) % 8 == 0, 100.0, 0.01).astype(np.float32)
    plain = (weight * (g.unpack(g.pack(w), 64) - w) ** 2).sum()
    assert (weight * (g.unpack(g.pack(w, weight), 64) - w) ** 2).sum() < 0.8 * plain


# -- every rounding -----------------------------------------------------------


def layer() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(8)
    x = rng.standard_normal((400, 64)) @ (rng.standard_normal((64, 64)) * 0.3 + np.eye(64))
    return (rng.standard_normal((16, 64)) * 0.05).astype(np.float32), (x.T @ x).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_every_rounding_works_on_them(name: str) -> None:
    w, h = layer()
    g = named(name)
    nearest = output_error(w, g.pack(w), h, g)
    plain = output_error(w, gptq(w, h, g, sweeps=0), h, g)
    refined = output_error(w, gptq(w, h, g, sweeps=2), h, g)
    assert plain < 0.8 * nearest
    assert refined <= plain * (1 + 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_descent_never_rises(name: str) -> None:
    w, h = layer()
    t, c, g = torch.from_numpy(w), curvature(h), named(name)
    for grid_now in (g, g.bind(w)):  # unbound, codes move; bound, the scales of groups too
        lattice = grid_now.fit(t)
        codes = feedback_codes(t, c, grid_now, lattice)
        error = output_error(w, grid_now.write(codes, lattice), c.hessian, g)
        for _ in range(3):
            codes, lattice = descend(t, c.hessian, grid_now, codes, lattice, sweeps=1)
            now = output_error(w, grid_now.write(codes, lattice), c.hessian, g)
            assert now <= error * (1 + 1e-5)
            error = now


def test_identity_hessian_is_nearest_rounding() -> None:
    w, _ = layer()
    for name in OWN + POWERS:
        g = named(name)
        assert np.array_equal(gptq(w, np.eye(64), g, sweeps=0), g.pack(w)), name


def test_a_model_is_rounded_in_pieces_under_one_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("joulesmith.compress.quantize.walk.ROWS", 24)
    model = load(write_tiny(tmp_path / "model", steps=0))
    windows = np.arange(128, dtype=np.int32).reshape(2, 64)
    record = Quantize(default="FP4-E2M1-NV").apply(model, windows)
    assert len(record.packed) > 10
    for name, (kind, packed) in record.packed.items():
        heads = np.ascontiguousarray(packed[:, :4]).view(np.float32)
        assert kind == "FP4-E2M1-NV"
        assert len(packed) > 24
        assert len(np.unique(heads)) == 1, name


# -- refusals -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("FP8-E4M3", "unknown tensor type"),
        ("FP8-E3M4-G32", "unknown tensor type"),
        ("NF4-G0", "1 column or more"),
        ("FP4-E2M1-MX", "MXFP4"),
        ("NF4-MX", "no MX scales"),
        ("FP8-E4M3-NV", "no NV scales"),
    ],
)
def test_bad_names(name: str, match: str) -> None:
    with pytest.raises(JoulesmithError, match=match):
        grid(name)


@pytest.mark.parametrize("name", NAMES)
def test_bad_weights(name: str) -> None:
    g = named(name)
    for bad in (np.nan, np.inf):
        with pytest.raises(JoulesmithError, match="NaN or infinity"):
            g.pack(np.full((1, 32), bad, np.float32))
    with pytest.raises(JoulesmithError, match="do not cut"):
        g.pack(np.zeros((1, 17), np.float32))
    with pytest.raises(JoulesmithError, match="beyond what"):
        g.pack(np.full((1, 32), 1e19, np.float32))
    with pytest.raises(JoulesmithError, match="importance"):
        g.pack(np.ones((1, 32), np.float32), -np.ones(32, np.float32))
    with pytest.raises(JoulesmithError, match="bytes wide"):
        g.unpack(np.zeros((1, 3), np.uint8), 32)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name: str) -> None:
    g = named(name)
    assert not g.unpack(g.pack(np.zeros((2, 32), np.float32)), 32).any()
