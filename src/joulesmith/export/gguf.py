"""Writes GGUF files: streamed, the same bytes each time, whole or not at all.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3,
little-endian). Knows no search and no quantizer: the bytes of each tensor are given.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from joulesmith.atomic import atomic_path
from joulesmith.errors import JoulesmithError
from joulesmith.gguf_file import (
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMS,
    MAX_NAME,
    NUMBERS,
    MetaValue,
    ValueType,
    type_bytes,
    type_table,
)

if TYPE_CHECKING:
    from joulesmith.models import Model

Data: TypeAlias = "bytes | memoryview | NDArray[Any]"
TensorEntry: TypeAlias = "tuple[str, str, tuple[int, ...], Data | Callable[[], Data]]"

# llama.cpp's llama_ftype numbers (include/llama.h): what `general.file_type` says
# of a file whose most common type is this one. Only a label: engines read each
# tensor's own type.
_FILE_TYPE = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 12,
    "Q4_K": 15,
    "Q5_K": 17,
    "Q6_K": 18,
    "IQ2_XXS": 19,
    "IQ2_XS": 20,
    "IQ3_XXS": 23,
    "IQ1_S": 24,
    "IQ4_NL": 25,
    "IQ3_S": 26,
    "IQ2_S": 28,
    "IQ4_XS": 30,
    "IQ1_M": 31,
    "BF16": 32,
    "TQ1_0": 36,
    "TQ2_0": 37,
    "MXFP4": 38,
    "NVFP4": 39,
    "Q1_0": 40,
}
_GUESSED = 1024  # llama.h: LLAMA_FTYPE_GUESSED, "not specified in the model file"
_QUANTIZATION_VERSION = 2


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, MetaValue],
    tensors: Iterable[TensorEntry],
    *,
    provenance: Mapping[str, str] | None = None,
) -> int:
    """Write a GGUF v3 file and return its size in bytes.

    metadata: written in the given order. ``general.file_type`` and
        ``general.quantization_version`` are set from the tensors, as inherited
        values would describe another file.
    tensors: (name, ggml type name, shape with the contiguous dimension last, data).
        Data is the stored bytes: an array whose bytes are written as they lie, a
        bytes object, or a callable that makes either. Callables are called one
        at a time, so that one tensor is in memory at once.
    provenance: written as strings under ``joulesmith.<key>``.

    The file appears under ``path`` when complete; on any error an existing file
    there stays as it was. Raises `JoulesmithError` for a full disk (with the bytes
    needed), an unknown type, a row that is no whole number of blocks, or data of
    the wrong size.
    """
    entries = list(tensors)
    described = _described(dict(metadata), entries, provenance or {})
    alignment = _alignment(described)
    head, offsets = _header(described, entries, alignment)
    sizes = [type_bytes(kind, tuple(shape)) for _, kind, shape, _ in entries]
    total = len(head) + (offsets[-1] + _pad(sizes[-1], alignment) if entries else 0)
    with atomic_path(path, needed=total) as temp, temp.open("xb") as f:
        f.write(head)
        for (name, kind, _, data), n in zip(entries, sizes, strict=True):
            given = data() if callable(data) else data
            raw = _raw(given)
            if len(raw) != n:
                raise JoulesmithError(
                    f"tensor {name}: {len(raw)} bytes given, {n} belong to its shape as {kind}"
                )
            f.write(raw)
            f.write(b"\0" * (_pad(n, alignment) - n))
            del raw, given
    return total


def float_entry(model: Model, name: str, type: str = "BF16") -> TensorEntry:
    """The write_gguf entry of one tensor of ``model`` as F32, F16 or BF16, made when written.

    Vectors (norms, biases) are always F32, as the engine wants them.
    """
    if type not in ("F32", "F16", "BF16"):
        raise JoulesmithError(f"{type!r} is no float type: use F32, F16 or BF16")
    shape = model.tensors[name].shape
    kind = type if len(shape) == 2 else "F32"
    return name, kind, shape, lambda: _float_bytes(model, name, kind)


def extra_entries(model: Model) -> list[TensorEntry]:
    """Entries of the tensors that are no parameters (rope frequency factors), as F32."""
    return [(n, "F32", a.shape, np.ascontiguousarray(a, "<f4")) for n, a in model.extra.items()]


def write_float_gguf(model: Model, path: str | os.PathLike[str], type: str = "BF16") -> int:
    """Write ``model`` unquantized: matrices as ``type`` (F32, F16, BF16), the rest as F32.

    Returns the file's size in bytes. Raises `JoulesmithError` as `write_gguf`, and
    where F16 cannot hold a weight.
    """
    entries = [float_entry(model, name, type) for name in model.tensors]
    return write_gguf(path, model.metadata, entries + extra_entries(model))


def _float_bytes(model: Model, name: str, kind: str) -> NDArray[Any]:
    import torch

    from joulesmith.models import gguf_view

    weight = gguf_view(model, name)
    if kind == "F32":
        return np.asarray(weight.contiguous())
    if kind == "F16":
        half = weight.to(torch.float16)
        if not bool(torch.isfinite(half).all()):
            raise JoulesmithError(f"tensor {name} overflows F16: write BF16 or F32")
        return np.asarray(half.contiguous())
    return np.asarray(weight.to(torch.bfloat16).contiguous().view(torch.int16))


def _described(
    metadata: dict[str, MetaValue], entries: list[TensorEntry], provenance: Mapping[str, str]
) -> dict[str, MetaValue]:
    share: dict[str, int] = {}
    for name, kind, shape, _ in entries:
        if kind not in type_table():
            type_bytes(kind, tuple(shape))  # raises with the list of types
        if len(shape) >= 2 or not share:
            share[kind] = share.get(kind, 0) + math.prod(shape)
        if not name or len(name.encode()) > MAX_NAME or not 1 <= len(shape) <= MAX_DIMS:
            raise JoulesmithError(f"tensor {name!r} of shape {shape} cannot be stored in GGUF")
    names = [e[0] for e in entries]
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise JoulesmithError(f"tensor {twice!r} is given twice")
    most = max(share, key=lambda k: share[k]) if share else "F32"
    metadata["general.quantization_version"] = MetaValue.u32(_QUANTIZATION_VERSION)
    metadata["general.file_type"] = MetaValue.u32(_FILE_TYPE.get(most, _GUESSED))
    for key, text in provenance.items():
        metadata[f"joulesmith.{key}"] = MetaValue.string(text)
    return metadata


def _alignment(metadata: Mapping[str, MetaValue]) -> int:
    found = metadata.get("general.alignment")
    if found is None:
        return DEFAULT_ALIGNMENT
    a = found.value
    if not isinstance(a, int) or a < 8 or a & (a - 1):
        raise JoulesmithError(f"general.alignment {a} is not a power of two from 8 up")
    return a


def _header(
    metadata: Mapping[str, MetaValue], entries: list[TensorEntry], alignment: int
) -> tuple[bytes, list[int]]:
    """All bytes before the first tensor, and each tensor's offset from there."""
    out = bytearray(MAGIC)
    out += struct.pack("<IQQ", 3, len(entries), len(metadata))
    for key, value in metadata.items():
        try:
            out += _text(key) + _value(value)
        except (struct.error, TypeError, ValueError, OverflowError) as e:
            raise JoulesmithError(
                f"metadata {key} cannot be written as {value.type.name}: {e}"
            ) from e
    offsets, at = [], 0
    for name, kind, shape, _ in entries:
        offsets.append(at)
        dims = [int(d) for d in reversed(shape)]
        number = type_table()[kind][0]
        out += _text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, number, at)
        at += _pad(type_bytes(kind, tuple(shape)), alignment)
    out += b"\0" * (_pad(len(out), alignment) - len(out))
    return bytes(out), offsets


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _value(meta: MetaValue) -> bytes:
    if meta.type != ValueType.ARRAY:
        return struct.pack("<I", meta.type) + _scalar(meta.value, meta.type)
    if meta.subtype is None or not isinstance(meta.value, list):
        raise ValueError("an array wants a list and the type of its elements")
    head = struct.pack("<IIQ", meta.type, meta.subtype, len(meta.value))
    return head + b"".join(_scalar(v, meta.subtype) for v in meta.value)


def _scalar(value: Any, kind: ValueType) -> bytes:
    if kind == ValueType.STRING:
        if not isinstance(value, str):
            raise TypeError(f"{value!r} is no string")
        return _text(value)
    return NUMBERS[kind].pack(value)


def _raw(data: Data) -> memoryview:
    if isinstance(data, np.ndarray):
        flat: Any = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        return memoryview(flat)
    return memoryview(data).cast("B")


def _pad(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment
