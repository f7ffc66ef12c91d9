"""Reads GGUF files. Every count, length and offset is checked against the file's size
before memory is taken for it, so that a damaged or hostile file costs one line.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
Knows no architectures and no torch.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from joulesmith.errors import JoulesmithError, MissingExtraError
from joulesmith.formats.files import regular_size
from joulesmith.units import size

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32

# Far above any real model (the largest vocabularies hold about 300 k tokens and
# 600 k merges), far below what would hurt.
MAX_TENSORS = 1 << 17
MAX_KEYS = 1 << 16
MAX_ELEMENTS = 1 << 23  # over all arrays of one file
MAX_STRING = 1 << 24
MAX_NAME = 63  # ggml's GGML_MAX_NAME less its closing zero
MAX_DIMS = 4

Scalar: TypeAlias = "int | float | bool | str"
Value: TypeAlias = "Scalar | list[int] | list[float] | list[bool] | list[str]"


class ValueType(IntEnum):
    """Type numbers of metadata values."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


NUMBERS: dict[ValueType, struct.Struct] = {
    ValueType.UINT8: struct.Struct("<B"),
    ValueType.INT8: struct.Struct("<b"),
    ValueType.UINT16: struct.Struct("<H"),
    ValueType.INT16: struct.Struct("<h"),
    ValueType.UINT32: struct.Struct("<I"),
    ValueType.INT32: struct.Struct("<i"),
    ValueType.FLOAT32: struct.Struct("<f"),
    ValueType.BOOL: struct.Struct("<B"),
    ValueType.UINT64: struct.Struct("<Q"),
    ValueType.INT64: struct.Struct("<q"),
    ValueType.FLOAT64: struct.Struct("<d"),
}
_U32, _U64 = NUMBERS[ValueType.UINT32], NUMBERS[ValueType.UINT64]


@dataclass(frozen=True)
class MetaValue:
    """One metadata value with the type it has in the file.

    subtype: the elements' type when ``type`` is ARRAY, else None.
    Bytes of an array's strings that are not UTF-8 (tokens may be any bytes) are
    kept as surrogate escapes.
    """

    value: Value
    type: ValueType
    subtype: ValueType | None = None

    @classmethod
    def string(cls, value: str) -> MetaValue:
        return cls(value, ValueType.STRING)

    @classmethod
    def u32(cls, value: int) -> MetaValue:
        return cls(value, ValueType.UINT32)

    @classmethod
    def f32(cls, value: float) -> MetaValue:
        return cls(value, ValueType.FLOAT32)

    @classmethod
    def boolean(cls, value: bool) -> MetaValue:
        return cls(value, ValueType.BOOL)

    @classmethod
    def array(
        cls, values: list[int] | list[float] | list[bool] | list[str], subtype: ValueType
    ) -> MetaValue:
        return cls(values, ValueType.ARRAY, subtype)


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's place in the file.

    shape: as numpy has it, the contiguous dimension last (GGUF stores it first).
    type, number: ggml's name and number, such as "Q4_0" and 2. offset: bytes from
    the start of the file. nbytes: of the data, without padding.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    number: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """A parsed header. The tensors' bytes stay in the file until asked for."""

    path: Path
    version: int
    metadata: dict[str, MetaValue]
    tensors: list[GgufTensor]
    alignment: int
    by_name: dict[str, GgufTensor] = field(repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.by_name.update((t.name, t) for t in self.tensors)

    def value(self, key: str, default: Any = None) -> Any:
        """The value under ``key``, or ``default``."""
        found = self.metadata.get(key)
        return default if found is None else found.value

    def data(self, tensor: GgufTensor | str) -> NDArray[np.uint8]:
        """The stored bytes, a read-only memory map of shape (nbytes,)."""
        t = self.by_name[tensor] if isinstance(tensor, str) else tensor
        try:
            return np.memmap(self.path, np.uint8, "r", t.offset, (t.nbytes,))
        except (OSError, ValueError) as e:
            raise JoulesmithError(f"cannot read tensor {t.name}: {self.path}: {e}") from e

    def dequantize(self, tensor: GgufTensor | str) -> NDArray[np.float32]:
        """The tensor as float32, shape ``tensor.shape``.

        Raises `JoulesmithError` for a block type that the gguf package cannot decode.
        """
        t = self.by_name[tensor] if isinstance(tensor, str) else tensor
        raw = self.data(t)
        if t.type == "F32":
            return np.array(raw.view("<f4"), np.float32).reshape(t.shape)
        if t.type in ("F16", "F64"):
            return raw.view("<f2" if t.type == "F16" else "<f8").astype(np.float32).reshape(t.shape)
        gguf = _gguf()
        rows = raw.reshape(-1, t.nbytes * t.shape[-1] // _elements(t.shape))
        if t.type == "Q1_0":
            return _signs(rows).reshape(t.shape)
        try:
            out = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(t.number))
        except (NotImplementedError, KeyError, ValueError) as e:
            raise JoulesmithError(
                f"cannot decode type {t.type} of tensor {t.name}: {self.path}: "
                "use a file with another block type"
            ) from e
        return np.asarray(out, np.float32).reshape(t.shape)


def _signs(rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Rows of Q1_0, which the gguf package does not decode: a float16, and 128 bits of sign."""
    blocks = rows.reshape(-1, 18)
    step = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    return np.where(np.unpackbits(blocks[:, 2:], axis=1, bitorder="little"), step, -step)


def type_table() -> dict[str, tuple[int, int, int]]:
    """ggml type name -> (type number, elements per block, bytes per block)."""
    return _types()[0]


def type_bytes(type_name: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor of ``shape`` takes as ``type_name``.

    Raises `JoulesmithError` when the type is unknown or a row is no whole number of blocks.
    """
    if type_name not in type_table():
        raise JoulesmithError(f"unknown ggml type {type_name!r}: use one of {', '.join(_common())}")
    _, block, width = type_table()[type_name]
    if not shape or any(d <= 0 for d in shape):
        raise JoulesmithError(f"a tensor of shape {shape} cannot be stored: every side must be > 0")
    if shape[-1] % block:
        raise JoulesmithError(
            f"rows of {shape[-1]} do not divide into {type_name} blocks of {block}: "
            "choose another block type"
        )
    return _elements(shape) // block * width


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Parse the header of a GGUF file.

    Raises `JoulesmithError` (one line: what, where, what to do) for a file that is
    absent, not GGUF, damaged, of an unsupported version, big-endian or split.
    """
    p = Path(path)
    regular_size(p)
    try:
        with p.open("rb") as f:
            length = os.fstat(f.fileno()).st_size
            if length == 0:
                raise JoulesmithError(f"empty file: {p}: download or write it again")
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return _parse(p, view, length)
    except OSError as e:
        raise JoulesmithError(f"cannot read: {p}: {e.strerror or e}") from e


def _parse(path: Path, view: mmap.mmap, length: int) -> GgufFile:
    cursor = _Cursor(path, view, length)
    magic = view[: min(4, length)]
    if magic != MAGIC:
        what = "a Git LFS pointer, not the model" if view[:8] == b"version " else "not a GGUF file"
        raise JoulesmithError(f"{what}: {path}: give a .gguf model, or download it again")
    cursor.at = 4
    version = cursor.number(_U32, "version")
    if version & 0xFFFF == 0 and version:
        raise JoulesmithError(f"big-endian GGUF is not supported: {path}: convert it first")
    if version not in (2, 3):
        raise JoulesmithError(
            f"GGUF version {version} is not supported: {path}: versions 2 and 3 are; "
            "convert the model again"
        )
    n_tensors = cursor.count(_U64, "tensor count", 24, MAX_TENSORS)
    n_keys = cursor.count(_U64, "metadata count", 13, MAX_KEYS)

    metadata: dict[str, MetaValue] = {}
    for _ in range(n_keys):
        key = cursor.text("metadata key")
        if not key or key in metadata:
            raise cursor.bad(f"metadata key {key[:80]!r} is empty or appears twice")
        metadata[key] = cursor.value(_shown(key))

    split = metadata.get("split.count")
    if split is not None and split.value not in (0, 1):
        raise JoulesmithError(
            f"split GGUF is not supported: {path}: join the parts with llama-gguf-split --merge"
        )
    alignment = _alignment(cursor, metadata)
    placed = [cursor.tensor() for _ in range(n_tensors)]
    start = -(-cursor.at // alignment) * alignment
    tensors = _place(cursor, placed, start, alignment)
    return GgufFile(path, version, metadata, tensors, alignment)


def _alignment(cursor: _Cursor, metadata: dict[str, MetaValue]) -> int:
    found = metadata.get("general.alignment")
    if found is None:
        return DEFAULT_ALIGNMENT
    a = found.value
    if found.type != ValueType.UINT32 or not isinstance(a, int) or a & (a - 1) or not 0 < a <= 1e6:
        raise cursor.bad(f"general.alignment {str(a)[:40]} is not a small power of two")
    return a


def _place(
    cursor: _Cursor, tensors: list[GgufTensor], start: int, alignment: int
) -> list[GgufTensor]:
    """Relative offsets -> absolute ones; all inside the file, aligned, apart, named once."""
    out, names = [], set()
    for t in tensors:
        if t.name in names:
            raise cursor.bad(f"tensor {t.name!r} appears twice")
        names.add(t.name)
        if t.offset % alignment:
            raise cursor.bad(f"tensor {t.name!r} is not aligned to {alignment} bytes")
        if start + t.offset + t.nbytes > cursor.length:
            raise cursor.bad(
                f"truncated: tensor {t.name!r} ends at byte {start + t.offset + t.nbytes} "
                f"of {cursor.length}"
            )
        out.append(GgufTensor(t.name, t.shape, t.type, t.number, start + t.offset, t.nbytes))
    ordered = sorted(out, key=lambda t: t.offset)
    for a, b in pairwise(ordered):
        if a.offset + a.nbytes > b.offset:
            raise cursor.bad(f"tensors {a.name!r} and {b.name!r} overlap")
    return out


class _Cursor:
    """A position in the mapped file; each read says what it wanted when bytes run out."""

    def __init__(self, path: Path, view: mmap.mmap, length: int) -> None:
        self.path, self.view, self.length = path, view, length
        self.at = 0
        self.elements = 0

    def bad(self, what: str) -> JoulesmithError:
        return JoulesmithError(
            f"damaged GGUF: {self.path}: {what}: download or convert the model again"
        )

    def need(self, n: int, what: str) -> None:
        if n > self.length - self.at:
            raise self.bad(
                f"truncated: {what} wants {size(n)} at byte {self.at}, "
                f"the file has {size(self.length - self.at)} left"
            )

    def number(self, form: struct.Struct, what: str) -> Any:
        self.need(form.size, what)
        (value,) = form.unpack_from(self.view, self.at)
        self.at += form.size
        return value

    def count(self, form: struct.Struct, what: str, least_bytes: int, most: int) -> int:
        """A number of items that each take ``least_bytes`` at least of what is left."""
        n: int = self.number(form, what)
        if n > most:
            raise self.bad(f"absurd {what} {n} (more than {most})")
        self.need(n * least_bytes, f"{what} {n}")
        return n

    def text(self, what: str) -> str:
        n = self.count(_U64, f"length of {what}", 1, MAX_STRING)
        raw = self.view[self.at : self.at + n]
        self.at += n
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as e:
            raise self.bad(f"{what} {raw[:40]!r} is not UTF-8") from e

    def value_type(self, what: str) -> ValueType:
        n = self.number(_U32, f"type of {what}")
        try:
            return ValueType(n)
        except ValueError as e:
            raise self.bad(f"unknown type {n} of {what}") from e

    def value(self, key: str) -> MetaValue:
        kind = self.value_type(key)
        if kind == ValueType.STRING:
            return MetaValue(self.text(key), kind)
        if kind == ValueType.ARRAY:
            return self.array(key)
        number = self.number(NUMBERS[kind], key)
        if kind == ValueType.BOOL:
            return MetaValue(self.truth(number, key), kind)
        return MetaValue(number, kind)

    def truth(self, number: int, key: str) -> bool:
        if number > 1:
            raise self.bad(f"{key} holds {number} where true (1) or false (0) belongs")
        return bool(number)

    def array(self, key: str) -> MetaValue:
        kind = self.value_type(f"elements of {key}")
        if kind == ValueType.ARRAY:
            raise self.bad(f"{key} is an array of arrays, which no engine reads")
        width = 8 if kind == ValueType.STRING else NUMBERS[kind].size
        n = self.count(_U64, f"element count of {key}", width, MAX_ELEMENTS - self.elements)
        self.elements += n
        if kind == ValueType.STRING:
            return MetaValue(self.texts(n, key), ValueType.ARRAY, kind)
        form = NUMBERS[kind].format
        values = np.frombuffer(self.view, np.dtype(form), n, self.at).tolist()
        self.at += n * width
        if kind == ValueType.BOOL:
            values = [self.truth(v, key) for v in values]
        return MetaValue(values, ValueType.ARRAY, kind)

    def texts(self, n: int, key: str) -> list[str]:
        out: list[str] = []
        view, at, end, unpack = self.view, self.at, self.length, _U64.unpack_from
        for i in range(n):
            if at + 8 > end:
                raise self.bad(f"truncated: element {i} of {key}")
            (m,) = unpack(view, at)
            at += 8
            if m > end - at or m > MAX_STRING:
                raise self.bad(f"truncated: element {i} of {key} wants {size(m)} at byte {at}")
            out.append(view[at : at + m].decode("utf-8", "surrogateescape"))
            at += m
        self.at = at
        return out

    def tensor(self) -> GgufTensor:
        name = self.text("tensor name")
        if not name or len(name.encode()) > MAX_NAME:
            raise self.bad(f"tensor name {name[:80]!r} has not 1 to {MAX_NAME} bytes")
        shown = _shown(name)
        n_dims = self.number(_U32, f"dimensions of {shown}")
        if not 1 <= n_dims <= MAX_DIMS:
            raise self.bad(f"tensor {name!r} has {n_dims} dimensions, 1 to {MAX_DIMS} are possible")
        shape = tuple(self.number(_U64, f"shape of {shown}") for _ in range(n_dims))[::-1]
        number = self.number(_U32, f"type of {shown}")
        offset = self.number(_U64, f"offset of {shown}")
        known = _types()[1].get(number)
        if known is None:
            raise JoulesmithError(
                f"tensor {name!r} has unknown ggml type {number}: {self.path}: "
                "update the gguf package or convert the model again"
            )
        type_name, block, width = known
        if any(not 0 < d < 1 << 63 for d in shape) or _elements(shape) >= 1 << 63:
            raise self.bad(f"tensor {name!r} has the impossible shape {shape}")
        if shape[-1] % block:
            raise self.bad(f"tensor {name!r}: rows of {shape[-1]} are no whole {type_name} blocks")
        return GgufTensor(name, shape, type_name, number, offset, _elements(shape) // block * width)


def _shown(name: str) -> str:
    """A name from the file in an error: short, and nothing that would drive a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in name[:80])


def _elements(shape: tuple[int, ...]) -> int:
    n = 1
    for d in shape:
        n *= int(d)
    return n


def _common() -> list[str]:
    return [n for n in ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q4_K", "Q4_0") if n in type_table()]


def _gguf() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError as e:
        raise MissingExtraError("gguf") from e
    return gguf


@cache
def _types() -> tuple[dict[str, tuple[int, int, int]], dict[int, tuple[str, int, int]]]:
    gguf = _gguf()
    sizes: dict[Any, tuple[int, int]] = gguf.GGML_QUANT_SIZES
    by_name = {str(t.name): (int(t), int(b), int(w)) for t, (b, w) in sizes.items()}
    return by_name, {number: (name, b, w) for name, (number, b, w) in by_name.items()}
