"""What a decoder is called on both sides: a transformers config and GGUF hyperparameters,
torch parameter names and GGUF tensor names, torch row order and GGUF row order.

Supported: Llama and Mistral (GGUF "llama"), Qwen2, Qwen3. Names come from
`gguf.get_tensor_name_map`; keys from the GGUF specification
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Knows no weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from joulesmith.errors import JoulesmithError, MissingExtraError
from joulesmith.gguf_file import GgufFile, MetaValue, ValueType

# transformers' model_type -> GGUF's general.architecture
GGUF_NAME = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
SUPPORTED = "llama, mistral, qwen2, qwen3"
MAX_LAYERS = 4096


@dataclass(frozen=True)
class TensorRef:
    """One tensor under its GGUF name and where it lives in torch.

    parameter: dotted torch name. role: "attn_q", "ffn_down", "token_embd", "output"
    and so on for matrices, "norm" and "bias" for vectors. layer: block number or None.
    shape: as numpy and torch have it. rows: torch row of each GGUF row, or None where
    the order is the same (``gguf = torch[rows]``).
    """

    name: str
    parameter: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    rows: NDArray[np.int64] | None = None

    @property
    def is_matrix(self) -> bool:
        """Whether it may be quantized."""
        return len(self.shape) == 2


def unsupported(what: str, where: object) -> JoulesmithError:
    return JoulesmithError(f"unsupported architecture {what!r}: {where}: supported are {SUPPORTED}")


def check_config(config: Any, where: object) -> None:
    """Raise `JoulesmithError` for settings that GGUF or the engine would silently lose."""
    if config.model_type not in GGUF_NAME:
        raise unsupported(str(config.model_type), where)
    if getattr(config, "quantization_config", None):
        raise JoulesmithError(
            f"weights are already quantized ({_method(config)}): {where}: "
            "give the unquantized model, or a .gguf file"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise JoulesmithError(f"unsupported activation {config.hidden_act!r}: {where}: only silu")
    if getattr(config, "use_sliding_window", False):
        raise JoulesmithError(f"sliding-window attention is not supported: {where}")
    rope = rope_settings(config)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise JoulesmithError(f"partial rotary embeddings are not supported: {where}")
    if rope["rope_type"] not in ("default", "linear", "llama3", "yarn"):
        raise JoulesmithError(
            f"unsupported rope scaling {rope['rope_type']!r}: {where}: "
            "supported are none, linear, llama3, yarn"
        )
    for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"):
        if not isinstance(getattr(config, key), int) or getattr(config, key) <= 0:
            raise JoulesmithError(f"{key} is not a positive whole number: {where}")
    if config.num_hidden_layers > MAX_LAYERS:
        raise JoulesmithError(f"{config.num_hidden_layers} layers are absurd: {where}")
    if config.num_attention_heads % config.num_key_value_heads or head_dim(config) % 2:
        raise JoulesmithError(f"head counts or head size do not fit together: {where}")


def head_dim(config: Any) -> int:
    """Elements per attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def rope_settings(config: Any) -> dict[str, Any]:
    """The rotary settings as one dict with ``rope_type`` and ``rope_theta``, from a
    config of transformers 4 (``rope_theta``, ``rope_scaling``) or 5 (``rope_parameters``)."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    rope = dict(given)
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", getattr(config, "rope_theta", None) or 10000.0)
    return rope


def rope_factors(config: Any) -> NDArray[np.float32] | None:
    """Llama 3's divisor of each rotary frequency, shape (head_dim / 2,); None for others.

    Source: Llama 3.1's ``apply_scaling`` (github.com/meta-llama/llama-models,
    models/llama3/model.py), which GGUF stores as the tensor ``rope_freqs.weight``.
    """
    rope = rope_settings(config)
    if rope["rope_type"] != "llama3":
        return None
    return llama3_factors(
        head_dim(config),
        float(rope["rope_theta"]),
        float(rope["factor"]),
        float(rope["low_freq_factor"]),
        float(rope["high_freq_factor"]),
        float(rope["original_max_position_embeddings"]),
    )


def llama3_factors(
    dim: int, theta: float, factor: float, low: float, high: float, context: float
) -> NDArray[np.float32]:
    """As `rope_factors`, from plain numbers."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    smooth = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def hyperparameters(config: Any, name: str) -> dict[str, MetaValue]:
    """GGUF's general and architecture keys for a transformers config."""
    arch = GGUF_NAME[config.model_type]
    rope = rope_settings(config)
    u32, f32 = MetaValue.u32, MetaValue.f32
    out = {
        "general.architecture": MetaValue.string(arch),
        "general.type": MetaValue.string("model"),
        "general.name": MetaValue.string(name),
        f"{arch}.block_count": u32(config.num_hidden_layers),
        f"{arch}.context_length": u32(config.max_position_embeddings),
        f"{arch}.embedding_length": u32(config.hidden_size),
        f"{arch}.feed_forward_length": u32(config.intermediate_size),
        f"{arch}.attention.head_count": u32(config.num_attention_heads),
        f"{arch}.attention.head_count_kv": u32(config.num_key_value_heads),
        f"{arch}.attention.key_length": u32(head_dim(config)),
        f"{arch}.attention.value_length": u32(head_dim(config)),
        f"{arch}.attention.layer_norm_rms_epsilon": f32(config.rms_norm_eps),
        f"{arch}.rope.freq_base": f32(float(rope["rope_theta"])),
        f"{arch}.rope.dimension_count": u32(head_dim(config)),
        f"{arch}.vocab_size": u32(config.vocab_size),
    }
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        out[f"{arch}.rope.scaling.type"] = MetaValue.string(kind)
        out[f"{arch}.rope.scaling.factor"] = f32(float(rope["factor"]))
    if kind == "yarn":
        context = rope.get("original_max_position_embeddings", config.max_position_embeddings)
        out[f"{arch}.rope.scaling.original_context_length"] = u32(context)
        for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if rope.get(ours) is not None:
                out[f"{arch}.rope.scaling.{theirs}"] = f32(float(rope[ours]))
        if rope.get("attention_factor") is not None or rope.get("mscale") is not None:
            raise JoulesmithError("yarn with its own attention factor is not supported")
    return out


def config_from_gguf(file: GgufFile) -> Any:
    """A transformers config for a GGUF file's hyperparameters.

    Raises `JoulesmithError` for an unsupported architecture, keys that are absent or
    not what they should be, and features that transformers' class would lose.
    """
    transformers = _transformers()
    arch = file.value("general.architecture")
    if not isinstance(arch, str) or arch not in set(GGUF_NAME.values()):
        raise unsupported(str(arch)[:40], file.path)

    def number(key: str, default: float | None = None) -> Any:
        found = file.value(f"{arch}.{key}", default)
        if isinstance(found, list) and found and len(set(found)) == 1:
            found = found[0]  # per-layer values that are all the same
        if isinstance(found, bool) or not isinstance(found, int | float):
            what = "is missing" if found is None else f"is {str(found)[:40]}"
            raise JoulesmithError(f"GGUF key {arch}.{key} {what}: {file.path}: convert it again")
        return found

    if number("expert_count", 0):
        raise unsupported(f"{arch} with experts", file.path)
    hidden, heads = number("embedding_length"), number("attention.head_count")
    if not heads or not hidden:
        raise JoulesmithError(f"GGUF gives no heads or no width: {file.path}: convert it again")
    width = int(
        number("attention.key_length", number("rope.dimension_count", 0) or hidden // heads)
    )
    rope_width = number("rope.dimension_count", width)
    if rope_width != width or number("attention.value_length", width) != width:
        raise JoulesmithError(f"partial rotary embeddings are not supported: {file.path}")
    names = file.by_name
    if "token_embd.weight" not in names or len(names["token_embd.weight"].shape) != 2:
        raise JoulesmithError(f"no token_embd.weight matrix: {file.path}: convert it again")
    settings: dict[str, Any] = {
        "vocab_size": names["token_embd.weight"].shape[0],
        "hidden_size": int(hidden),
        "intermediate_size": int(number("feed_forward_length")),
        "num_hidden_layers": int(number("block_count")),
        "num_attention_heads": int(heads),
        "num_key_value_heads": int(number("attention.head_count_kv", heads)),
        "head_dim": width,
        "max_position_embeddings": int(number("context_length")),
        "rms_norm_eps": _as_written(number("attention.layer_norm_rms_epsilon")),
        "rope_theta": _as_written(number("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in names,
        "rope_scaling": _rope_scaling(file, arch, number),
    }
    if settings["num_hidden_layers"] * 9 > len(file.tensors):
        raise JoulesmithError(
            f"{settings['num_hidden_layers']} layers but {len(file.tensors)} tensors: "
            f"{file.path}: download or convert the model again"
        )
    for ours in ("bos", "eos", "pad"):
        key = "padding" if ours == "pad" else ours
        settings[f"{ours}_token_id"] = file.value(f"tokenizer.ggml.{key}_token_id")
    if arch == "llama":
        settings["attention_bias"] = "blk.0.attn_q.bias" in names
        settings["mlp_bias"] = "blk.0.ffn_up.bias" in names
    make = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}[arch]
    try:
        config = getattr(transformers, make)(**settings)
    except Exception as e:  # transformers validates with its own exception types
        raise JoulesmithError(f"impossible hyperparameters: {file.path}: {_first_line(e)}") from e
    check_config(config, file.path)
    return config


def tensor_refs(shapes: Mapping[str, tuple[int, ...]], config: Any) -> dict[str, TensorRef]:
    """GGUF tensor name -> `TensorRef`, in the parameters' order.

    shapes: torch parameter name -> shape, a tied head given once (as the embedding).
    """
    try:
        import gguf
    except ImportError as e:
        raise MissingExtraError("gguf") from e
    arch = GGUF_NAME[config.model_type]
    known = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(known, config.num_hidden_layers)
    out: dict[str, TensorRef] = {}
    for parameter, shape in shapes.items():
        base, _, suffix = parameter.rpartition(".")
        found = names.get_name(base)
        if found is None:
            raise JoulesmithError(f"parameter {parameter} has no GGUF name in architecture {arch}")
        block = re.match(r"blk\.(\d+)\.", found)
        role = found.rpartition(".")[2]
        if len(shape) == 1:
            role = "bias" if suffix == "bias" else "norm"
        rows = None
        if arch == "llama" and found.endswith((".attn_q", ".attn_k")):
            q = found.endswith("q")
            heads = config.num_attention_heads if q else config.num_key_value_heads
            rows = rope_rows(shape[0], heads)
        name = f"{found}.{suffix}"
        out[name] = TensorRef(
            name, parameter, role, int(block[1]) if block else None, tuple(shape), rows
        )
    return out


def rope_rows(n: int, heads: int) -> NDArray[np.int64]:
    """Torch row of each GGUF row of a Llama query or key matrix with ``n`` rows.

    transformers rotates the two halves of a head, ggml's "llama" its neighbouring
    pairs: within a head, GGUF takes row i of the first half, then of the second.
    """
    rows = np.arange(n, dtype=np.int64).reshape(heads, 2, n // heads // 2)
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(n))


def _rope_scaling(file: GgufFile, arch: str, number: Any) -> dict[str, Any] | None:
    kind = file.value(f"{arch}.rope.scaling.type", "none")
    theta, freqs = number("rope.freq_base", 10000.0), file.by_name.get("rope_freqs.weight")
    if freqs is not None:
        return _llama3_settings(file, file.dequantize(freqs), theta)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise JoulesmithError(f"unsupported rope scaling {str(kind)[:40]!r}: {file.path}")
    out: dict[str, Any] = {"rope_type": kind, "factor": float(number("rope.scaling.factor"))}
    if kind == "yarn":
        extra = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0}
        extra["yarn_log_multiplier"] = 0.0
        if any(number(f"rope.scaling.{k}", v) != v for k, v in extra.items()):
            raise JoulesmithError(
                f"yarn with its own attention factor is not supported: {file.path}"
            )
        key = "original_max_position_embeddings"
        out[key] = int(number("rope.scaling.original_context_length"))
        out["beta_fast"] = float(number("rope.scaling.yarn_beta_fast", 32.0))
        out["beta_slow"] = float(number("rope.scaling.yarn_beta_slow", 1.0))
    return out


def _llama3_settings(file: GgufFile, stored: NDArray[np.float32], theta: float) -> dict[str, Any]:
    """The settings whose factors are the stored ones. GGUF keeps only the factors;
    every Llama 3.x release uses low 1, high 4 and an original context of 8192."""
    factor = float(stored.max(initial=0.0))
    if factor > 0 and stored.ndim == 1:
        made = llama3_factors(2 * stored.size, float(theta), factor, 1.0, 4.0, 8192)
        if np.allclose(made, stored, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
    raise JoulesmithError(
        f"rope_freqs.weight is not Llama 3's scaling: {file.path}: give the original folder"
    )


def float_array(values: list[float]) -> MetaValue:
    """A FLOAT32 array value."""
    return MetaValue.array(values, ValueType.FLOAT32)


def _as_written(x: float) -> float:
    """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(x)))


def _method(config: Any) -> str:
    given = config.quantization_config
    found = given.get("quant_method") if isinstance(given, dict) else type(given).__name__
    return str(found)[:40]


def _first_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as e:
        raise MissingExtraError("transformers") from e
    return transformers
