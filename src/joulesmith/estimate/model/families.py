"""What a config.json leaves to the architecture: biases, norms, tied heads, defaults.

Facts of each architecture's published code; a family that is not here is read as Llama's,
and said to be. Knows no counting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Family:
    """How an architecture differs from Llama's.

    norms: norms of a block; norm: vectors of each (RMSNorm 1, LayerNorm 2).
    qkv_bias, out_bias, mlp_bias: True, False, or the config's key. qk_norm: of queries and
    keys, "head" (one vector for all heads), "whole" (as wide as the projection) or "";
    qk_norm_key: the config's key that switches it. slide: a layer pattern, every
    ``slide``-th layer reaches everything, the others a window; 1 where all have a window,
    0 where the key means nothing. positions: rows of learned positions beyond the context,
    None without. defaults: values that a config.json may leave out.
    """

    gated: bool = True
    tied: bool = False
    norms: int = 2
    norm: int = 1
    final_norm: bool = True
    embedding_norm: bool = False
    qkv_bias: bool | str = "attention_bias"
    out_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = "mlp_bias"
    head_bias: bool = False
    expert_bias: bool = False
    router_bias: bool = False
    qk_norm: str = ""
    qk_norm_key: str = ""
    slide: int = 0
    positions: int | None = None
    attention_gate: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


LLAMA = Family()
_NO_BIAS = Family(qkv_bias=False, out_bias=False, mlp_bias=False)
_QWEN2 = Family(qkv_bias=True, out_bias=False, mlp_bias=False)
_QWEN3 = replace(LLAMA, mlp_bias=False, qk_norm="head")
_QWEN_NEXT = replace(
    _QWEN3,
    attention_gate=True,
    defaults={
        "head_dim": 256,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 10,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "full_attention_interval": 4,
    },
)
_GEMMA = replace(
    LLAMA,
    tied=True,
    mlp_bias=False,
    defaults={"head_dim": 256, "vocab_size": 256000, "max_position_embeddings": 8192},
)
_GEMMA3 = replace(
    _GEMMA,
    norms=4,
    qk_norm="head",
    slide=6,
    defaults={
        "head_dim": 256,
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
)
_OLD = Family(
    gated=False, tied=True, norm=2, qkv_bias=True, out_bias=True, mlp_bias=True, positions=0
)  # GPT-2 and its kin
_PARALLEL = replace(_OLD, tied=False, norms=1, positions=None, head_bias=True)
_DEEPSEEK = replace(LLAMA, qkv_bias=False, out_bias=False, mlp_bias=False)
_HYBRID = replace(LLAMA, mlp_bias=False)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": replace(_NO_BIAS, slide=1),
    "ministral": replace(_NO_BIAS, slide=1),
    "ministral3": replace(_NO_BIAS, slide=1),
    "mixtral": replace(_NO_BIAS, slide=1),
    "phimoe": replace(
        LLAMA, norm=2, slide=1, mlp_bias=False, head_bias=False, defaults={"num_local_experts": 16}
    ),
    "qwen2": _QWEN2,
    "qwen2_moe": replace(_QWEN2, qkv_bias="qkv_bias", defaults={"qkv_bias": True}),
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3,
    "qwen3_next": _QWEN_NEXT,
    "qwen3_5": _QWEN_NEXT,
    "qwen3_5_moe": _QWEN_NEXT,
    "gemma": _GEMMA,
    "gemma2": replace(
        _GEMMA, norms=4, slide=2, defaults={**_GEMMA.defaults, "sliding_window": 4096}
    ),
    "gemma3": _GEMMA3,
    "phi3": replace(_NO_BIAS, slide=1),
    "phi": replace(_PARALLEL, gated=False),
    "gpt2": _OLD,
    "gpt_bigcode": _OLD,
    "gpt_neo": replace(_OLD, qkv_bias=False, defaults={"window_size": 256}),
    "gptj": replace(_PARALLEL, qkv_bias=False, out_bias=False),
    "codegen": replace(_PARALLEL, qkv_bias=False, out_bias=False),
    "gpt_neox": replace(
        _OLD,
        tied=False,
        positions=None,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        defaults={"attention_bias": True},
    ),
    "opt": replace(
        _OLD,
        positions=2,
        qkv_bias="enable_bias",
        out_bias="enable_bias",
        mlp_bias="enable_bias",
        defaults={"enable_bias": True},
    ),
    "bloom": replace(_OLD, positions=None, embedding_norm=True),
    "mpt": replace(_OLD, positions=None, norm=1, qkv_bias=False, out_bias=False, mlp_bias=False),
    "falcon": replace(_OLD, positions=None, qkv_bias="bias", out_bias="bias", mlp_bias="bias"),
    "starcoder2": replace(
        _OLD,
        positions=None,
        slide=1,
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        defaults={"use_bias": True},
    ),
    "stablelm": replace(_NO_BIAS, norm=2, qkv_bias="use_qkv_bias"),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "gpt_oss": replace(
        LLAMA,
        slide=2,
        expert_bias=True,
        router_bias=True,
        defaults={"attention_bias": True, "head_dim": 64, "sliding_window": 128},
    ),
    "llama4": replace(
        LLAMA,
        mlp_bias=False,
        defaults={
            "hidden_size": 5120,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16384,
            "num_hidden_layers": 48,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 202048,
            "num_local_experts": 16,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
            "no_rope_layer_interval": 4,
            "attention_chunk_size": 8192,
        },
    ),
    "glm": replace(LLAMA, out_bias=False, mlp_bias=False),
    "glm4": replace(LLAMA, norms=4, out_bias=False, mlp_bias=False),
    "glm4_moe": replace(
        LLAMA, out_bias=False, mlp_bias=False, qk_norm="head", qk_norm_key="use_qk_norm"
    ),
    "olmo": replace(LLAMA, norm=0, mlp_bias=False),
    "olmo2": replace(LLAMA, mlp_bias=False, qk_norm="whole"),
    "olmo3": replace(LLAMA, mlp_bias=False, qk_norm="whole", slide=4),
    "olmoe": replace(LLAMA, mlp_bias=False, qk_norm="whole"),
    "granite": LLAMA,
    "granitemoe": replace(LLAMA, mlp_bias=False),
    "granitemoeshared": replace(LLAMA, mlp_bias=False),
    "granitemoehybrid": _HYBRID,
    "bamba": _HYBRID,
    "cohere": replace(
        LLAMA,
        tied=True,
        norms=1,
        mlp_bias=False,
        qk_norm="heads",
        qk_norm_key="use_qk_norm",
    ),
    "cohere2": replace(LLAMA, tied=True, norms=1, mlp_bias=False, slide=4),
    "smollm3": LLAMA,
    "bitnet": replace(LLAMA, mlp_bias=False, tied=True),
    "lfm2": replace(_NO_BIAS, tied=True, qk_norm="head"),
    "minimax_m2": replace(_NO_BIAS, qk_norm="whole"),
    "seed_oss": replace(LLAMA, out_bias="attention_out_bias"),
    "exaone4": replace(_NO_BIAS, qk_norm="head", slide=4),
    "ernie4_5": replace(LLAMA, tied=True, qkv_bias="use_bias", out_bias="use_bias"),
    "nemotron": replace(LLAMA, gated=False, norm=2),
    "mamba": replace(LLAMA, tied=True, norms=1),
    "falcon_mamba": replace(LLAMA, tied=True, norms=1),
    "mamba2": replace(LLAMA, norms=1),
    "nemotron_h": replace(LLAMA, norms=1, gated=False),
}
ALIASES = {
    "kimi_k2": "deepseek_v3",
    "gemma3_text": "gemma3",
    "llama4_text": "llama4",
    "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    "glm4v_moe_text": "glm4_moe",
}
FAMILIES.update({alias: FAMILIES[name] for alias, name in ALIASES.items()})
