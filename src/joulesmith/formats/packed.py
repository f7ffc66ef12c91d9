"""Stored tensors -> the model's own: codes, scales and zeros of one matrix counted as one.

Knows the layouts of compressed-tensors, GPTQ, AWQ, bitsandbytes, block-scaled FP8 and
MXFP4, by the names that they give their tensors. Reads nothing but a packed matrix's
stored shape (16 bytes).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from joulesmith.errors import JoulesmithError
from joulesmith.formats.files import AGAIN, StoredTensor, quoted

# codes, and what may lie beside them under the same name
_CODES = {
    "weight_packed": ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
                      "weight_global_scale"),
    "qweight": ("qzeros", "scales", "g_idx"),
    "weight": ("weight_scale", "weight_scale_inv", "weight_zero_point", "weight_g_idx", "SCB"),
}  # fmt: skip
_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale")
_FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class Logical:
    """A parameter of the model. shape: its own, not that of packed words. type: how it is
    stored. weights: how many, 0 for a table that is no parameter. nbytes: codes, scales,
    zeros and all."""

    name: str
    shape: tuple[int, ...]
    type: str
    weights: int
    nbytes: int


def logical(
    tensors: Iterable[StoredTensor], quantization: Mapping[str, Any] | None = None
) -> list[Logical]:
    """The parameters that ``tensors`` (names as in safetensors) make up.

    quantization: ``quantization_config`` of config.json. Raises `JoulesmithError` where
    packed codes and their shape do not belong together.
    """
    by_name = {t.name: t for t in tensors}
    settings = quantization if isinstance(quantization, Mapping) else {}
    taken: set[str] = set()
    found: list[Logical] = []
    for name, t in by_name.items():
        base, _, leaf = name.rpartition(".")
        part = _matrix(base, leaf, t, by_name, settings)
        if part is None and name.endswith("_blocks") and t.type == "U8":
            part = _microscaled(t, by_name)
        if part is not None:
            whole, used = part
            found.append(whole)
            taken.update(used)
    plain = (t for n, t in by_name.items() if n not in taken)
    found += [Logical(t.name, t.shape, t.type, t.elements, t.nbytes) for t in plain]
    return sorted(found, key=lambda p: p.name)


def _matrix(
    base: str,
    leaf: str,
    t: StoredTensor,
    by_name: Mapping[str, StoredTensor],
    settings: Mapping[str, Any],
) -> tuple[Logical, list[str]] | None:
    dot = f"{base}." if base else ""
    beside = {k: by_name[dot + k] for k in _CODES.get(leaf, ()) if dot + k in by_name}
    if leaf == "weight_packed":
        whole = _compressed(t, beside, settings)
    elif leaf == "qweight":
        whole = _gptq(t, beside, settings)
    elif leaf == "weight" and beside and t.type not in _FLOATS:
        whole = _scaled(t, beside)
    elif leaf == "weight" and t.type == "U8":
        beside = {k: v for k, v in by_name.items() if k.startswith(f"{t.name}.")}
        if not beside:
            return None
        whole = _bitsandbytes(t, beside)
    else:
        return None
    shape, kind = whole
    extra = [by_name[dot + k] for k in _ACTIVATIONS if dot + k in by_name]
    parts = [t, *beside.values(), *extra]
    weights = 1
    for d in shape:
        weights *= d
    stored = sum(p.nbytes for p in parts)
    return Logical(f"{dot}weight", shape, kind, weights, stored), [p.name for p in parts]


def _compressed(
    t: StoredTensor, beside: Mapping[str, StoredTensor], settings: Mapping[str, Any]
) -> tuple[tuple[int, ...], str]:
    """compressed-tensors: words of int32 (pack-quantized) or two FP4 in a byte."""
    scale = beside.get("weight_scale")
    if t.type == "U8":
        shape = (*t.shape[:-1], 2 * t.shape[-1]) if t.shape else ()
        return shape, _grouped("FP4", shape, scale)
    stored = beside.get("weight_shape")
    widths = sorted(_widths(settings)) or [4, 8, 2, 3, 5, 6, 7]
    if t.type != "I32" or len(t.shape) != 2:
        raise _bad(t, "packed codes are no matrix of int32")
    shape = (t.shape[0], 32 // widths[0] * t.shape[1]) if stored is None else _two(stored)
    if shape[0] == t.shape[0]:
        for bits in widths:
            if -(-shape[1] // (32 // bits)) == t.shape[1] or (
                -(-shape[1] * bits // 32) == t.shape[1]
            ):
                zero = "-ZP" if "weight_zero_point" in beside else ""
                return shape, _grouped(f"INT{bits}", shape, scale) + zero
    raise _bad(t, f"packed {t.shape} cannot hold {shape}")


def _gptq(
    t: StoredTensor, beside: Mapping[str, StoredTensor], settings: Mapping[str, Any]
) -> tuple[tuple[int, ...], str]:
    """GPTQ packs int32 along the inputs (rows), AWQ along the outputs (columns)."""
    bits = settings.get("bits", settings.get("w_bit", 4))
    if type(bits) is not int or not 2 <= bits <= 8 or len(t.shape) != 2 or t.type != "I32":
        raise _bad(t, f"packed codes of {quoted(bits)} bits")
    a, b = t.shape
    awq = settings.get("quant_method") == "awq" or "g_idx" not in beside
    # shown as (outputs, inputs), as the model has it
    shape = (b * 32 // bits, a) if awq else (b, a * 32 // bits)
    scale = beside.get("scales")
    group = shape[1] // scale.shape[0] if scale and scale.shape and scale.shape[0] else None
    name = "AWQ" if awq else "GPTQ"
    return shape, f"{name} INT{bits}" + (f"-G{group}" if group else "")


def _scaled(t: StoredTensor, beside: Mapping[str, StoredTensor]) -> tuple[tuple[int, ...], str]:
    """Codes of 8 bits with scales beside them."""
    name = {"I8": "INT8", "U8": "INT8"}.get(t.type, t.type)
    scale = beside.get("weight_scale") or beside.get("weight_scale_inv")
    if "weight_scale_inv" in beside:
        return t.shape, f"{name}-blocks"
    return t.shape, _grouped(name, t.shape, scale)


def _bitsandbytes(
    t: StoredTensor, beside: Mapping[str, StoredTensor]
) -> tuple[tuple[int, ...], str]:
    """Two codes of 4 bits in a byte, flattened."""
    state = next((k for k in beside if "quant_state" in k), "")
    kind = "NF4" if "nf4" in state else "FP4" if "fp4" in state else "4-bit"
    return (2 * t.elements,), f"bitsandbytes {kind}"


def _microscaled(
    t: StoredTensor, by_name: Mapping[str, StoredTensor]
) -> tuple[Logical, list[str]] | None:
    """MXFP4: blocks (..., groups, 16) of two codes a byte, and a byte of scale a group."""
    base = t.name.removesuffix("_blocks")
    scale = by_name.get(f"{base}_scales")
    if scale is None or len(t.shape) < 2 or scale.shape != t.shape[:-1]:
        return None
    shape = (*t.shape[:-2], t.shape[-2] * t.shape[-1] * 2)
    whole = Logical(base, shape, "MXFP4", 2 * t.elements, t.nbytes + scale.nbytes)
    return whole, [t.name, scale.name]


def _grouped(name: str, shape: tuple[int, ...], scale: StoredTensor | None) -> str:
    """The type with its group: one scale for so many columns, for a row, or for all."""
    if scale is None or not shape:
        return name
    if scale.elements == 1:
        return f"{name}-tensor"
    groups = scale.shape[-1] if len(scale.shape) == len(shape) else 1
    if groups <= 1:
        return f"{name}-channel"
    return f"{name}-G{-(-shape[-1] // groups)}"


def _widths(settings: Mapping[str, Any]) -> set[int]:
    """Bits of the weights in any group of a compressed-tensors config."""
    groups = settings.get("config_groups")
    found = set()
    for g in groups.values() if isinstance(groups, dict) else ():
        weights = g.get("weights") if isinstance(g, dict) else None
        bits = weights.get("num_bits") if isinstance(weights, dict) else None
        if type(bits) is int and 1 <= bits <= 8:
            found.add(bits)
    return found


def _two(t: StoredTensor) -> tuple[int, int]:
    """The two numbers that a ``weight_shape`` holds."""
    width = {"I64": 8, "I32": 4}.get(t.type)
    if width is None or t.shape != (2,):
        raise _bad(t, "no two whole numbers")
    try:
        with t.file.open("rb") as f:
            f.seek(t.offset)
            rows, columns = struct.unpack("<qq" if width == 8 else "<ii", f.read(2 * width))
    except (OSError, struct.error) as e:
        raise _bad(t, "cannot be read") from e
    if not (0 < rows < 1 << 31 and 0 < columns < 1 << 31):
        raise _bad(t, f"shape {rows} x {columns}")
    return rows, columns


def _bad(t: StoredTensor, why: str) -> JoulesmithError:
    return JoulesmithError(f"damaged tensor {quoted(t.name)}: {t.file}: {why}: {AGAIN}")


_PART = re.compile(r"\.(?:weight|bias|codes|scales|zeros|qweight|weight_packed|float32)$")
_GGUF = re.compile(r"blk\.(\d+)\.(.+)")
_TORCH = re.compile(r"(?:.*\.)?(?:layers|h|blocks?)\.(\d+)\.(.+)")
_ROLES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "qkv_proj": "attn_qkv", "gate_proj": "ffn_gate", "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}  # fmt: skip


def place(name: str) -> tuple[int | None, str]:
    """(layer, role) of a tensor by its name in GGUF or torch; no layer outside blocks."""
    short = _PART.sub("", name)
    if (found := _GGUF.fullmatch(short)) is not None:
        return int(found[1][:6]), found[2]
    if (found := _TORCH.fullmatch(short)) is not None:
        leaf = found[2].rpartition(".")[2]
        return int(found[1][:6]), _ROLES.get(leaf, leaf)
    return None, short
