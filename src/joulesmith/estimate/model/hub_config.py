"""A shape from a Hugging Face config.json, without transformers.

Architectures that `families` knows are counted exactly; another whose keys are Llama's is
counted as Llama's and says so in a note. Knows no files: `source` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from joulesmith.errors import JoulesmithError
from joulesmith.estimate.model.families import FAMILIES, LLAMA, Family
from joulesmith.estimate.model.hub_blocks import (
    HEADS,
    HIDDEN,
    PLAIN_MAMBA,
    blocks_of,
    head_dim_of,
    kv_heads_of,
)
from joulesmith.estimate.model.keys import MOST, Keys
from joulesmith.estimate.model.shape import Shape, Stored, stored_at

_INNER = ("text_config", "llm_config", "language_config", "thinker_config")
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_OTHER = ("vision_config", "audio_config", "vision_tower", "speech_config")
_GATED = ("silu", "swish", "swiglu", "gelu_pytorch_tanh")


def of_config(
    config: Mapping[str, Any], *, name: str = "model", where: str = "config.json"
) -> Shape:
    """Count the model that a config.json describes.

    name: of the model. where: said in errors. Raises `JoulesmithError`, one line, for
    encoder-decoders, missing keys and impossible values.
    """
    if not isinstance(config, Mapping):
        raise JoulesmithError(f"a config is no JSON object: {where}: give a config.json")
    inner, notes = _language_model(config)
    told = inner.get("model_type") or config.get("model_type")
    kind = told[:40] if isinstance(told, str) and told.isprintable() else "unknown"
    if inner.get("is_encoder_decoder") is True:
        raise JoulesmithError(
            f"{kind} is an encoder-decoder: {where}: only decoder-only models are counted; "
            "give plain numbers"
        )
    family = FAMILIES.get(kind)
    if family is None:
        family = _guess(inner)
        notes.append(
            f"architecture {kind!r} is not known: counted as Llama's, which may be far off"
        )
    keys = Keys(inner, where, family.defaults)
    blocks, latent, more = blocks_of(keys, kind, family)
    notes += more
    if keys.maybe("num_nextn_predict_layers", "num_mtp_layers", least=0):
        notes.append("layers that only predict further tokens (MTP) are not counted")
    hidden, vocab = keys.count(*HIDDEN), keys.count("vocab_size", "padded_vocab_size")
    outer = config.get("tie_word_embeddings")
    tied = keys.flag("tie_word_embeddings", outer if isinstance(outer, bool) else family.tied)
    width = keys.count("word_embed_proj_dim", default=hidden)
    context = keys.maybe(*_CONTEXT, most=1 << 40)
    positions = 0
    if family.positions is not None:
        positions = (keys.count(*_CONTEXT, most=MOST) + family.positions) * hidden
    final = family.norm * hidden if family.final_norm and _final(keys, kind) else 0
    attends = kind not in PLAIN_MAMBA
    heads = max(keys.each(HEADS, len(blocks))) if attends else 0
    size = kv_heads = 0
    if attends:
        size = latent.nope + latent.rope if latent else head_dim_of(keys)
        kv_heads = heads if latent else max(kv_heads_of(keys, kind, len(blocks)))
    shape = Shape(
        name=name,
        kind=kind,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        ffn=max(b.ffn.width if not b.ffn.experts else 0 for b in blocks)
        or max(b.ffn.expert_width for b in blocks),
        vocab=vocab,
        tied=tied,
        context=context,
        blocks=blocks,
        embedding=vocab * width + positions,
        head=vocab * width,
        outside=2 * hidden * width if width != hidden else 0,
        vectors=final
        + (2 * hidden if family.embedding_norm else 0)
        + (vocab if family.head_bias else 0),
        latent=latent,
        notes=tuple(notes),
    )
    if shape.parameters > 1e15:
        raise JoulesmithError(
            f"{shape.parameters:.3g} weights are absurd: {where}: check its sizes"
        )
    return replace(shape, **_as_given(shape, config, inner))


def _language_model(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """The part of a config that describes the language model, and notes."""
    inner, notes = config, []
    for _ in range(2):  # thinker_config holds a text_config of its own
        for key in _INNER:
            found = inner.get(key)
            if isinstance(found, Mapping) and found:
                if any(isinstance(inner.get(k), Mapping) for k in _OTHER):
                    notes = ["only the language model is counted, not what sees or hears"]
                inner = found
                break
    return inner, notes


def _guess(config: Mapping[str, Any]) -> Family:
    """An unknown architecture: Llama's, its MLP gated unless the activation says no; biases,
    norms of heads and windows as far as the config tells."""
    act = config.get("hidden_act") or config.get("hidden_activation")
    gated = act is None or act in _GATED
    slides = isinstance(config.get("sliding_window"), int) and not config.get("layer_types")
    qk_norm = "head" if config.get("use_qk_norm") is True else ""
    return replace(LLAMA, gated=gated, slide=int(slides), qk_norm=qk_norm)


def _final(keys: Keys, kind: str) -> bool:
    """Whether a norm follows the last block (OPT-350m has none)."""
    return kind != "opt" or (
        keys.flag("do_layer_norm_before", True) and not keys.flag("_remove_final_layer_norm")
    )


def _as_given(shape: Shape, config: Mapping[str, Any], inner: Mapping[str, Any]) -> dict[str, Any]:
    """The bytes that the config's precision and quantization mean, and notes."""
    word = inner.get("dtype") or inner.get("torch_dtype") or config.get("dtype")
    word = word or config.get("torch_dtype")
    rest = {"float32": 32.0, "float16": 16.0, "bfloat16": 16.0, "float64": 64.0}.get(str(word), 16)
    told = config.get("quantization_config") or inner.get("quantization_config")
    if not isinstance(told, Mapping):
        return {"stored": stored_at(shape, rest=rest)}
    bits = _quantized(told)
    if bits is None:
        method = str(told.get("quant_method"))[:40]
        note = f"quantization {method!r} is not known: weights counted at {rest:g} bits"
        return {"stored": stored_at(shape, rest=rest), "notes": (*shape.notes, note)}
    stored: Stored = stored_at(shape, rest=rest, blocks=bits)
    if told.get("quant_method") == "mxfp4":  # gpt-oss: the experts alone
        stored = stored_at(shape, rest=rest, experts=bits)
    return {"stored": stored, "products": _products(told)}


def _products(told: Mapping[str, Any]) -> str | None:
    """What products run in where activations are of 8 bits as well; None where they are not."""
    if told.get("quant_method") in ("fp8", "fbgemm_fp8"):
        return "fp8"
    groups = told.get("config_groups")
    first: Any = next(iter(groups.values()), {}) if isinstance(groups, Mapping) else {}
    inputs = first.get("input_activations") if isinstance(first, Mapping) else None
    if not isinstance(inputs, Mapping) or inputs.get("num_bits") != 8:
        return None
    return {"float": "fp8", "int": "int8"}.get(str(inputs.get("type")))


def _quantized(told: Mapping[str, Any]) -> float | None:
    """Bits per weight of quantized matrices, scales and zero points included."""
    method = told.get("quant_method")
    if method == "fp8" or method == "fbgemm_fp8":
        return 8.0
    if method == "mxfp4":
        return 4.25  # 32 weights of 4 bits and a scale of 8
    if method == "bitsandbytes":
        return 4.5 if told.get("load_in_4bit") is True else 8.0
    weights: Any = told
    if method == "compressed-tensors":
        groups = told.get("config_groups")
        first: Any = next(iter(groups.values()), {}) if isinstance(groups, Mapping) else {}
        weights = first.get("weights") if isinstance(first, Mapping) else None
    if not isinstance(weights, Mapping):
        return None
    bits = weights.get("bits", weights.get("w_bit", weights.get("num_bits")))
    group = weights.get("group_size", weights.get("q_group_size", -1))
    if type(bits) is not int or not 1 <= bits <= 16:
        return None
    if type(group) is not int or not 0 < group <= MOST:
        return float(bits)
    zeros = 0 if method == "compressed-tensors" else bits
    return bits + (16 + zeros) / group
