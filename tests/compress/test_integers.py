"""Integer grids by group: bytes come back, scales are near the best, rounding works on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from joulesmith.compress.quantize.gptq import gptq, output_error
from joulesmith.compress.quantize.integers import (
    TERNARY,
    IntGrid,
    integer_grid,
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
    grid = IntGrid(bits, 32, symmetric=symmetric)
    w = np.random.default_rng(seed).standard_normal((3, 96)).astype(np.float32) + shift
    packed = grid.pack(w)
    assert packed.shape == (3, grid.row_bytes(96))
    codes, lattice = grid.read(packed, 96)
    assert int(codes.max()) < len(grid.levels)
    assert bool((lattice.step >= 0).all()), "engines know no negative scales"
    assert grid.write(codes, lattice).tobytes() == packed.tobytes()
    back = torch.from_numpy(grid.unpack(packed, 96)).view(3, 3, 32)
    level = torch.tensor(grid.levels, dtype=torch.float32)[codes.long()].view(3, 3, 32)
    zero = torch.zeros(3, 3) if symmetric else lattice.stored[1]
    torch.testing.assert_close(back, lattice.step[..., None] * (level - zero[..., None]))


def least(x: np.ndarray, grid: IntGrid) -> float:
    """Squared error of the best of many scales and every zero, by trying them."""
    low, top = grid.levels[0], grid.levels[-1]
    zeros = [0] if grid.symmetric else range(top + 1)
    best = np.inf
    for step in np.abs(x).max() / np.linspace(0.3, 2.2 * top + 2, 1500):
        for zero in zeros:
            code = np.clip(np.round(x / step) + zero, low, top) - zero
            best = min(best, float(((x - step * code) ** 2).sum()))
    return best


@pytest.mark.parametrize(("bits", "symmetric"), [k for k in KINDS if k[0] in (TERNARY, 2, 3, 4)])
def test_scales_are_near_the_best_there_are(bits: int, symmetric: bool) -> None:
    grid = IntGrid(bits, 32, symmetric=symmetric)
    rng = np.random.default_rng(bits)
    w = (rng.standard_t(5, (6, 32)) + rng.choice([0, 1.5], (6, 1))).astype(np.float32)
    mine = ((grid.unpack(grid.pack(w), 32) - w) ** 2).sum()
    best = sum(least(row.astype(np.float64), grid) for row in w)
    assert mine <= 1.03 * best


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_error_feedback_works_on_them(bits: int, symmetric: bool) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((600, 64)) @ (rng.standard_normal((64, 64)) * 0.3 + np.eye(64))
    h = (x.T @ x).astype(np.float32)
    w = (rng.standard_normal((24, 64)) * 0.05).astype(np.float32)
    grid = IntGrid(bits, 32, symmetric=symmetric)
    plain = output_error(w, grid.pack(w), h, grid)
    one = output_error(w, gptq(w, h, grid, sweeps=0), h, grid)
    two = output_error(w, gptq(w, h, grid, sweeps=2), h, grid)
    assert two <= one * (1 + 1e-6)
    assert two < 0.8 * plain


def test_stored_bits_count_scales_and_zeros() -> None:
    assert integer_grid("int4-g128", 256).bits_per_weight == 4 + 16 / 128
    assert integer_grid("INT4-G64-ZP", 256).bits_per_weight == 4 + 20 / 64
    channel = integer_grid("INT8-CHANNEL", 256)
    assert (channel.group, channel.bits_per_weight) == (256, 8 + 16 / 256)
    assert integer_grid("TERNARY-G64", 128).levels == (-1, 0, 1)


@pytest.mark.parametrize(
    ("name", "columns", "match"),
    [
        ("INT4", 64, "unknown integer grid"),
        ("INT9-G32", 64, "unknown integer grid"),
        ("INT4-G128", 64, "do not cut into groups of 128"),
        ("INT4-G0", 64, "1 column or more"),
        ("TERNARY-G32-ZP", 64, "symmetric only"),
    ],
)
def test_bad_names(name: str, columns: int, match: str) -> None:
    with pytest.raises(JoulesmithError, match=match):
        integer_grid(name, columns)
