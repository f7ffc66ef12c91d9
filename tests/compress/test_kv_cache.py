"""Packed keys and values: against ggml's own blocks, and inside transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from joulesmith.compress.quantize.kv_cache import KVScheme, hadamard, pack, turned, unpack
from joulesmith.compress.quantize.kv_layers import (
    PackedCache,
    PackedLayer,
    frequencies,
    packed_cache,
)
from joulesmith.errors import JoulesmithError

SCHEMES = [
    KVScheme(8, "token", 16),
    KVScheme(8, "channel", 16),
    KVScheme(4, "token", 16, rotate=True),
    KVScheme(4, "channel", 8),
    KVScheme(4, "token", 16, symmetric=True),
    KVScheme(2, "channel", 8),
    KVScheme(4, "channel", 8, rope=True),
    KVScheme(8, "channel", 32, rope=True),
]
TURNING = 10000.0 ** -(torch.arange(0, 16, 2) / 16)


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
    step = span / ((1 << bits) - 1)
    off = (unpack(p, bits, torch.float32) - x).reshape(cut.shape)
    # Fitted scales may miss an end by more than half a step, never the block as a whole; float16
    # keeps the least value and the step to 2^-11 of themselves.
    slack = 2**-10 * (cut.abs().amax((3, 5), keepdim=True) + span)
    assert bool((off.abs() <= 1.5 * step + slack).all())
    low = cut.amin((3, 5), keepdim=True)
    plain = ((cut - low) / step.clamp(min=1e-9)).round() * step + low - cut
    root = [e.square().mean((3, 5), keepdim=True).sqrt() for e in (off, plain)]
    assert bool((root[0] <= root[1] + slack).all())
    assert p.codes.numel() == x.numel() * bits // 8


def test_fitting_lowers_the_error_of_four_bits() -> None:
    x = torch.randn(1, 1, 3200, 8, generator=torch.Generator().manual_seed(0))
    off = unpack(pack(x, 4, tokens=32, columns=1, symmetric=False), 4, torch.float32) - x
    cut = x.reshape(100, 32, 8)
    low, high = cut.amin(1, keepdim=True), cut.amax(1, keepdim=True)
    plain = ((cut - low) * 15 / (high - low)).round() * (high - low) / 15 + low - cut
    assert off.square().mean() < 0.95 * plain.square().mean()


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


def test_keys_are_turned_back_to_before_their_position_embedding(module: Any) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    x = torch.randn(2, 3, 50, 16, generator=torch.Generator().manual_seed(0))
    embedding = LlamaRotaryEmbedding(module.config)
    cos, sin = embedding(x, torch.arange(7, 57)[None])
    turning = frequencies(module.config, 16)
    there = apply_rotary_pos_emb(x, x, cos, sin)[1]
    torch.testing.assert_close(turned(x, turning, 7, back=False), there, atol=1e-5, rtol=0)
    torch.testing.assert_close(turned(there, turning, 7, back=True), x, atol=1e-5, rtol=0)
    part = turned(x, turning[:3], 0, back=False)
    assert torch.equal(part[..., 6:], x[..., 6:]) and not torch.equal(part[..., :6], x[..., :6])
    scaled = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    config = type(module.config)(**{**module.config.to_dict(), "rope_parameters": scaled})
    torch.testing.assert_close(frequencies(config, 16), turning / 4)


def test_a_wave_over_tokens_is_packed_as_what_it_was() -> None:
    # one large channel in all keys, as models have them, behind its position embedding
    g = torch.Generator().manual_seed(0)
    before = 0.1 * torch.randn(1, 1, 64, 16, generator=g) + 5.0 * (torch.arange(16) == 2)
    keys = turned(before, TURNING, 0, back=False)
    off = {}
    for rope in (False, True):
        layer = PackedLayer(KVScheme(4, "channel", 32, rope=rope), TURNING)
        off[rope] = (layer.update(keys, keys)[0] - keys).square().mean()
    assert off[True] < 0.05 * off[False]


def test_small_heads_share_a_group() -> None:
    scheme = KVScheme(4, "channel", 32)
    assert scheme.columns(4, 8) == scheme.columns(8, 8) == scheme.columns(1, 64) == 32
    assert scheme.columns(3, 8) == 8 and scheme.columns(2, 48) == 32
    assert scheme.bits_for(4, 8) == 5.0 and scheme.bits_for(3, 8) == 6.5
    x = torch.randn(2, 4, 32, 8, generator=torch.Generator().manual_seed(0))
    layer = PackedLayer(scheme)
    keys, values = layer.update(x, x)
    assert layer.nbytes == 2 * x.numel() * 5 / 8
    assert (values - x).abs().max() < 0.4 and (keys - x).abs().max() < 0.4
    assert torch.equal(layer.update(x[:, :, :1], x[:, :, :1])[1][:, :, :32], values)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_attention_reads_what_is_stored(scheme: KVScheme) -> None:
    torch.manual_seed(1)
    layer = PackedLayer(scheme, TURNING)
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
    keys_bits = scheme.bits + (16 if scheme.symmetric else 32) / scheme.group
    values_bits = 2 * scheme.bits_for(2, 16) - keys_bits
    stored = 2 * 2 * 16 * ((45 - waiting) * keys_bits + 45 * values_bits) / 8
    assert layer.nbytes == stored + 2 * 2 * 16 * waiting * 4


@pytest.mark.parametrize("scheme", [*SCHEMES[:5], *SCHEMES[6:]])
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
        layer = PackedLayer(scheme, TURNING)
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
        (lambda: KVScheme(4, rope=True), "by channel only"),
        (lambda: PackedLayer(KVScheme(4, "channel", rope=True)), "not known"),
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
