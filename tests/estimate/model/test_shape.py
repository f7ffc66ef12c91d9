"""Shapes count what their authors and transformers count; hostile sources cost one line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from published import (
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    EXACT,
    FALCON_40B,
    GEMMA2_9B,
    GEMMA3_4B,
    GPT_OSS_20B,
    LLAMA4_SCOUT,
    LLAMA_8B,
    MIXTRAL,
    OPT_350M,
    QWEN3_30B,
    QWEN3_NEXT,
    QWEN15_MOE,
    QWEN25_7B,
    ROUNDED,
    SMOLLM2,
)

from joulesmith.errors import JoulesmithError
from joulesmith.estimate.model.families import ALIASES, FAMILIES
from joulesmith.estimate.model.header import of_gguf
from joulesmith.estimate.model.hub_config import of_config
from joulesmith.estimate.model.plain import of_numbers
from joulesmith.estimate.model.source import read


@pytest.mark.parametrize("name", EXACT)
def test_parameters_are_the_published_ones(name: str) -> None:
    config, weights = EXACT[name]
    assert of_config(config).parameters == weights


@pytest.mark.parametrize("name", ROUNDED)
def test_mixtures_in_all_and_per_token(name: str) -> None:
    config, total, active, within, about = ROUNDED[name]
    shape = of_config(config)
    assert shape.parameters / 1e9 == pytest.approx(total, abs=within)
    # authors count the embedding and the head, one of them, or neither
    least = shape.active - shape.embedding - shape.head
    assert least / 1e9 - about <= active <= shape.active / 1e9 + about


def test_gpt_oss_counts_the_head_and_not_the_embedding() -> None:
    shape = of_config(GPT_OSS_20B)
    assert (shape.active - shape.embedding) / 1e9 == pytest.approx(3.61, abs=0.005)  # its card
    assert shape.stored is not None
    # the checkpoint is 13.8 GB: experts in MXFP4, the rest in bfloat16
    assert shape.stored.total / 1e9 == pytest.approx(13.76, abs=0.02)


REFERENCE = {
    "falcon-40b": FALCON_40B, "opt-350m": OPT_350M, "mixtral": MIXTRAL, "qwen3-30b": QWEN3_30B,
    "gpt-oss-20b": GPT_OSS_20B, "qwen3-next": QWEN3_NEXT, "deepseek-v3": DEEPSEEK_V3,
    "deepseek-v2-lite": DEEPSEEK_V2_LITE, "gemma-2-9b": GEMMA2_9B, "qwen2-moe": QWEN15_MOE,
    "llama4": LLAMA4_SCOUT["text_config"], "gemma3": GEMMA3_4B["text_config"],
    "biases": {**LLAMA_8B, "attention_bias": True, "mlp_bias": True},
    "falcon-rw": {"model_type": "falcon", "hidden_size": 2048, "num_hidden_layers": 24,
                  "num_attention_heads": 32, "multi_query": False, "parallel_attn": False,
                  "bias": True, "alibi": True, "vocab_size": 50304},
    "stablelm": {"model_type": "stablelm", "hidden_size": 64, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 128,
                 "vocab_size": 100, "use_qkv_bias": True, "use_parallel_residual": True},
    "latent biases": {**DEEPSEEK_V3, "attention_bias": True},
    "dense granite": {"model_type": "granitemoehybrid", "hidden_size": 64, "num_hidden_layers": 2,
                      "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
                      "shared_intermediate_size": 96, "num_local_experts": 0, "vocab_size": 100,
                      "layer_types": ["mamba", "attention"], "mamba_n_heads": 16,
                      "mamba_d_head": 8, "mamba_d_state": 16},
    "sparse steps": {**QWEN3_30B, "decoder_sparse_step": 2, "mlp_only_layers": [1, 5]},
}  # fmt: skip


def transformers_count(config: dict[str, Any]) -> int:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rest = {k: v for k, v in config.items() if k not in ("model_type", "quantization_config")}
    try:
        made = transformers.AutoConfig.for_model(config["model_type"], **rest)
    except ValueError:
        pytest.skip(f"this transformers has no {config['model_type']}")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(made)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", REFERENCE)
def test_parameters_are_those_of_transformers(name: str) -> None:
    config: dict[str, Any] = REFERENCE[name]  # type: ignore[assignment]
    assert of_config(config).parameters == transformers_count(config)


# the names of models that also see are no causal language models to transformers
@pytest.mark.parametrize("kind", sorted(set(FAMILIES) - set(ALIASES) - {"gemma3"}))
def test_every_family_agrees_with_transformers_on_its_default(kind: str) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {kind}")
    # what the class's own defaults lack to make a model
    more = {"nemotron": {"num_key_value_heads": 8}, "ministral": {"head_dim": 128}}.get(kind, {})
    config = transformers.AutoConfig.for_model(kind, **more)
    assert of_config(config.to_dict()).parameters == transformers_count(
        {"model_type": kind, **more}
    )


def test_layers_by_kind() -> None:
    kinds = of_config(GEMMA3_4B).attention
    assert [i for i, k in enumerate(kinds) if k == "full"] == [5, 11, 17, 23, 29]
    assert of_config(GEMMA2_9B).attention[:3] == ("window", "full", "window")
    assert of_config(GPT_OSS_20B).attention[:2] == ("window", "full")
    assert of_config(QWEN3_NEXT).attention[:4] == ("linear",) * 3 + ("full",)
    assert of_config(LLAMA4_SCOUT).attention[:4] == ("window",) * 3 + ("full",)
    assert set(of_config(DEEPSEEK_V3).attention) == {"latent"}
    assert set(of_config(QWEN25_7B).attention) == {"full"}
    slides = of_config({**QWEN25_7B, "use_sliding_window": True, "max_window_layers": 20})
    assert slides.attention == ("full",) * 20 + ("window",) * 8
    assert of_config(GPT_OSS_20B).blocks[0].mixer.window == 128


def test_what_people_look_at() -> None:
    shape = of_config(DEEPSEEK_V3, name="V3")
    assert (shape.layers, shape.expert_layers, shape.experts, shape.chosen) == (61, 58, 256, 8)
    assert (shape.ffn, shape.heads, shape.head_dim, shape.context) == (18432, 128, 192, 163840)
    assert shape.latent is not None and (shape.latent.kv_rank, shape.latent.q_rank) == (512, 1536)
    assert any("MTP" in note for note in shape.notes)
    shape = of_config(LLAMA_8B)
    assert (shape.kv_heads, shape.head_dim, shape.ffn, shape.gated) == (8, 128, 14336, True)
    assert shape.multiplied == shape.parameters - shape.embedding - shape.small
    assert not of_config(EXACT["GPT-2"][0]).gated


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, 4 + 20 / 64),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        ({"quant_method": "compressed-tensors",
          "config_groups": {"group_0": {"weights": {"num_bits": 8, "group_size": None}}}}, 8),
        ({"quant_method": "of tomorrow"}, 16),
        ({"quant_method": "gptq", "bits": True}, 16),
    ],
)  # fmt: skip
def test_quantized_configs(quantization: dict[str, Any], bits: float) -> None:
    shape = of_config({**LLAMA_8B, "quantization_config": quantization})
    assert shape.stored is not None
    assert shape.stored.matrices == pytest.approx(shape.matrices * bits / 8, rel=1e-9)
    assert shape.stored.head == shape.head * 2
    assert bool(shape.notes) == (bits == 16)


def test_an_unknown_architecture_is_counted_as_llama_and_says_so() -> None:
    shape = of_config({**LLAMA_8B, "model_type": "of_tomorrow"})
    assert shape.parameters == 8_030_261_248
    assert any("not known" in note for note in shape.notes)


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 0}, "hidden_size is 0"),
    ({"hidden_size": -4096}, "hidden_size is -4096"),
    ({"hidden_size": True}, "hidden_size is True"),
    ({"hidden_size": 4096.0}, "hidden_size is 4096.0"),
    ({"hidden_size": math.nan}, "hidden_size is nan"),
    ({"hidden_size": "4096"}, "hidden_size is '4096'"),
    ({"hidden_size": 1 << 70}, "hidden_size is 1180591620717411303424"),
    ({"hidden_size": None}, "no hidden_size"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ({"num_attention_heads": 5000}, "num_attention_heads is 5000"),
    ({"num_attention_heads": [32] * 5}, "num_attention_heads is 'a list of 5'"),
    ({"num_key_value_heads": 5}, "num_key_value_heads is 5"),
    ({"intermediate_size": {}}, "intermediate_size is {}"),
    ({"vocab_size": -1}, "vocab_size is -1"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ({"layer_types": ["full_attention"]}, "layer_types is 'a list of 1'"),
    ({"layer_types": "x" * 5000}, "layer_types is"),
    ({"layer_types": ["linear_attention"] * 32}, "linear attention of an unknown kind"),
    ({"num_experts": 8, "num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
    ({"num_experts": 1 << 40}, "num_experts is"),
    ({"kv_lora_rank": -1}, "kv_lora_rank is -1"),
    ({"is_encoder_decoder": True}, "encoder-decoder"),
    ({"hidden_size": 1 << 24, "vocab_size": 1 << 24, "num_hidden_layers": 4096}, "absurd"),
]


@pytest.mark.parametrize(("change", "match"), HOSTILE)
def test_hostile_configs_cost_one_line(change: dict[str, Any], match: str) -> None:
    with pytest.raises(JoulesmithError) as found:
        of_config({**LLAMA_8B, **change}, where="there/config.json")
    text = str(found.value)
    assert match in text and "there/config.json" in text
    assert "\n" not in text and len(text) < 300


MORE = ("layer_types", "full_attention_interval", "kv_lora_rank", "moe_layer_freq", "moe_layers",
        "quantization_config", "text_config", "hybrid_override_pattern", "mlp_layer_types",
        "attn_layer_period", "sliding_window_pattern", "word_embed_proj_dim", "torch_dtype")  # fmt: skip
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=300)
@given(
    st.sampled_from([LLAMA_8B, MIXTRAL, DEEPSEEK_V3, GPT_OSS_20B, QWEN3_NEXT, GEMMA3_4B, LLAMA4_SCOUT]),
    st.data(),
)  # fmt: skip
def test_any_value_under_any_key_is_counted_or_refused(config: dict[str, Any], data: Any) -> None:
    inner = config.get("text_config", config)
    changed = dict(inner)
    for key in data.draw(
        st.lists(st.sampled_from(sorted({*inner, *MORE})), min_size=1, max_size=3)
    ):
        changed[key] = data.draw(_json)
    outer = {**config, "text_config": changed} if "text_config" in config else changed
    try:
        shape = of_config(outer)
    except JoulesmithError as e:
        assert "\n" not in str(e)
    else:
        assert 0 < shape.active <= shape.parameters
        assert shape.multiplied > 0 and shape.layers > 0


def test_not_even_an_object() -> None:
    for found in ([], "x", None, 7):
        with pytest.raises(JoulesmithError):
            of_config(found)  # type: ignore[arg-type]


@settings(max_examples=200)
@given(
    st.floats(1e5, 1e15),
    st.floats(0.01, 1),
    st.booleans(),
    st.none() | st.integers(1, 200),
    st.none() | st.integers(1, 1000),
)
def test_plain_numbers_come_out_as_given(
    params: float, share: float, mixed: bool, layers: int | None, experts: int | None
) -> None:
    try:
        shape = of_numbers(
            params, active=params * share if mixed else None, layers=layers, experts=experts
        )
    except JoulesmithError as e:
        assert "\n" not in str(e)
        assume(False)
        raise
    assert shape.parameters == int(params)
    assert 0 < shape.active <= shape.parameters
    assert shape.assumed
    if layers:
        assert shape.layers == layers
    # routers of many experts are a large part of a model that is small
    if mixed and not experts and not layers and params > 1e9 and 0.02 < share < 0.9:
        assert shape.active / params == pytest.approx(share, rel=0.25)


def test_params_alone_always_suffice() -> None:
    for power in range(50, 151):
        params = 10 ** (power / 10)
        assert of_numbers(params).parameters == int(params)


def test_plain_numbers_of_a_known_model_give_its_shape() -> None:
    known = of_config(LLAMA_8B)
    plain = of_numbers(
        known.parameters, layers=32, hidden=4096, heads=32, kv_heads=8, vocab=128256, tied=False
    )
    assert (plain.ffn, plain.multiplied) == (14336, known.multiplied)
    assert len(plain.assumed) == 1 and plain.assumed[0].startswith("ffn")
    mixed = of_config(QWEN3_30B)
    plain = of_numbers(
        mixed.parameters, active=mixed.active, layers=48, hidden=2048, heads=32, kv_heads=4,
        head_dim=128, vocab=151936, tied=False, experts=128, experts_per_token=8,
    )  # fmt: skip
    assert plain.ffn == 768
    assert plain.multiplied == pytest.approx(mixed.multiplied, rel=1e-3)
    counted = of_numbers(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256,
                         tied=False)  # fmt: skip
    assert counted.parameters == known.parameters


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"layers": 3},
        {"params": True},
        {"params": -1},
        {"params": math.nan},
        {"params": math.inf},
        {"params": "8e9"},
        {"params": 8e9, "layers": 0},
        {"params": 8e9, "layers": 2.5},
        {"params": 8e9, "layers": True},
        {"params": 8e9, "hidden": 1 << 40},
        {"params": 8e9, "active": 9e9},
        {"params": 8e9, "heads": 32, "kv_heads": 5},
        {"params": 8e9, "hidden": 64, "heads": 128},
        {"params": 8e9, "layers": 4000, "hidden": 16384},
        {"params": 8e9, "experts_per_token": 2},
        {"params": 8e9, "experts": 2, "experts_per_token": 3},
        {"layers": 32, "hidden": 4096, "experts": 8},
    ],
)
def test_absurd_plain_numbers(given: dict[str, Any]) -> None:
    with pytest.raises(JoulesmithError) as found:
        of_numbers(**given)
    assert "\n" not in str(found.value)


# ---------------------------------------------------------------- GGUF headers


def write_gguf(path: Path, arch: str, keys: dict[str, Any], tensors: dict[str, Any]) -> Path:
    gguf = pytest.importorskip("gguf")
    np = pytest.importorskip("numpy")
    w = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        name = f"{arch}.{key}"
        if isinstance(value, list):
            w.add_array(name, value)
        else:
            w.add_uint32(name, value)
    for name, (shape, kind) in tensors.items():
        if kind == "F32":
            w.add_tensor(name, np.zeros(shape, np.float32))
        else:
            q = gguf.GGMLQuantizationType[kind]
            w.add_tensor(name, gguf.quants.quantize(np.zeros(shape, np.float32), q), raw_dtype=q)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


COMMON = {"block_count": 2, "embedding_length": 64, "feed_forward_length": 96,
          "context_length": 512, "attention.head_count": 4}  # fmt: skip
ATTENTION = {"attn_norm.weight": ((64,), "F32"), "attn_q.weight": ((64, 64), "Q8_0"),
             "attn_k.weight": ((32, 64), "Q8_0"), "attn_v.weight": ((32, 64), "Q8_0"),
             "attn_output.weight": ((64, 64), "Q8_0"), "ffn_norm.weight": ((64,), "F32")}  # fmt: skip
EXPERTS = {"ffn_gate_inp.weight": ((8, 64), "F32"), "ffn_gate_exps.weight": ((8, 96, 64), "Q4_0"),
           "ffn_up_exps.weight": ((8, 96, 64), "Q4_0"), "ffn_down_exps.weight": ((8, 64, 96), "Q4_0")}  # fmt: skip
DENSE = {"ffn_gate.weight": ((96, 64), "Q8_0"), "ffn_up.weight": ((96, 64), "Q8_0"),
         "ffn_down.weight": ((64, 96), "Q8_0")}  # fmt: skip
ENDS = {"token_embd.weight": ((100, 64), "Q8_0"), "output_norm.weight": ((64,), "F32"),
        "rope_freqs.weight": ((8,), "F32")}  # fmt: skip


def blocks(*each: dict[str, Any]) -> dict[str, Any]:
    out = dict(ENDS)
    for i, tensors in enumerate(each):
        out.update({f"blk.{i}.{name}": value for name, value in tensors.items()})
    return out


def test_gguf_mixture_counts_every_byte(tmp_path: Path) -> None:
    keys = {**COMMON, "attention.head_count_kv": 2, "expert_count": 8, "expert_used_count": 2,
            "attention.sliding_window": 128}  # fmt: skip
    tensors = blocks({**ATTENTION, **DENSE}, {**ATTENTION, **EXPERTS})
    shape = of_gguf(write_gguf(tmp_path / "m.gguf", "llama", keys, tensors))
    same = of_config({
        "model_type": "mixtral", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
        "num_local_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
        "tie_word_embeddings": True, "sliding_window": None, "max_position_embeddings": 512,
    })  # fmt: skip
    for key in ("parameters", "active", "multiplied", "experts", "chosen", "expert_layers",
                "heads", "kv_heads", "head_dim", "ffn", "vocab", "tied", "context", "attention"):  # fmt: skip
        assert getattr(shape, key) == getattr(same, key), key
    for a, b in zip(shape.blocks, same.blocks, strict=True):
        assert (a.mixer.cache, a.mixer.pair, a.mixer.sides) == (
            b.mixer.cache,
            b.mixer.pair,
            b.mixer.sides,
        )
        assert (a.ffn.sides, a.ffn.expert_sides) == (b.ffn.sides, b.ffn.expert_sides)
    assert shape.stored is not None
    assert shape.stored.experts == 3 * 8 * 96 * 64 * 4.5 / 8
    router = 4 * 8 * 64
    assert shape.stored.matrices == (2 * 3 * 64 * 64 + 3 * 96 * 64) * 8.5 / 8 + router
    assert shape.stored.embedding == 6400 * 8.5 / 8
    assert shape.stored.vectors == 4 * (64 * 5 + 8)  # with the table of frequencies


def test_gguf_windows_and_lists_of_heads(tmp_path: Path) -> None:
    keys = {**COMMON, "attention.head_count_kv": [2, 2], "attention.sliding_window": 128}
    shape = of_gguf(
        write_gguf(
            tmp_path / "g.gguf",
            "gemma2",
            keys,
            blocks({**ATTENTION, **DENSE}, {**ATTENTION, **DENSE}),
        )
    )
    assert [b.mixer.window for b in shape.blocks] == [128, None]


def test_gguf_latent_attention_mtp_and_a_recurrent_layer(tmp_path: Path) -> None:
    latent = {"attn_norm.weight": ((64,), "F32"), "attn_q.weight": ((4 * 24, 64), "Q8_0"),
              "attn_kv_a_mqa.weight": ((40, 64), "Q8_0"), "attn_kv_a_norm.weight": ((32,), "F32"),
              "attn_k_b.weight": ((4, 32, 16), "F32"), "attn_v_b.weight": ((4, 16, 32), "F32"),
              "attn_output.weight": ((64, 64), "Q8_0"), "ffn_norm.weight": ((64,), "F32")}  # fmt: skip
    keys = {**COMMON, "block_count": 3, "nextn_predict_layers": 1, "attention.head_count_kv": 1,
            "attention.kv_lora_rank": 32, "rope.dimension_count": 8, "attention.key_length": 40,
            "attention.key_length_mla": 24, "attention.value_length_mla": 16}  # fmt: skip
    tensors = blocks(*[{**latent, **DENSE}] * 3)
    shape = of_gguf(write_gguf(tmp_path / "d.gguf", "deepseek2", keys, tensors))
    same = of_config({
        "model_type": "deepseek_v3", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100,
        "num_attention_heads": 4, "kv_lora_rank": 32, "q_lora_rank": None, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16, "v_head_dim": 16, "intermediate_size": 96,
        "tie_word_embeddings": True,
    })  # fmt: skip
    assert shape.parameters == same.parameters
    assert [b.mixer.cache for b in shape.blocks] == [40, 40]
    assert shape.blocks[0].mixer.pair_decode == same.blocks[0].mixer.pair_decode
    assert any("MTP" in note for note in shape.notes)

    mamba = {"attn_norm.weight": ((64,), "F32"), "ssm_in.weight": ((256, 64), "Q8_0"),
             "ssm_conv1d.weight": ((128, 4), "F32"), "ssm_a": ((128, 16), "F32"),
             "ssm_dt.bias": ((128,), "F32"), "ssm_out.weight": ((64, 128), "Q8_0")}  # fmt: skip
    keys = {**COMMON, "attention.head_count_kv": [2, 0], "ssm.inner_size": 128,
            "ssm.state_size": 16, "ssm.conv_kernel": 4}  # fmt: skip
    shape = of_gguf(
        write_gguf(tmp_path / "j.gguf", "jamba", keys, blocks({**ATTENTION, **DENSE}, mamba))
    )
    assert shape.attention == ("full", "linear")
    assert shape.blocks[1].mixer.state == 128 * 16 + 128 * 3


@pytest.mark.parametrize(
    ("change", "tensors", "match"),
    [
        ({"block_count": 1 << 31}, {}, "block_count is"),
        ({"embedding_length": 0}, {}, "embedding_length is 0"),
        ({"attention.head_count_kv": [1, 2, 3]}, {}, "head_count_kv is"),
        ({"expert_count": 7, "expert_used_count": 2}, EXPERTS, "do not divide into 7"),
        ({"expert_count": 8, "expert_used_count": 9}, EXPERTS, "expert_used_count is 9"),
        ({"expert_count": 8}, EXPERTS, "no expert_used_count"),
    ],
)
def test_hostile_gguf_keys(
    tmp_path: Path, change: dict[str, Any], tensors: dict[str, Any], match: str
) -> None:
    rest = tensors or DENSE
    path = write_gguf(
        tmp_path / "h.gguf", "llama", {**COMMON, **change}, blocks(*[{**ATTENTION, **rest}] * 2)
    )
    with pytest.raises(JoulesmithError, match=match) as found:
        of_gguf(path)
    assert "\n" not in str(found.value)


# ---------------------------------------------------------------- whatever names a model


def test_the_bundled_model_is_as_its_config_says() -> None:
    try:
        shape = read("smollm2")
    except JoulesmithError as e:
        pytest.skip(str(e))
    same = of_config(SMOLLM2)
    for key in (
        "parameters",
        "multiplied",
        "hidden",
        "heads",
        "kv_heads",
        "head_dim",
        "ffn",
        "tied",
    ):
        assert getattr(shape, key) == getattr(same, key), key
    assert shape.name == "SmolLM2-135M-Instruct"
    assert shape.bits_per_weight == pytest.approx(5.74, abs=0.01)  # Q4_1, embedding Q8_0


def test_folders_and_configs(tmp_path: Path) -> None:
    folder = tmp_path / "Some-Model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    assert read(folder).parameters == read(folder / "config.json").parameters == 8_030_261_248
    assert read(folder).name == read(folder / "config.json").name == "Some-Model"
    (tmp_path / "other.json").write_text(json.dumps(SMOLLM2))
    assert read(str(tmp_path / "other.json")).name == "other"


def test_a_folders_bytes_are_those_of_its_tensors(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tiny import write_tiny

    folder = write_tiny(tmp_path / "tiny", steps=0)
    shape = read(folder)
    assert shape.stored is not None
    assert shape.parameters == transformers_count(json.loads((folder / "config.json").read_text()))
    assert shape.stored.total == shape.parameters * 4  # float32
    assert shape.stored.vectors == shape.small * 4
    assert shape.stored.matrices == shape.matrices * 4


def test_a_hub_id_comes_from_the_local_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    home = tmp_path / "models--some--model"
    (home / "snapshots" / "abc").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    (home / "snapshots" / "abc" / "config.json").write_text(json.dumps(LLAMA_8B))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    found = read("some/model")
    assert (found.name, found.parameters) == ("model", 8_030_261_248)


def test_a_hub_id_offline_is_one_line_at_once(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    code = "from joulesmith.estimate.model.source import read\ntry: read('no/such')\nexcept Exception as e: print(e)"
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert time.monotonic() - start < 20  # trying again takes longer on its own
    assert done.stdout.count("\n") == 1 and "not in the local cache" in done.stdout


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "damaged"),
        ("[1]", "no JSON object"),
        ('{"a":' * 3000 + "1" + "}" * 3000, "damaged|absurdly"),
        ("[" * 100_000, "absurdly"),
        ('{"hidden_size": NaN}', "damaged"),
        ('{"a": 1, "a": 2}', "damaged"),
        (" " * (1 << 23), "absurdly"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "damaged|hidden_size"),
    ],
)  # fmt: skip
def test_hostile_files(tmp_path: Path, content: str, match: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(JoulesmithError, match=match) as found:
        read(tmp_path)
    assert "\n" not in str(found.value) and len(str(found.value)) < 400


def test_what_is_not_there(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "notes.txt").write_text("hello")
    for source in ("", " ", "nowhere", "a/b/c", "../x", "org/none.gguf", tmp_path / "no.json",
                   tmp_path, tmp_path / "notes.txt", tmp_path / "pipe.gguf"):  # fmt: skip
        with pytest.raises(JoulesmithError) as found:
            read(source)
        assert "\n" not in str(found.value)


def test_describing_a_model_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    code = (
        "import sys\n"
        "from joulesmith.estimate.model import peak, source, work\n"
        "shape = source.read(sys.argv[1])\n"
        "work.step_bytes(shape, 8), peak.serving_memory(shape, batch=8, context=1024)\n"
        "print(sorted({'torch', 'transformers', 'huggingface_hub', 'gguf'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
