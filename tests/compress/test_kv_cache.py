"""Packed keys and values: against ggml's own blocks, and inside transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from joulesmith.compress.quantize.kv_cache import KVScheme, hadamard, pack, unpack
from joulesmith.compress.quantize.kv_layers import PackedCache, PackedLayer, packed_cache
from joulesmith.errors import JoulesmithError

SCHEMES = [
    KVScheme(8, "token", 16),
    KVScheme(8, "channel", 16),
    KVScheme(4, "token", 16, rotate=True),
    KVScheme(4, "channel", 8),
    KVScheme(4, "token", 16, symmetric=True),
    KVScheme(2, "channel", 8),
]


@pytest.fixture(scope="module")
def module() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.15,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(("bits", "kind"), [(8, "Q8_0"), (4, "Q4_0")])
@given(seed=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_symmetric_groups_are_ggmls_blocks(bits: int, kind: str, seed: int) -> None:
    gguf = pytest.importorskip("gguf")
    x = np.random.default_rng(seed).normal(size=(2, 6, 64)).astype(np.float32)
    p = pack(torch.from_numpy(x), bits, tokens=1, columns=32, symmetric=True)
    kinds = gguf.GGMLQuantizationType
    raw = gguf.quants.quantize(x.reshape(-1, 64), kinds[kind])
    want = gguf.quants.dequantize(raw, kinds[kind]).reshape(x.shape)
    np.testing.assert_array_equal(unpack(p, bits, torch.float32).numpy(), want)
    assert p.nbytes == raw.nbytes


@given(
    st.sampled_from([8, 4, 2]),
    st.sampled_from([(1, 8), (1, 16), (4, 1), (8, 1), (2, 4)]),
    st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_values_come_back_within_half_a_step(bits: int, block: tuple[int, int], seed: int) -> None:
    tokens, columns = block
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 8, 16, generator=g) + 3 * torch.randn(16, generator=g)
    p = pack(x, bits, tokens=tokens, columns=columns, symmetric=False)
    cut = x.reshape(2, 3, 8 // tokens, tokens, 16 // columns, columns)
    span = cut.amax((3, 5), keepdim=True) - cut.amin((3, 5), keepdim=True)
    step = (span / ((1 << bits) - 1)).expand(cut.shape).reshape(x.shape)
    off = (unpack(p, bits, torch.float32) - x).abs()
    # float16 keeps the least value and the step to 2^-11 of themselves
    assert bool((off <= 0.5 * step + 2**-10 * (x.abs() + span.max())).all())
    assert p.codes.numel() == x.numel() * bits // 8


def test_a_constant_group_is_exact_to_float16() -> None:
    x = torch.full((1, 1, 8, 8), 0.3)
    p = pack(x, 4, tokens=8, columns=1, symmetric=False)
    torch.testing.assert_close(unpack(p, 4, torch.float32), x.half().float())


def test_rotation_is_its_own_inverse_and_spreads() -> None:
    h = hadamard(64)
    torch.testing.assert_close(h @ h, torch.eye(64), atol=1e-6, rtol=0)
    one = torch.zeros(64)
    one[5] = 8
    assert (one @ h).abs().max() == pytest.approx(1.0)
    with pytest.raises(JoulesmithError, match="power of two"):
        hadamard(48)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_attention_reads_what_is_stored(scheme: KVScheme) -> None:
    torch.manual_seed(1)
    layer = PackedLayer(scheme)
    keys, values = torch.randn(2, 2, 45, 16), torch.randn(2, 2, 45, 16)
    parts = [layer.update(keys[:, :, a:b], values[:, :, a:b]) for a, b in ((0, 20), (20, 21))]
    k, v = layer.update(keys[:, :, 21:], values[:, :, 21:])
    assert k.shape == v.shape == keys.shape and layer.get_seq_length() == 45
    # what was stored once stays, whatever comes after
    run = scheme.group if scheme.keys == "channel" else 1
    kept = 20 // run * run
    assert torch.equal(parts[0][0][:, :, :kept], k[:, :, :kept])
    assert torch.equal(parts[0][1], v[:, :, :20])
    bound = {8: 0.03, 4: 0.4, 2: 2.0}[scheme.bits]
    assert (k - keys).abs().max() < bound and (v - values).abs().max() < bound
    waiting = 45 % run
    assert torch.equal(k[:, :, 45 - waiting :], keys[:, :, 45 - waiting :])
    stored = 2 * 2 * 16 * ((45 - waiting) + 45) * scheme.bits_per_value / 8
    assert layer.nbytes == stored + 2 * 2 * 16 * waiting * 4


@pytest.mark.parametrize("scheme", SCHEMES[:5])
def test_generation_with_a_packed_cache(module: Any, scheme: KVScheme) -> None:
    ids = torch.arange(30)[None].repeat(2, 1) * 7 % 96
    cache = PackedCache(module.config, scheme)
    with torch.no_grad():
        plain = module(ids).logits
        out = module.generate(ids, max_new_tokens=12, do_sample=False, past_key_values=cache)
        with packed_cache(module, scheme):
            packed = module(input_ids=ids, use_cache=False).logits
        assert torch.equal(module(ids).logits, plain)
    assert out.shape == (2, 42) and cache.get_seq_length() == 41
    whole = 2 * 2 * 2 * 2 * 41 * 16 * 4  # batch, heads, layers, keys and values
    assert cache.nbytes < whole * {8: 0.5, 4: 0.32}[scheme.bits]
    off = (packed - plain).abs().max() / plain.std()
    assert 0 < off < {8: 0.1, 4: 1.5}[scheme.bits]


def test_eight_bits_generate_what_floats_generate(module: Any) -> None:
    ids = torch.arange(25)[None] * 11 % 96
    with torch.no_grad():
        want = module.generate(ids, max_new_tokens=8, do_sample=False)
        cache = PackedCache(module.config, KVScheme(8, "channel", 8))
        got = module.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=cache)
    assert torch.equal(got, want)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_crop_reorder_and_select(scheme: KVScheme) -> None:
    torch.manual_seed(2)
    keys, values = torch.randn(3, 2, 29, 16), torch.randn(3, 2, 29, 16)
    for cut in (0, 3, 10, 29):
        layer = PackedLayer(scheme)
        k, v = layer.update(keys, values)
        layer.crop(-cut)
        assert layer.get_seq_length() == 29 - cut
        layer.batch_select_indices(torch.tensor([2, 0]))
        layer.batch_repeat_interleave(2)
        layer.reorder_cache(torch.tensor([3, 1, 0, 2]))
        more = torch.randn(4, 2, 1, 16)
        k2, v2 = layer.update(more, more)
        order = torch.tensor([0, 2, 2, 0])
        assert k2.shape[-2] == 30 - cut
        if scheme.keys == "token":
            # nothing is packed again
            assert torch.equal(k2[:, :, :-1], k[order][:, :, : 29 - cut])
        else:
            # a group that was cut is packed again when it is full, from what it read back
            off = (k2[:, :, :-1] - k[order][:, :, : 29 - cut]).abs()
            assert not off.numel() or off.max() < 0.7
        assert torch.equal(v2[:, :, :-1], v[order][:, :, : 29 - cut])
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.nbytes == 0
    assert torch.equal(layer.update(keys, values)[1], v)


def test_what_cannot_be_packed_is_one_line(module: Any) -> None:
    from transformers import Qwen2Config

    for make, match in (
        (lambda: KVScheme(3), "8, 4 or 2 bits"),
        (lambda: KVScheme(4, group=12), "multiple of 8"),
        (lambda: pack(torch.zeros(5, 8), 4, tokens=4, columns=1, symmetric=False), "do not cut"),
        (
            lambda: PackedCache(
                Qwen2Config(num_hidden_layers=1, layer_types=["sliding_attention"]), KVScheme(8)
            ),
            "full attention only",
        ),
        (
            lambda: PackedLayer(KVScheme(4, rotate=True)).update(
                torch.zeros(1, 1, 2, 48), torch.zeros(1, 1, 2, 48)
            ),
            "power of two",
        ),
        (
            lambda: PackedLayer(KVScheme(4)).update(
                torch.zeros(1, 1, 2, 48), torch.zeros(1, 1, 2, 48)
            ),
            "do not cut",
        ),
    ):
        with pytest.raises(JoulesmithError, match=match):
            make()
