"""Products with packed pruned matrices: tiles and the C kernel give what dense weights give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from joulesmith.compress.quantize.integers import by_name
from joulesmith.compress.sparse.tensor import SparseTensor, pack, pack_codes, unpack
from joulesmith.engines import sparse_native
from joulesmith.engines.packed_store import Store
from joulesmith.engines.sparse_columns import NativeColumns
from joulesmith.engines.sparse_native import NativeSparse, takes
from joulesmith.engines.sparse_store import SparseStore, fastest
from joulesmith.errors import EngineError, JoulesmithError

KINDS = (
    "F16",
    "BF16",
    "INT4-G64",
    "INT4-G64-ZP",
    "INT8-G32",
    "INT8-G128",
    "TERNARY-G64",
    "INT2-G16",
)
native = pytest.mark.skipif(
    sparse_native.why_not() is not None, reason=str(sparse_native.why_not())
)


def made(kind: str, rows: int, columns: int, zeros: float = 0.75, seed: int = 0) -> SparseTensor:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, columns)).astype(np.float16).astype(np.float32)
    t = torch.from_numpy(w * (rng.random((rows, columns)) >= zeros))
    if kind in ("F16", "BF16"):
        return pack(t.bfloat16().float() if kind == "BF16" else t, kind=kind)
    grid = by_name(kind)
    assert grid is not None
    return pack_codes(grid, grid.pack(t), columns)


def stores(p: SparseTensor) -> list[Store]:
    found: list[Store] = [SparseStore(p)]
    if takes(p) and sparse_native.why_not() is None:
        found += [NativeSparse(p), NativeSparse(p, exact=True)]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_products_and_rows(kind: str) -> None:
    for rows, columns in ((1, 128), (70, 128), (130, 640)):
        p = made(kind, rows, columns)
        w = unpack(p).float()
        for store in stores(p):
            assert torch.equal(store.decode(slice(0, rows)), w)
            at = torch.tensor([rows - 1, 0, rows // 2, 0])
            assert torch.equal(store.decode(at), w[at])
            for n in (0, 1, 2, 3, 4, 5, 8, 9, 30):
                x = torch.randn(n, columns, generator=torch.Generator().manual_seed(n))
                got, want = store.product(x), x @ w.T
                # 16-bit inputs: half a step of 2^-15 of the largest, on each weight
                room = 1e-5 + float(x.abs().max() if n else 0) * 2**-16 * float(
                    w.abs().sum(1).max()
                )
                assert got.shape == want.shape and torch.allclose(got, want, rtol=1e-4, atol=room)
                assert store.product(x.bfloat16()).dtype == torch.bfloat16


@native
@settings(max_examples=25)
@given(
    st.sampled_from(KINDS), st.integers(1, 40), st.sampled_from([128, 192, 384]),
    st.floats(0, 1), st.integers(0, 99),
)  # fmt: skip
def test_kernel_weights_are_the_packed_ones(
    kind: str, rows: int, columns: int, zeros: float, seed: int
) -> None:
    if kind == "INT8-G128":
        columns = 384
    p = made(kind, rows, columns, zeros, seed)
    assert torch.equal(NativeSparse(p).decode(slice(0, rows)), unpack(p).float())


@native
def test_rows_that_are_not_whole_blocks_of_the_kernel() -> None:
    p = made("F16", 9, 200)
    x = torch.randn(2, 200)
    for store in stores(p):
        assert torch.allclose(store.product(x), x @ unpack(p).float().T, rtol=1e-4, atol=1e-4)


@native
def test_kernel_inputs_that_are_zero_or_large() -> None:
    p = made("INT8-G64", 16, 256, zeros=0.0)
    w = unpack(p)
    x = torch.zeros(3, 256)
    x[1, 7], x[2] = 3e30, -1e-30
    got = NativeSparse(p).product(x)
    assert torch.equal(got[0], torch.zeros(16))
    assert torch.allclose(got[1:], x[1:] @ w.T, rtol=1e-3)


@native
def test_threads_share_the_rows() -> None:
    p = made("INT4-G64", 1030, 576)
    x = torch.randn(5, 576)
    one = NativeSparse(p).product(x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(NativeSparse(p).product(x), one)
    finally:
        torch.set_num_threads(before)


@native
def test_bytes_in_memory() -> None:
    """A bit a weight and the values: nibbles filled up to a byte in each 64 columns."""
    p = made("INT4-G64", 256, 1024)
    store = NativeSparse(p)
    held = sum(b.numel() * b.element_size() for b in store.buffers())
    assert held <= p.rows * p.columns / 8 + len(p.values) + p.rows * 16 / 2 + p.rows * 40 + 1000


def test_moving_and_casting_leaves_packed_bytes_alone() -> None:
    p = made("INT4-G64", 32, 128)
    for store in stores(p):
        before = store.decode(slice(0, 32))
        store.to(torch.bfloat16)
        assert torch.equal(store.decode(slice(0, 32)), before)


def test_damage_is_told_when_it_loads() -> None:
    p = made("INT4-G64", 32, 128)
    for wrong in (
        replace(p, values=p.values[:-1]),
        replace(p, steps=np.full_like(p.steps, np.inf)),
    ):
        for store in (SparseStore, fastest):
            with pytest.raises(JoulesmithError):
                store(wrong)


def test_what_the_kernel_does_not_hold_runs_on_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = pack(torch.tensor([[0.1, 0.0, 0.3, 0.0]]))
    assert wide.kind == "F32" and isinstance(fastest(wide), SparseStore)
    grid = by_name("INT8-G64-ZP")
    assert grid is not None
    assert not takes(pack_codes(grid, grid.pack(torch.randn(2, 64)), 64))
    monkeypatch.setattr(sparse_native, "why_not", lambda: "no compiler")
    assert isinstance(fastest(made("INT4-G64", 2, 64)), SparseStore)


def test_no_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if sparse_native.why_not() is not None:
        pytest.skip("no such processor")
    build = sparse_native.kernel.__wrapped__
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sparse_native.shutil, "which", lambda _: None)
    with pytest.raises(EngineError, match="none is installed"):
        build()
    monkeypatch.setattr(sparse_native.shutil, "which", lambda _: "false")
    with pytest.raises(EngineError, match="cannot be built"):
        build()
    assert not list(tmp_path.rglob("*.so")) and not list(tmp_path.rglob("*.part"))


@native
@pytest.mark.parametrize("kind", ["F16", "BF16", "INT8-G320", "INT4-G320", "INT4-G320-ZP"])
@pytest.mark.parametrize(("rows", "height"), [(64, 64), (150, 64), (1, 16), (200, 32)])
def test_tiles_of_columns(kind: str, rows: int, height: int) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((rows, 320)).astype(np.float16).astype(np.float32)
    w *= (rng.random((-(-rows // height), 320)) < 0.25).repeat(height, 0)[:rows]
    t, name = torch.from_numpy(w), f"blocks-{height}x1"
    if kind in ("F16", "BF16"):
        p = pack(t.bfloat16() if kind == "BF16" else t, name, kind=kind)
    else:
        grid = by_name(kind)
        assert grid is not None
        p = pack_codes(grid, grid.pack(t), 320, name)
    want = unpack(p).float()
    for store in (NativeColumns(p), NativeColumns(p, exact=True), fastest(p)):
        assert isinstance(store, NativeColumns)
        assert torch.equal(store.decode(slice(0, rows)), want)
        assert torch.equal(store.decode(torch.tensor([rows - 1, 0])), want[[rows - 1, 0]])
        for n in (0, 1, 3, 6, 20):
            x = torch.randn(n, 320, generator=torch.Generator().manual_seed(n))
            room = 1e-5 + float(x.abs().max() if n else 0) * 2**-16 * float(want.abs().sum(1).max())
            assert torch.allclose(store.product(x), x @ want.T, rtol=1e-4, atol=room)
    with pytest.raises(JoulesmithError, match="no tiles of columns"):
        NativeColumns(made("INT4-G64", 64, 128))
