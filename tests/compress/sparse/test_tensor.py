"""Packed matrices: every value comes back, in the bytes that theory allows, or one line."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from joulesmith.compress.quantize.integers import IntGrid, by_name
from joulesmith.compress.sparse.tensor import (
    SparseTensor,
    check,
    information_bytes,
    least_kind,
    pack,
    pack_codes,
    unpack,
    unpack_codes,
)
from joulesmith.errors import JoulesmithError

LAYOUTS = (None, "dense", "bitmask", "gaps", "2:4", "blocks-4x4")
GRIDS = ("INT2-G32", "INT3-G32-ZP", "INT4-G64", "INT4-G32-ZP", "INT8-G64", "TERNARY-G32")


def pruned(
    rows: int, columns: int, zeros: float, seed: int, *, two_four: bool = False
) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, columns)).astype(np.float16).astype(np.float32)
    if two_four:
        w *= (rng.random((rows, columns // 4, 4)).argsort(-1) < 2).reshape(rows, columns)
    else:
        w *= rng.random((rows, columns)) >= zeros  # leaves -0.0, as pruning does
    return torch.from_numpy(w)


@settings(max_examples=15)
@given(st.integers(1, 70), st.sampled_from([4, 64, 200]), st.floats(0, 1), st.integers(0, 99))
@pytest.mark.parametrize("kind", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_floats_round_trip(
    name: str | None, kind: str, rows: int, columns: int, zeros: float, seed: int
) -> None:
    w = pruned(rows, columns, zeros, seed, two_four=name == "2:4")
    if kind == "BF16":
        w = w.bfloat16().float()
    before = w.clone()
    p = pack(w, name, kind=kind)
    back = unpack(p)
    assert torch.equal(back.float(), w)  # 0 and -0 are equal
    assert str(back.dtype) == {"F16": "torch.float16", "BF16": "torch.bfloat16"}.get(
        kind, "torch.float32"
    )
    assert torch.equal(w, before) and p.kind == kind


@settings(max_examples=8)
@given(st.integers(1, 40), st.sampled_from([64, 192]), st.floats(0, 1), st.integers(0, 99))
@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("name", [None, "dense", "gaps", "bitmask", "blocks-4x4"])
def test_codes_round_trip(
    name: str | None, kind: str, rows: int, columns: int, zeros: float, seed: int
) -> None:
    grid = by_name(kind)
    assert grid is not None
    raw = grid.pack(pruned(rows, columns, zeros, seed))
    p = pack_codes(grid, raw, columns, name)
    assert np.array_equal(unpack_codes(p), raw)
    want = grid.unpack(raw, columns)
    assert np.array_equal(unpack(p).numpy(), want)
    assert name in ("dense", "blocks-4x4", None) or p.stored == np.count_nonzero(
        want if grid.symmetric else unpack(p).numpy()
    )


@pytest.mark.parametrize("zeros", [0.5, 0.62, 0.75, 0.95])
@pytest.mark.parametrize("kind", ["F16", "INT8-G64", "INT4-G64", "INT4-G64-ZP"])
def test_bytes_are_within_five_percent_of_theory(kind: str, zeros: float) -> None:
    w = pruned(320, 576, zeros, 1)
    scales = 0
    if kind == "F16":
        p = pack(w)
    else:
        grid = by_name(kind)
        assert grid is not None
        p = pack_codes(grid, grid.pack(w), 576)
        assert p.steps is not None
        scales = p.steps.nbytes + (0 if p.zeros is None else p.zeros.nbytes)
    nonzero = int(np.count_nonzero(unpack(p).float().numpy()))
    assert p.nbytes - scales <= 1.05 * information_bytes(w.numel(), nonzero, p.bits)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
@pytest.mark.parametrize("kind", ["F16", "INT4-G64"])
def test_groups_are_within_five_percent_of_theory(n: int, m: int, kind: str) -> None:
    import math

    rng = np.random.default_rng(0)
    mask = (rng.random((320, 576 // m, m)).argsort(-1) < n).reshape(320, 576)
    if kind == "F16":
        w = torch.from_numpy(rng.standard_normal((320, 576)).astype(np.float16) * mask)
        p, scales = pack(w), 0
    else:
        grid = by_name(kind)
        assert grid is not None
        # codes of +-7: nothing but what was pruned rounds to zero
        w = torch.from_numpy(rng.choice([-7.0, 7.0], (320, 576)).astype(np.float32) * mask)
        p = pack_codes(grid, grid.pack(w), 576, f"{n}:{m}")
        assert p.steps is not None
        scales = p.steps.nbytes
    assert p.layout == f"{n}:{m}"
    groups = w.numel() // m
    least = groups * (math.log2(math.comb(m, n)) + n * p.bits) / 8
    assert p.nbytes - scales <= 1.05 * least


def test_a_pruned_ternary_matrix_takes_a_sign_each() -> None:
    grid = by_name("TERNARY-G64")
    assert grid is not None
    w = torch.tensor(
        np.random.default_rng(0).choice([-1.0, 0.0, 1.0], (256, 512), p=[0.1, 0.8, 0.1])
    )
    p = pack_codes(grid, grid.pack(w.float()), 512)
    assert p.bits == 1 and p.steps is not None
    assert 8 * (p.nbytes - p.steps.nbytes) / w.numel() < 0.95  # 0.2 signs and 0.722 of places


def test_kinds() -> None:
    assert least_kind(torch.tensor([[1.0, 0.1]]).half().float()) == "F16"
    assert least_kind(torch.tensor([[1e30]]).bfloat16().float()) == "BF16"
    assert least_kind(torch.tensor([[0.1]])) == "F32"
    assert pack(torch.zeros(0, 8)).nbytes == 0 and unpack(pack(torch.zeros(0, 8))).shape == (0, 8)
    for wrong in (
        torch.zeros(4),
        torch.zeros(2, 2, dtype=torch.int8),
        torch.tensor([[np.nan]]),
        torch.tensor([[np.inf]]),
    ):
        with pytest.raises(JoulesmithError):
            pack(wrong)
    with pytest.raises(JoulesmithError, match="F16"):
        pack(torch.tensor([[0.1]]), kind="F16")
    with pytest.raises(JoulesmithError, match="INT4"):
        pack(torch.tensor([[0.1]]), kind="INT4")


def damaged(p: SparseTensor, how: str) -> SparseTensor:
    index = p.index.copy()
    if how == "index":
        index[0, 1] += 1
    elif how == "negative":
        index[0, 0] = -1
    elif how == "huge":
        index[0] = 2**31 - 1
    changed = {
        "tiles": {"index": index[:0]},
        "places": {"places": p.places[:-1]},
        "values": {"values": p.values[1:]},
        "rows": {"rows": p.rows + 100_000},
        "columns": {"columns": p.columns + 1},
        "layout": {"layout": "2:4"},
        "kind": {"kind": "F64"},
        "steps": {"steps": None},
        "nan": {"steps": np.full_like(p.steps, np.nan)},
        "zeros": {"zeros": np.full(p.steps.shape, 99, np.uint8)},
        "none": {"zeros": None},
        "wide": {"steps": p.steps[:, :1]},
    }
    return replace(p, **changed.get(how, {"index": index}))


@pytest.mark.parametrize(
    "how",
    [
        "index",
        "negative",
        "huge",
        "tiles",
        "places",
        "values",
        "rows",
        "columns",
        "layout",
        "kind",
        "steps",
        "nan",
        "zeros",
        "none",
        "wide",
    ],
)
def test_damage_is_one_line(how: str) -> None:
    grid = by_name("INT4-G32-ZP")
    assert grid is not None
    p = pack_codes(grid, grid.pack(pruned(70, 1024, 0.7, 0)), 1024, "gaps")
    with pytest.raises(JoulesmithError) as e:
        unpack(damaged(p, how))
    assert "\n" not in str(e.value)


GRID = IntGrid(4, 32, symmetric=False)
CODED = pack_codes(GRID, GRID.pack(pruned(16, 64, 0.7, 3)), 64, "gaps")


@settings(max_examples=100)
@given(st.data())
def test_flipped_bits_are_one_line_or_other_weights(data: st.DataObject) -> None:
    """Never another exception, and never a shape or a number that cannot be."""
    name = data.draw(st.sampled_from(["gaps", "bitmask", "2:4", "blocks-4x4"]))
    p = data.draw(
        st.sampled_from([CODED, pack(pruned(16, 64, 0.7, 3, two_four=name == "2:4"), name)])
    )
    part = data.draw(st.sampled_from(["places", "values", "index"]))
    raw = getattr(p, part).copy()
    flat = raw.view(np.uint8).reshape(-1)
    if len(flat):
        at = data.draw(st.integers(0, len(flat) - 1))
        flat[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = unpack(replace(p, **{part: raw}))
    except JoulesmithError as e:
        assert "\n" not in str(e)
        return
    assert found.shape == (16, 64) and bool(torch.isfinite(found).all())


def test_checks_before_memory() -> None:
    """An index that promises what its bytes do not hold costs nothing."""
    p = pack(pruned(16, 64, 0.5, 0), "bitmask")
    with pytest.raises(JoulesmithError):
        check(replace(p, rows=1 << 40))
    with pytest.raises(JoulesmithError):
        check(replace(p, columns=1 << 40))
