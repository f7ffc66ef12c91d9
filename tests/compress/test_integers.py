"""Integer grids by group: bytes come back, scales are near the best, rounding works on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from joulesmith.compress.quantize.gptq import gptq, output_error
from joulesmith.compress.quantize.grids import grid
from joulesmith.compress.quantize.integers import (
    TERNARY,
    IntGrid,
    pack_codes,
    unpack_codes,
)
from joulesmith.errors import JoulesmithError

KINDS = [(b, s) for b in (2, 3, 4, 5, 6, 8) for s in (True, False)] + [(TERNARY, True)]


@given(st.integers(2, 8), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_codes_come_back(bits: int, n: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (2, 3, n)).astype(np.uint8)
    raw = pack_codes(codes, bits)
    assert raw.shape == (2, 3, -(-n * bits // 8))
    assert np.array_equal(unpack_codes(raw, bits, n), codes)


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), shift=st.sampled_from([0.0, 3.0, -3.0]))
def test_what_is_written_reads_back(bits: int, symmetric: bool, seed: int, shift: float) -> None:
    g = IntGrid(bits, 32, symmetric=symmetric)
    w = np.random.default_rng(seed).standard_normal((3, 96)).astype(np.float32) + shift
    packed = g.pack(w)
    assert packed.shape == (3, g.row_bytes(96))
    codes, lattice = g.read(packed, 96)
    assert int(codes.max()) < len(g.levels)
    assert bool((lattice.step >= 0).all()), "engines know no negative scales"
    assert g.write(codes, lattice).tobytes() == packed.tobytes()
    back = torch.from_numpy(g.unpack(packed, 96)).view(3, 3, 32)
    level = torch.tensor(g.levels, dtype=torch.float32)[codes.long()].view(3, 3, 32)
    zero = torch.zeros(3, 3) if symmetric else lattice.stored[1]
    torch.testing.assert_close(back, lattice.step[..., None] * (level - zero[..., None]))


def least(x: np.ndarray, g: IntGrid) -> float:
    """Squared error of the best of many scales and every zero, by trying them."""
    low, top = g.levels[0], g.levels[-1]
    zeros = [0] if g.symmetric else range(top + 1)
    best = np.inf
    for step in np.abs(x).max() / np.linspace(0.3, 2.2 * top + 2, 1500):
        for zero in zeros:
            code = np.clip(np.round(x / step) + zero, low, top) - zero
            best = min(best, float(((x - step * code) ** 2).sum()))
    return best


@pytest.mark.parametrize(("bits", "symmetric"), [k for k in KINDS if k[0] in (TERNARY, 2, 3, 4)])
def test_scales_are_near_the_best_there_are(bits: int, symmetric: bool) -> None:
    g = IntGrid(bits, 32, symmetric=symmetric)
    rng = np.random.default_rng(bits)
    w = (rng.standard_t(5, (6, 32)) + rng.choice([0, 1.5], (6, 1))).astype(np.float32)
    mine = ((g.unpack(g.pack(w), 32) - w) ** 2).sum()
    best = sum(least(row.astype(np.float64), g) for row in w)
    assert mine <= 1.03 * best


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_error_feedback_works_on_them(bits: int, symmetric: bool) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((600, 64)) @ (rng.standard_normal((64, 64)) * 0.3 + np.eye(64))
    h = (x.T @ x).astype(np.float32)
    w = (rng.standard_normal((24, 64)) * 0.05).astype(np.float32)
    g = IntGrid(bits, 32, symmetric=symmetric)
    plain = output_error(w, g.pack(w), h, g)
    one = output_error(w, gptq(w, h, g, sweeps=0), h, g)
    two = output_error(w, gptq(w, h, g, sweeps=2), h, g)
    assert two <= one * (1 + 1e-6)
    assert two < 0.8 * plain


def test_stored_bits_count_scales_and_zeros() -> None:
    assert grid("INT4-G128").bits_per_weight == 4 + 16 / 128
    assert grid("INT4-G64-ZP").bits_per_weight == 4 + 20 / 64
    assert grid("INT8-G576").bits_per_weight == 8 + 16 / 576
    ternary = grid("TERNARY-G64")
    assert isinstance(ternary, IntGrid)
    assert ternary.levels == (-1, 0, 1)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("INT4", "unknown tensor type"),
        ("INT9-G32", "unknown tensor type"),
        ("INT4-G0", "1 column or more"),
        ("TERNARY-G32-ZP", "symmetric only"),
    ],
)
def test_bad_names(name: str, match: str) -> None:
    with pytest.raises(JoulesmithError, match=match):
        grid(name)


def test_groups_must_divide_the_rows() -> None:
    with pytest.raises(JoulesmithError, match="INT4-G128 blocks of 128"):
        grid("INT4-G128").row_bytes(192)
