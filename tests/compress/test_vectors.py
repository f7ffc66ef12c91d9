"""Codebook grids against gguf's dequantizer, llama.cpp's quantizer and brute force."""

from __future__ import annotations

from itertools import product

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from joulesmith.compress.quantize.codebooks import GRIDS
from joulesmith.compress.quantize.grids import grid
from joulesmith.compress.quantize.vectors import WIDTH, VectorGrid
from joulesmith.errors import JoulesmithError

NAMES = list(GRIDS)
FLOATS = st.floats(-1000, 1000, width=32) | st.floats(-1, 1, width=32) | st.just(0.0)


def theirs(packed: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return dequantize(packed, GGMLQuantizationType[name])


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def model_like(seed: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape) * rng.gamma(2, 0.01, (shape[0], 1))
    w *= np.exp(0.5 * rng.standard_normal(shape[1]))
    return w.astype(np.float32), rng.gamma(0.7, 1.0, shape[1]).astype(np.float32)


def signed_codebook(g: VectorGrid) -> torch.Tensor:
    """Every vector of levels that the type can code, (many, WIDTH)."""
    parts = [g.book]
    if g.signs != "none":
        signs = torch.tensor(list(product((1.0, -1.0), repeat=g.dim)))
        parts = [(g.book[:, None] * signs).reshape(-1, g.dim)]
    every = parts[0]
    if g.dim < WIDTH:
        first = every.repeat_interleave(len(every), 0)
        every = torch.cat([first, every.repeat(len(every), 1)], 1)
    if g.signs == "even":
        every = every[every.prod(1) > 0]
    return every


@pytest.mark.parametrize("name", NAMES)
def test_numbers_match_ggufs_table(name):
    g, kind = grid(name), GGMLQuantizationType[name]
    assert (g.name, g.ggml_type) == (name, kind)
    assert (g.block, g.block_bytes) == gguf.GGML_QUANT_SIZES[kind]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 4))
def test_any_bytes_read_as_gguf_reads_them_and_are_written_back(name, seed, rows):
    g = GRIDS[name]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, g.row_bytes(512)), np.uint8)
    mine, reference = g.unpack(raw, 512), theirs(raw, name)
    assert ((bits(mine) == bits(reference)) | (np.isnan(mine) & np.isnan(reference))).all()
    finite = np.isfinite(mine).all(1)  # a NaN's bits need not survive
    assert np.array_equal(g.write(*g.read(raw, 512))[finite], raw[finite])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8, deadline=None)
@given(data=st.data(), weighted=st.booleans())
def test_round_trip(name, data, weighted):
    g = GRIDS[name]
    shape = (data.draw(st.integers(1, 2)), 256)
    w = data.draw(hnp.arrays(np.float32, shape, elements=FLOATS, fill=st.just(0.0)))
    weight = None
    if weighted:
        weight = data.draw(hnp.arrays(np.float32, shape[1], elements=st.floats(0, 9, width=32)))
    packed = g.pack(w, weight)
    assert (packed.shape, packed.dtype) == ((shape[0], g.block_bytes), np.uint8)
    out = g.unpack(packed, 256)
    assert np.isfinite(out).all()
    assert np.array_equal(bits(out), bits(theirs(packed, name)))
    assert g.write(*g.read(packed, 256)).tobytes() == packed.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_values_on_the_grid_stay_put(name):
    g = GRIDS[name]
    w = g.unpack(g.pack(model_like(3, (4, 512))[0]), 512)
    again = g.unpack(g.pack(w), 512)
    assert np.square(again - w).sum() <= 0.01 * np.square(w).sum()


# llama.cpp takes up to a minute to prepare the others' tables
@pytest.mark.parametrize("name", ["IQ3_S", "IQ3_XXS"])
@pytest.mark.parametrize("weighted", [False, True])
def test_error_is_not_above_llama_cpps(name, weighted):
    pytest.importorskip("xllamacpp")
    from joulesmith.engines.llama_quantize import LlamaQuantizer

    w, weight = model_like(7, (8, 512))
    weight = weight if weighted else np.ones_like(weight)
    mine = grid(name).unpack(grid(name).pack(w, weight), 512)
    other = theirs(LlamaQuantizer().pack(w, name, weight), name)
    assert (weight * (mine - w) ** 2).sum() <= (weight * (other - w) ** 2).sum()


# brute force holds all vectors of the smaller codebooks
@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"])
def test_nearest_and_chosen_against_all_vectors(name):
    g = GRIDS[name]
    every = signed_codebook(g)
    rng = np.random.default_rng(4)
    typical = float(g.book.square().mean().sqrt())
    u = torch.from_numpy(rng.standard_normal((40, WIDTH)).astype(np.float32)) * typical
    weight = torch.from_numpy(rng.gamma(1.0, 1.0, (40, WIDTH)).astype(np.float32))
    mix = torch.from_numpy(rng.standard_normal((24, WIDTH)).astype(np.float32))
    metric = mix.T @ mix / 24 + 0.5 * torch.eye(WIDTH)

    def compare(found: torch.Tensor, cost) -> None:
        best = torch.stack([cost(i, every).min() for i in range(len(u))])
        mine = torch.stack([cost(i, found[i : i + 1])[0] for i in range(len(u))])
        assert (mine >= best * (1 - 1e-4)).all()  # or it is no vector of the type
        if g.signs == "none":
            assert torch.allclose(mine, best, rtol=1e-3)
        assert mine.sum() <= 1.05 * best.sum()

    codes, level = g.nearest(u, weight)
    assert torch.equal(g.decode(codes), level)
    compare(level, lambda i, q: (weight[i] * (u[i] - q).square()).sum(1))
    codes, level = g.choose(u, metric)
    assert torch.equal(g.decode(codes), level)
    compare(level, lambda i, q: (((u[i] - q) @ metric) * (u[i] - q)).sum(1))


@pytest.mark.parametrize("name", ["IQ3_S", "IQ3_XXS", "IQ2_S"])
def test_no_sign_and_no_codeword_alone_is_better(name):
    g = GRIDS[name]
    rng = np.random.default_rng(5)
    typical = float(g.book.square().mean().sqrt())
    u = torch.from_numpy(rng.standard_normal((60, WIDTH)).astype(np.float32)) * typical
    metric = torch.eye(WIDTH) + 0.2
    _, level = g.choose(u, metric)
    if g.signs == "even":
        assert (level.prod(1) > 0).all()

    def cost(q):
        return (((u - q) @ metric) * (u - q)).sum(-1)

    best, better = cost(level), 0
    for start in range(0, WIDTH, g.dim):
        for codeword in g.book:
            q = level.clone()
            part = q[:, start : start + g.dim]
            part.copy_(torch.copysign(codeword.expand_as(part), part))
            better += int((cost(q) < best * (1 - 1e-4)).sum())
    # where a vector is two codewords, the first was chosen beside an older second
    assert better <= (0 if g.dim == WIDTH else 0.002 * 2 * len(u) * len(g.book))


def test_scales_against_all_integers():
    """One group alive: its d and integer, all of them tried with the exact nearest vectors."""
    g = GRIDS["IQ2_S"]
    w = np.zeros((1, 256), np.float32)
    w[0, :16] = np.random.default_rng(6).standard_normal(16).astype(np.float32)
    error = float(np.square(g.unpack(g.pack(w), 256)[0, :16] - w[0, :16]).sum())
    x = torch.from_numpy(w[0, :16]).view(2, WIDTH)

    def at(step: float) -> float:
        _, level = g.nearest(x / step, torch.ones(2, WIDTH))
        return float((x - step * level).square().sum())

    best = min(at(step) for step in np.geomspace(0.01, 0.2, 600))
    assert error <= 1.1 * best


@pytest.mark.parametrize("name", NAMES)
def test_zero_rows_pieces_and_large_values(name):
    g = GRIDS[name]
    assert (g.unpack(g.pack(np.zeros((2, 256), np.float32)), 256) == 0).all()
    w, weight = model_like(2, (5, 512))
    w[2] = 0
    packed = g.pack(w, weight)
    assert np.array_equal(packed[3:4], g.pack(w[3:4], weight))
    assert np.array_equal(packed, g.pack(w, np.tile(weight, (5, 1))))
    assert g.pack(w[:0]).shape == (0, g.row_bytes(512))
    w = np.zeros((1, 256), np.float32)
    w[0, 0], w[0, 9] = 0.99 * g.largest, -0.99 * g.largest
    assert np.isfinite(g.unpack(g.pack(w), 256)).all()


@pytest.mark.parametrize("name", NAMES)
def test_refusals(name):
    g = grid(name)
    w = np.zeros((2, 256), np.float32)
    for bad in (np.nan, np.inf):
        w[1, 0] = bad
        with pytest.raises(JoulesmithError, match="NaN or infinity"):
            g.pack(w)
    w[1, 0] = 3e8
    with pytest.raises(JoulesmithError, match=f"beyond what {name}"):
        g.pack(w)
    with pytest.raises(JoulesmithError, match="do not cut"):
        g.pack(np.zeros((2, 320), np.float32))
    with pytest.raises(JoulesmithError, match="bytes wide"):
        g.unpack(np.zeros((2, g.block_bytes - 1), np.uint8), 256)
    with pytest.raises(JoulesmithError, match="importance"):
        g.pack(np.ones((2, 256), np.float32), -np.ones(256, np.float32))
