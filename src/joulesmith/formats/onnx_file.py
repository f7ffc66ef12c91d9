"""Reads what an ONNX model stores: initializers, where their bytes lie, and which belong
together as codes, scales and zeros.

Format: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3 (field numbers below are
its). The file is walked in place through a memory map: the ``onnx`` package would first
copy all weights into memory. Shapes, sizes and external files are checked; nothing is
computed and no function is followed.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from joulesmith.errors import JoulesmithError
from joulesmith.formats import protobuf
from joulesmith.formats.files import (
    AGAIN,
    MAX_DIMS,
    MAX_NAME,
    MAX_TENSORS,
    StoredTensor,
    member,
    overlapping,
    quoted,
    regular_size,
    stored_bytes,
)
from joulesmith.formats.packed import Logical
from joulesmith.formats.protobuf import BYTES, VARINT, DamagedError, signed, varint

MAX_NODES = 1 << 20
MAX_DEPTH = 16
MAX_PARTS = 1 << 10
MAX_FIELDS = 1 << 23

# TensorProto.DataType -> name, bits
TYPES: dict[int, tuple[str, int | None]] = {
    1: ("F32", 32), 2: ("U8", 8), 3: ("I8", 8), 4: ("U16", 16), 5: ("I16", 16),
    6: ("I32", 32), 7: ("I64", 64), 8: ("STRING", None), 9: ("BOOL", 8), 10: ("F16", 16),
    11: ("F64", 64), 12: ("U32", 32), 13: ("U64", 64), 14: ("C64", 64), 15: ("C128", 128),
    16: ("BF16", 16), 17: ("F8_E4M3", 8), 18: ("F8_E4M3FNUZ", 8), 19: ("F8_E5M2", 8),
    20: ("F8_E5M2FNUZ", 8), 21: ("U4", 4), 22: ("I4", 4), 23: ("F4", 4), 24: ("F8_E8M0", 8),
    25: ("U2", 2), 26: ("I2", 2),
}  # fmt: skip
_FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class Node:
    """An operation that reads packed weights. inputs: names. numbers: integer attributes."""

    op: str
    inputs: tuple[str, ...]
    numbers: dict[str, int]


@dataclass
class OnnxModel:
    """producer: the program that wrote it. opset: of the standard operators. casts: what
    each Cast's result is made from."""

    path: Path
    producer: str = ""
    opset: int | None = None
    name: str = ""
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    casts: dict[str, str] = field(default_factory=dict)

    def stored(self, name: str) -> str:
        """The tensor that ``name`` is, or is cast from; ``name`` where there is none."""
        source = self.casts.get(name, name)
        return source if source in self.tensors else name


_PACKED = ("MatMulNBits", "DequantizeLinear", "GatherBlockQuantized")


def read_onnx(path: Path) -> OnnxModel:
    """The header of a .onnx file and of its external data.

    Raises `JoulesmithError` (one line) for a file that is no ONNX model, tensors whose
    bytes do not fit their shape, external data outside the folder, and overlaps.
    """
    length = regular_size(path)
    if length == 0:
        raise JoulesmithError(f"empty file: {path}: {AGAIN}")
    reader = _Reader(path)
    try:
        with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as view:
            reader.model_at(view, length)
    except DamagedError as e:
        raise reader.bad(str(e)) from e
    except OSError as e:
        raise JoulesmithError(f"cannot read: {path}: {e.strerror or e}") from e
    # equal tensors may share external bytes
    if (twice := overlapping(reader.model.tensors.values(), shared=True)) is not None:
        raise reader.bad(f"tensor {quoted(twice)} overlaps another")
    return reader.model


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = OnnxModel(path)
        self.visited = 0
        self.external: dict[str, tuple[Path, int]] = {}
        self.budget = protobuf.Budget(MAX_FIELDS)

    def fields(self, view: mmap.mmap, a: int, b: int) -> Iterator[tuple[int, int, int, int]]:
        return protobuf.fields(view, a, b, self.budget)

    def bad(self, why: str) -> JoulesmithError:
        return JoulesmithError(f"damaged ONNX model: {self.path}: {why}: {AGAIN}")

    def text(self, view: mmap.mmap, a: int, b: int, what: str, most: int = MAX_NAME) -> str:
        if b - a > most:
            raise self.bad(f"{what} of {b - a} bytes")
        try:
            return view[a:b].decode("utf-8")
        except UnicodeDecodeError as e:
            raise self.bad(f"{what} is not UTF-8") from e

    def model_at(self, view: mmap.mmap, end: int) -> None:
        """ModelProto: 1 ir_version, 2 producer, 7 graph, 8 opset_import, 14 metadata."""
        graph, version = None, None
        for number, kind, a, b in self.fields(view, 0, end):
            if number == 1 and kind == VARINT:
                version = a
            elif number == 2 and kind == BYTES:
                self.model.producer = self.text(view, a, b, "the producer's name")
            elif number == 7 and kind == BYTES:
                if graph is not None:
                    raise self.bad("two graphs")
                graph = (a, b)
            elif number == 8 and kind == BYTES:
                self._opset(view, a, b)
            elif number == 14 and kind == BYTES and len(self.model.metadata) < 256:
                key, value = self._pair(view, a, b)
                self.model.metadata[key] = value[:MAX_NAME]
        if graph is None or version is None or not 0 < version < 1000:
            raise JoulesmithError(f"not an ONNX model: {self.path}: no graph or no version in it")
        self._graph(view, *graph, depth=0)

    def _opset(self, view: mmap.mmap, a: int, b: int) -> None:
        domain, version = "", None
        for number, kind, c, d in self.fields(view, a, b):
            if number == 1 and kind == BYTES:
                domain = self.text(view, c, d, "a domain")
            elif number == 2 and kind == VARINT:
                version = c
        if domain in ("", "ai.onnx"):
            self.model.opset = version

    def _pair(self, view: mmap.mmap, a: int, b: int) -> tuple[str, str]:
        """StringStringEntryProto: 1 key, 2 value."""
        key = value = ""
        for number, kind, c, d in self.fields(view, a, b):
            if number == 1 and kind == BYTES:
                key = self.text(view, c, d, "a key")
            elif number == 2 and kind == BYTES:
                value = self.text(view, c, d, "a value", 1 << 16)
        return key, value

    def _count(self) -> None:
        self.visited += 1
        if self.visited > MAX_NODES:
            raise self.bad(f"more than {MAX_NODES} nodes and tensors")

    def _graph(self, view: mmap.mmap, start: int, end: int, depth: int) -> None:
        """GraphProto: 1 node, 2 name, 5 initializer, 15 sparse_initializer."""
        if depth > MAX_DEPTH:
            raise self.bad(f"graphs nested deeper than {MAX_DEPTH}")
        for number, kind, a, b in self.fields(view, start, end):
            if kind != BYTES:
                continue
            if number == 1:
                self._node(view, a, b, depth)
            elif number == 2 and depth == 0:
                self.model.name = self.text(view, a, b, "the graph's name")
            elif number == 5:
                self._tensor(view, a, b)
            elif number == 15:
                raise self.bad("sparse initializers, which are not supported")

    def _node(self, view: mmap.mmap, start: int, end: int, depth: int) -> None:
        """NodeProto: 1 input, 2 output, 4 op_type, 5 attribute. Constants and subgraphs are
        followed."""
        self._count()
        op = ""
        inputs: list[tuple[int, int]] = []
        numbers: dict[str, int] = {}
        output: tuple[int, int] | None = None
        for number, kind, a, b in self.fields(view, start, end):
            if kind != BYTES:
                continue
            if number == 1 and len(inputs) < MAX_PARTS:
                inputs.append((a, b))
            elif number == 2 and output is None:
                output = (a, b)
            elif number == 4:
                op = self.text(view, a, b, "an operator's name")
            elif number == 5:
                found = self._attribute(view, a, b, depth)
                if found is not None and len(numbers) < MAX_PARTS:
                    numbers[found[0]] = found[1]
        if op in _PACKED:
            names = tuple(self.text(view, a, b, "an input's name") for a, b in inputs)
            self.model.nodes.append(Node(op, names, numbers))
        elif op == "Cast" and inputs and output is not None:
            source = self.text(view, *inputs[0], "an input's name")
            self.model.casts[self.text(view, *output, "an output's name")] = source

    def _attribute(
        self, view: mmap.mmap, start: int, end: int, depth: int
    ) -> tuple[str, int] | None:
        """AttributeProto: 1 name, 3 int, 5 tensor, 6 graph, 11 graphs."""
        name, value = "", None
        for number, kind, a, b in self.fields(view, start, end):
            if number == 1 and kind == BYTES:
                name = self.text(view, a, b, "an attribute's name")
            elif number == 3 and kind == VARINT:
                value = signed(a)
            elif number == 5 and kind == BYTES:
                self._tensor(view, a, b, inside=True)
            elif number in (6, 11) and kind == BYTES:
                self._graph(view, a, b, depth + 1)
        return None if value is None else (name, value)

    def _tensor(self, view: mmap.mmap, start: int, end: int, inside: bool = False) -> None:
        """TensorProto: 1 dims, 2 data_type, 3 segment, 4 to 7, 10, 11 typed data, 8 name,
        9 raw_data, 13 external_data, 14 data_location."""
        self._count()
        dims: list[int] = []
        number_type, name, raw, typed, location = 0, "", None, 0, 0
        external: dict[str, str] = {}
        for number, kind, a, b in self.fields(view, start, end):
            if number == 1:
                dims += self._dims(view, kind, a, b)
                if len(dims) > MAX_DIMS:
                    raise self.bad(f"a tensor of more than {MAX_DIMS} dimensions")
            elif number == 2 and kind == VARINT:
                number_type = a
            elif number == 3:
                raise self.bad("tensors in segments, which are not supported")
            elif number in (4, 5, 6, 7, 10, 11):
                typed += b - a if kind == BYTES else 1
            elif number == 8 and kind == BYTES:
                name = self.text(view, a, b, "a tensor's name")
            elif number == 9 and kind == BYTES:
                raw = (a, b)
            elif number == 13 and kind == BYTES and len(external) < 16:
                key, value = self._pair(view, a, b)
                external[key] = value
            elif number == 14 and kind == VARINT:
                location = a
        if not name and inside:
            name = f"constant at byte {start}"
        if not name or name in self.model.tensors or len(self.model.tensors) >= MAX_TENSORS:
            raise self.bad(f"tensor name {quoted(name)} is empty or appears twice, or too many")
        if number_type not in TYPES:
            raise self.bad(f"tensor {quoted(name)} has unknown type {number_type}")
        type_name, bits = TYPES[number_type]
        shape = tuple(dims)
        want = None if bits is None else stored_bytes(shape, bits)
        if want is None and (bits is not None or any(d < 0 for d in shape)):
            raise self.bad(f"tensor {quoted(name)} has the impossible shape {shape}")
        if location == 1:
            place = self._external(name, external, want)
        elif raw is not None:
            place = (self.path, raw[0], raw[1] - raw[0])
            if want is not None and place[2] != want:
                raise self.bad(f"tensor {quoted(name)}: {place[2]} bytes, {want} belong to it")
        else:
            place = (self.path, start, typed)
            if typed == 0 and want:
                raise self.bad(f"tensor {quoted(name)} has no data")
        file, offset, n = place
        self.model.tensors[name] = StoredTensor(name, shape, type_name, bits, file, offset, n)

    def _dims(self, view: mmap.mmap, kind: int, a: int, b: int) -> list[int]:
        if kind == VARINT:
            return [signed(a)]
        if kind != BYTES or b - a > 10 * MAX_DIMS:
            raise self.bad("dimensions are no numbers")
        out = []
        while a < b:
            value, a = varint(view, a, b)
            out.append(signed(value))
        return out

    def _external(
        self, name: str, given: dict[str, str], want: int | None
    ) -> tuple[Path, int, int]:
        location = given.get("location", "")
        if location not in self.external:
            if len(self.external) >= MAX_PARTS:
                raise self.bad("too many external files")
            file = member(self.path.parent, location, self.path)
            self.external[location] = (file, regular_size(file))
        file, room = self.external[location]
        numbers = []
        for key in ("offset", "length"):
            text = given.get(key, "0" if key == "offset" else str(want))
            if not (text.isascii() and text.isdecimal() and len(text) <= 19):
                raise self.bad(f"tensor {quoted(name)}: {key} {quoted(text)}")
            numbers.append(int(text))
        offset, n = numbers
        if (want is not None and n != want) or offset + n > room:
            raise self.bad(f"tensor {quoted(name)} does not fit its place in {file.name}")
        return file, offset, n


def weights_of(model: OnnxModel) -> list[Logical]:
    """The model's parameters: packed codes with their scales and zeros counted in, and
    integer tables (shapes, axes) as constants, which are no weights."""
    used: set[str] = set()
    found: list[Logical] = []
    for node in model.nodes:
        skip = 1 if node.op == "MatMulNBits" else 0
        given = [model.stored(n) for n in node.inputs[skip : skip + 5]]
        if not given or given[0] not in model.tensors or given[0] in used:
            continue
        names = [n for n in given if n in model.tensors]
        codes, *rest = (model.tensors[n] for n in names)
        if codes.type in _FLOATS or codes.bits is None:
            continue
        rest = [t for t in rest if t.name not in used]
        whole = _nbits(node, codes, rest) if node.op == "MatMulNBits" else _qdq(codes, rest)
        used.update({codes.name, *(t.name for t in rest)})
        found.append(whole)
    for name, t in model.tensors.items():
        if name not in used:
            weight = t.type in _FLOATS
            kind = t.type if weight else f"{t.type} constants"
            found.append(Logical(name, t.shape, kind, t.elements if weight else 0, t.nbytes))
    return sorted(found, key=lambda p: p.name)


def _nbits(node: Node, codes: StoredTensor, rest: list[StoredTensor]) -> Logical:
    n, k = node.numbers.get("N", 0), node.numbers.get("K", 0)
    bits, group = node.numbers.get("bits", 4), node.numbers.get("block_size", 0)
    stored = codes.nbytes + sum(t.nbytes for t in rest)
    sane = 0 < n < 1 << 31 and 0 < k < 1 << 31 and 1 <= bits <= 8 and 0 < group < 1 << 31
    if not sane or 8 * codes.elements != n * -(-k // group) * group * bits:
        raise JoulesmithError(
            f"damaged tensor {quoted(codes.name)}: {codes.file}: its {codes.elements} bytes are "
            f"no {n} x {k} codes of {bits} bits: {AGAIN}"
        )
    zeros = any(t.type == "U8" for t in rest)
    kind = f"INT{bits}-G{group}" + ("-ZP" if zeros else "")
    return Logical(codes.name, (n, k), kind, n * k, stored)


def _qdq(codes: StoredTensor, rest: list[StoredTensor]) -> Logical:
    bits = codes.bits or 8
    name = f"INT{bits}" if codes.type[0] in "UI" else codes.type
    scales = rest[0].elements if rest else 1
    kind = f"{name}-tensor" if scales == 1 else f"{name}-G{max(1, codes.elements // scales)}"
    stored = codes.nbytes + sum(t.nbytes for t in rest)
    return Logical(codes.name, codes.shape, kind, codes.elements, stored)
