"""Packed matrices against the float weights of their grids, and models made of them."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from joulesmith.compress.quantize.grids import Grid, grid
from joulesmith.compress.quantize.integers import IntGrid
from joulesmith.engines import packed_store
from joulesmith.engines.packed import (
    PackedEmbedding,
    PackedLinear,
    pack_module,
    resident_bytes,
)
from joulesmith.engines.packed_store import Blocks, Kernel4, Planes, from_bytes
from joulesmith.errors import JoulesmithError

needs_kernel = pytest.mark.skipif(
    packed_store._lanes() == 0, reason="no vectorised four-bit kernel on this processor"
)
INT_KINDS = ["INT8", "INT7", "INT6", "INT5", "INT4", "INT3", "INT2"]
GGUF_KINDS = ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "IQ4_NL", "Q4_K", "Q6_K", "Q2_K", "F16", "BF16"]
KERNEL_KINDS = ["INT4-G32", "INT4-G64-ZP", "INT8-G128", "INT8-G32-ZP", "Q4_0", "Q4_1", "Q8_0"]


def weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, columns)) + 0.3).astype(np.float32)


def exact(kind: str, packed: np.ndarray, columns: int) -> torch.Tensor:
    return torch.from_numpy(grid(kind).unpack(packed, columns))


@settings(max_examples=40)
@given(
    st.sampled_from([*INT_KINDS, *(f"{k}-ZP" for k in INT_KINDS), "TERNARY"]),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
)
def test_integers_read_back_to_the_bit(
    kind: str, rows: int, group: int, groups: int, seed: int
) -> None:
    name, _, zero = kind.partition("-")
    g = grid(f"{name}-G{group}" + (f"-{zero}" if zero else ""))
    assert isinstance(g, IntGrid)
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, len(g.levels), (rows, group * groups)).astype(np.uint8)
    step = torch.from_numpy(rng.random((rows, groups)).astype(np.float16)).float()
    zeros = torch.from_numpy(rng.integers(0, len(g.levels), (rows, groups))).float()
    packed = g.write(torch.from_numpy(codes), g._lattice(step, None if g.symmetric else zeros))
    store = from_bytes(g, packed, group * groups, torch.float32)
    assert isinstance(store, Planes)
    want = exact(g.name, packed, group * groups)
    assert torch.equal(store.decode(slice(0, rows)), want)
    ids = torch.from_numpy(rng.integers(0, rows, 5))
    assert torch.equal(store.decode(ids), want[ids])
    held = sum(b.numel() * b.element_size() for b in store.buffers())
    padding = rows * 8 * g.bits  # bits of at most 7 columns, and zeros that take a byte
    assert 8 * held <= rows * group * groups * g.bits_per_weight + padding + 8 * rows * groups


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_other_types_read_back_to_the_bit(kind: str) -> None:
    packed = grid(kind).pack(weights(70, 256))
    store = from_bytes(grid(kind), packed, 256, torch.float32)
    assert isinstance(store, Blocks)
    want = exact(kind, packed, 256)
    assert torch.equal(store.decode(slice(3, 70)), want[3:])
    assert torch.equal(store.decode(torch.tensor([69, 0, 0])), want[[69, 0, 0]])
    assert resident_bytes(store) == packed.nbytes


@pytest.mark.parametrize("kind", ["INT4-G32", "INT3-G32-ZP", "TERNARY-G32", "Q5_0", "Q6_K"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 40])
def test_products_by_tiles(kind: str, dtype: Any, count: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(packed_store, "TILE", 256 * 16)
    packed = grid(kind).pack(weights(70, 256))
    store = from_bytes(grid(kind), packed, 256, dtype, "exact")
    spans: list[slice] = []
    decode = store.decode
    monkeypatch.setattr(store, "decode", lambda at: spans.append(at) or decode(at))
    x = torch.from_numpy(weights(count, 256, 1)).to(dtype)
    got = store.product(x)
    assert got.dtype == dtype
    # one tile at a time, each once
    assert [s.start for s in spans] == list(range(0, 70, 16))
    want = x.double() @ exact(kind, packed, 256).double().T
    size = float(want.abs().max())
    bound = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert float((got.double() - want).abs().max()) < bound * size


@needs_kernel
@settings(max_examples=15)
@given(
    st.sampled_from(["INT4-G32", "INT4-G64", "INT4-G32-ZP", "INT8-G128", "INT8-G96-ZP", "INT3-G32",
                     "INT2-G64", "TERNARY-G32", "INT5-G64-ZP", "INT6-G32"]),
    st.integers(1, 150),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_kernel_holds_the_grids_weights(kind: str, rows: int, seed: int) -> None:
    """With steps that bfloat16 holds, and offsets that it holds too, nothing is rounded."""
    g = grid(kind)
    assert isinstance(g, IntGrid)
    columns = 2 * g.group
    rng = np.random.default_rng(seed)
    codes = torch.from_numpy(rng.integers(0, len(g.levels), (rows, columns)).astype(np.uint8))
    step = torch.from_numpy(2.0 ** rng.integers(-9, 3, (rows, 2))).float()
    zero = torch.from_numpy(rng.integers(0, len(g.levels), (rows, 2))).float()
    packed = g.write(codes, g._lattice(step, None if g.symmetric else zero))
    store = from_bytes(g, packed, columns, torch.bfloat16, "speed")
    assert isinstance(store, Kernel4)
    want = exact(kind, packed, columns)
    assert torch.equal(store.decode(slice(0, rows)), want)
    ids = torch.from_numpy(rng.integers(0, rows, 7))
    assert torch.equal(store.decode(ids), want[ids])
    for count in (1, 3, 90):
        x = torch.from_numpy(rng.standard_normal((count, columns))).bfloat16()
        got = store.product(x)
        assert got.shape == (count, rows) and got.dtype == torch.bfloat16
        right = x.double() @ want.double().T
        scale = x.double().abs() @ want.double().abs().T
        assert bool(((got.double() - right).abs() <= 2**-7 * scale).all())


@needs_kernel
@pytest.mark.parametrize("kind", KERNEL_KINDS)
def test_kernel_rounds_steps_to_bfloat16_and_no_more(kind: str) -> None:
    packed = grid(kind).pack(weights(200, 256))
    store = from_bytes(grid(kind), packed, 256, torch.bfloat16)
    assert isinstance(store, Kernel4)
    want = exact(kind, packed, 256)
    # two roundings of 2^-9: of the step, and of the offset, which is of the weights' size
    error = (store.decode(slice(0, 200)) - want).abs()
    assert float(error.max()) <= 2.0**-8 * float(want.abs().max())
    assert float(error.max()) > 0
    assert Kernel4 is not type(from_bytes(grid(kind), packed, 256, torch.bfloat16, "exact"))
    assert Kernel4 is not type(from_bytes(grid(kind), packed, 256, torch.float32, "speed"))


@needs_kernel
def test_kernel_is_taken_only_where_codes_do_not_grow() -> None:
    for kind, wanted in {"INT4-G32": True, "INT8-G32": True, "INT3-G32": False, "INT6-G32": False,
                         "INT4-G16": False, "IQ4_NL": False, "Q6_K": False}.items():  # fmt: skip
        assert packed_store.kernel_takes(grid(kind), 256, "bytes") is wanted
        g = grid(kind)
        assert isinstance(g, Grid)
        able = kind not in ("INT4-G16", "IQ4_NL", "Q6_K")
        assert packed_store.kernel_takes(g, 256, "speed") is able


def test_damaged_scales_and_sizes_are_refused() -> None:
    g = grid("INT4-G32")
    packed = g.pack(weights(4, 64)).copy()
    with pytest.raises(JoulesmithError, match="bytes wide"):
        from_bytes(g, packed, 96, torch.float32)
    packed[2, :2] = np.frombuffer(np.float16("nan").tobytes(), np.uint8)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(JoulesmithError, match="NaN"):
            from_bytes(g, packed, 64, dtype)


# -- modules ------------------------------------------------------------------------


def packing(module: nn.Module, kind: str, names: list[str]) -> dict[str, Any]:
    state = module.state_dict()
    return {n: (kind, grid(kind).pack(state[n].float().numpy())) for n in names}


def test_any_module_with_linears() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 3))
    packed = packing(module, "INT4-G32", ["0.weight"])
    old = weakref.ref(module[0].weight)
    before = resident_bytes(module)
    want = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 3))
    want.load_state_dict(module.state_dict())
    want[0].weight.data = exact(*packed["0.weight"], 64)
    pack_module(module, packed)
    gc.collect()
    assert old() is None
    assert before - resident_bytes(module) == 100 * 64 * 4 - packed["0.weight"][1].nbytes
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(module(x), want(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(JoulesmithError, match="no gradients"):
        module(x.clone().requires_grad_())
    scales = module[0].store.steps.clone()
    half = module.to(torch.float16)(x.half())  # casting the module leaves scales alone
    assert torch.equal(module[0].store.steps, scales)
    torch.testing.assert_close(half.float(), want(x), rtol=2e-2, atol=2e-2)


def test_what_does_not_fit_is_refused() -> None:
    module = nn.Sequential(nn.Linear(64, 100), nn.LayerNorm(100))
    good = packing(module, "INT4-G32", ["0.weight"])["0.weight"]
    for name in ("0.bias", "1.weight", "weight", "2.weight", "x.y.weight"):
        with pytest.raises(JoulesmithError, match="no weight of a linear"):
            pack_module(module, {name: good})
    with pytest.raises(JoulesmithError, match="100 rows"):
        pack_module(module, {"0.weight": (good[0], good[1][:50])})
    with pytest.raises(JoulesmithError, match="bytes wide"):
        pack_module(module, {"0.weight": ("INT8-G32", good[1])})


def llama(tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=150, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=tied, initializer_range=0.15,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["INT8-G32", "INT4-G32-ZP", "INT3-G16", "Q5_0"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_decoder(kind: str, tied: bool) -> None:
    module, float_module = llama(tied), llama(tied)
    names = [n for n, p in module.named_parameters() if p.ndim == 2]
    packed = packing(module, kind, names)
    for name, (_, raw) in packed.items():
        parameter = float_module.get_parameter(name)
        parameter.data = exact(kind, raw, parameter.shape[1])
    pack_module(module, packed)
    assert isinstance(module.model.embed_tokens, PackedEmbedding)
    assert isinstance(module.lm_head, PackedLinear)
    assert (module.lm_head.store is module.model.embed_tokens.store) is tied
    assert not [n for n, p in module.named_parameters() if p.ndim == 2]
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            module(ids).logits, float_module(ids).logits, rtol=1e-4, atol=1e-4
        )
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = [m.generate(ids[:, :5], **settings)[0, 5:].tolist() for m in (module, float_module)]
    assert len(found[0]) == 6 and found[0] == found[1]


def test_a_tied_head_may_have_a_matrix_of_its_own() -> None:
    module = llama(True)
    state = {n: p.detach().clone() for n, p in module.named_parameters()}
    embedding = state["model.embed_tokens.weight"].numpy()
    eight = ("INT8-G32", grid("INT8-G32").pack(embedding))
    four = ("INT4-G32", grid("INT4-G32").pack(embedding))
    pack_module(module, {"lm_head.weight": four})
    assert isinstance(module.model.embed_tokens, nn.Embedding)
    assert module.lm_head.store.kind == "INT4-G32"
    module = llama(True)
    pack_module(module, {"model.embed_tokens.weight": eight, "lm_head.weight": four})
    assert module.model.embed_tokens.store.kind == "INT8-G32"
    assert module.lm_head.store.kind == "INT4-G32"
    with pytest.raises(IndexError, match="150 rows"):
        module.model.embed_tokens(torch.tensor([-1]))


_MEASURE = """
import os
import numpy as np
import torch
from joulesmith.compress.quantize.grids import grid
from joulesmith.energy.memory import resident
from joulesmith.engines.packed_store import from_bytes

def mark():
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    return resident(os.getpid())[0]

g = grid("INT4-G64")
packed = np.random.default_rng(0).integers(0, 256, (8192, g.row_bytes(4096)), np.uint8)
packed.reshape(8192, -1, g.block_bytes)[:, :, 1] &= 0x3F  # scales that are finite
for dtype, rows in ((torch.float32, 1), (torch.bfloat16, 100)):
    x = torch.randn(rows, 4096, dtype=dtype)
    from_bytes(g, packed[:64], 4096, dtype).product(x)
    before = mark()
    store = from_bytes(g, packed, 4096, dtype)
    held = resident(os.getpid())[0]
    store.product(x)
    print(held - before, resident(os.getpid())[1] - before)
    del store
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_near_the_packed_bytes() -> None:
    """8192 x 4096 in four bits: 17 MiB packed, 128 MiB (64 in bfloat16) as floats."""
    done = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True)
    if "clear_refs" in done.stderr:
        pytest.skip("the high-water mark cannot be reset here")
    assert done.returncode == 0, done.stderr[-400:]
    for line in done.stdout.splitlines():
        held, peak = (int(v) / 2**20 for v in line.split())
        assert 12 < held < 30
        assert peak < 50
