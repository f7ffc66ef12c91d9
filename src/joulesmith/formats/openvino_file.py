"""Reads an OpenVINO IR: the graph's constants (.xml) and where they lie (.bin).

Format: https://docs.openvino.ai (IR version 10 and 11). The XML is streamed through
expat and only constants and edges are kept; a document type, which entity bombs and
external files need, is refused. Knows no other operation's meaning than the chain
``Convert, Subtract, Multiply`` that unpacks weights.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from joulesmith.errors import JoulesmithError
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
from joulesmith.units import size

MAX_XML = 1 << 27
MAX_NODES = 1 << 20
MAX_DEPTH = 64
_CHUNK = 1 << 16

BITS = {
    "f64": 64, "f32": 32, "f16": 16, "bf16": 16, "f8e4m3": 8, "f8e5m2": 8, "f8e8m0": 8,
    "f4e2m1": 4, "nf4": 4, "i64": 64, "i32": 32, "i16": 16, "i8": 8, "i4": 4, "u64": 64,
    "u32": 32, "u16": 16, "u8": 8, "u6": 6, "u4": 4, "u3": 3, "u2": 2, "u1": 1, "boolean": 8,
}  # fmt: skip
_FLOATS = {"f64", "f32", "f16", "bf16"}
_LOW = {"i8", "u8", "i4", "u4", "u2", "u3", "u6", "nf4", "f8e4m3", "f8e5m2", "f4e2m1"}
_WHOLE = set(BITS) - _FLOATS - _LOW
_RESHAPING = {"Convert", "Reshape", "Slice", "StridedSlice", "Squeeze", "Unsqueeze", "Transpose"}
_UNPACKING = ("Convert", "Subtract", "Multiply")


@dataclass
class Graph:
    """name: of the net. constants: tensors by layer id. kinds: operation by layer id.
    after, before: layer ids that a layer feeds, and is fed by. outer: whether the
    constants of bodies (loops, branches) were met, which are not followed."""

    name: str
    constants: dict[str, StoredTensor] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    after: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    before: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def read_openvino(path: Path) -> Graph:
    """The constants of an IR's main graph, checked against its .bin.

    Raises `JoulesmithError` (one line) for damaged XML, a document type, sizes or places
    that do not fit the .bin, and constants that overlap.
    """
    length = regular_size(path)
    if length > MAX_XML:
        raise JoulesmithError(f"absurdly large IR: {path}: {size(length)} of XML: {AGAIN}")
    weights = path.with_suffix(".bin")
    if weights.exists() or weights.is_symlink():
        weights = member(path.parent, weights.name, path)
        room = regular_size(weights)
    else:
        room = 0
    reader = _Reader(path, weights, room)
    try:
        with path.open("rb") as f:
            while chunk := f.read(_CHUNK):
                reader.parser.Parse(chunk, False)
            reader.parser.Parse(b"", True)
    except expat.ExpatError as e:
        raise reader.bad(str(e)) from e
    except OSError as e:
        raise JoulesmithError(f"cannot read: {path}: {e.strerror or e}") from e
    graph = reader.graph
    if graph is None:
        raise JoulesmithError(f"not an OpenVINO IR: {path}: no <net>")
    # equal constants are stored once
    if (twice := overlapping(graph.constants.values(), shared=True)) is not None:
        raise reader.bad(f"constant {quoted(twice)} overlaps another")
    return graph


class _Reader:
    """expat's handlers."""

    def __init__(self, path: Path, weights: Path, room: int) -> None:
        self.path, self.weights, self.room = path, weights, room
        self.graph: Graph | None = None
        self.stack: list[str] = []
        self.layer: dict[str, str] = {}
        self.edges = 0
        self.parser = expat.ParserCreate()
        self.parser.StartElementHandler = self.start
        self.parser.EndElementHandler = self.end
        self.parser.StartDoctypeDeclHandler = self.doctype

    def bad(self, why: str) -> JoulesmithError:
        return JoulesmithError(f"damaged OpenVINO IR: {self.path}: {why}: {AGAIN}")

    def doctype(self, *_: object) -> None:
        raise self.bad("a document type, which no IR has")

    def start(self, tag: str, given: dict[str, str]) -> None:
        if len(self.stack) >= MAX_DEPTH:
            raise self.bad(f"nested deeper than {MAX_DEPTH}")
        if self.graph is None:
            if tag != "net":
                raise JoulesmithError(f"not an OpenVINO IR: {self.path}: <{tag[:40]}>, no <net>")
            self.graph = Graph(given.get("name", "")[:MAX_NAME])
        self.stack.append(tag)
        if "body" in self.stack[1:] or tag not in ("layer", "data", "edge"):
            return
        getattr(self, f"_{tag}")(given)

    def end(self, _: str) -> None:
        self.stack.pop()

    def _layer(self, given: dict[str, str]) -> None:
        assert self.graph is not None
        self.layer = given
        number, kinds = given.get("id", ""), self.graph.kinds
        if not number or len(number) > 20 or number in kinds or len(kinds) >= MAX_NODES:
            raise self.bad(f"layer id {quoted(number)} is absent, absurd or appears twice")
        kinds[number] = given.get("type", "")[:80]

    def _data(self, given: dict[str, str]) -> None:
        assert self.graph is not None
        if self.layer.get("type") != "Const" or self.stack[-2:-1] != ["layer"]:
            return
        name, kind = self.layer.get("name", ""), given.get("element_type", "")
        if not name or len(name) > MAX_NAME or len(self.graph.constants) >= MAX_TENSORS:
            raise self.bad("a constant without a sane name, or too many constants")
        number = self.layer["id"]
        if number in self.graph.constants:
            raise self.bad(f"constant {quoted(name)} has two places")
        try:
            sides = [s for s in given.get("shape", "").split(",") if s.strip()]
            if len(sides) > MAX_DIMS:
                raise ValueError
            shape = tuple(_number(s) for s in sides)
            offset, n = _number(given["offset"]), _number(given["size"])
        except (KeyError, ValueError):
            raise self.bad(f"constant {quoted(name)}: shape, offset or size is wrong") from None
        bits = BITS.get(kind)
        if bits is None and kind != "string":
            raise self.bad(f"constant {quoted(name)} has unknown type {quoted(kind)}")
        want = n if bits is None else stored_bytes(shape, bits)
        if n and not self.weights.exists():
            raise JoulesmithError(
                f"file {self.weights.name} is missing: {self.path}: an IR is an .xml and its .bin"
            )
        if want is None or n != want or offset + n > self.room:
            raise self.bad(f"constant {quoted(name)}: its {kind} shape does not fit its place")
        self.graph.constants[number] = StoredTensor(
            name, shape, kind, bits, self.weights, offset, n
        )

    def _edge(self, given: dict[str, str]) -> None:
        assert self.graph is not None
        a, b = given.get("from-layer", ""), given.get("to-layer", "")
        self.edges += 1
        if not a or not b or max(len(a), len(b)) > 20 or self.edges > 4 * MAX_NODES:
            raise self.bad("an edge without ends, or too many edges")
        self.graph.after[a].append(b)
        self.graph.before[b].append(a)


def _number(text: str) -> int:
    """A whole number of at most 19 digits. Raises ValueError."""
    text = text.strip()
    if not (text.isascii() and text.isdecimal() and len(text) <= 19):
        raise ValueError(text)
    return int(text)


def weights_of(graph: Graph) -> list[Logical]:
    """The graph's parameters: low-bit constants with their zeros and scales counted in."""
    used: set[str] = set()
    found: list[Logical] = []
    for number, t in graph.constants.items():
        if t.type not in _LOW or number in used or not _feeds_unpacking(graph, number):
            continue
        beside, zeroed = _unpacked_with(graph, number)
        parts = [graph.constants[i] for i in beside]
        if any(p.elements > t.elements for p in parts):
            continue  # this is the zeros; their codes come by
        used |= {number, *beside}
        kind = t.type
        if parts and len(t.shape) == 3:
            kind += f"-G{t.shape[-1]}"
        elif parts:
            kind += "-channel" if parts[-1].elements > 1 else "-tensor"
        kind += "-ZP" if zeroed else ""
        shape = (t.shape[0], t.shape[1] * t.shape[2]) if len(t.shape) == 3 else t.shape
        stored = t.nbytes + sum(p.nbytes for p in parts)
        found.append(Logical(t.name, shape, kind, t.elements, stored))
    seen: set[tuple[int, int]] = set()
    for number, t in graph.constants.items():
        if number in used:
            continue
        again = (t.offset, t.nbytes) in seen  # equal constants are stored once
        seen.add((t.offset, t.nbytes))
        constant = t.type in _WHOLE or t.bits is None
        kind = f"{t.type} constants" if constant else t.type
        weights = 0 if constant or again else t.elements
        found.append(Logical(t.name, t.shape, kind, weights, 0 if again else t.nbytes))
    return sorted(found, key=lambda p: p.name)


def _feeds_unpacking(graph: Graph, number: str) -> bool:
    return any(graph.kinds.get(n) in _UNPACKING for n in graph.after.get(number, ()))


def _unpacked_with(graph: Graph, number: str) -> tuple[list[str], bool]:
    """Layer ids of the constants that the chain from ``number`` subtracts and multiplies by,
    and whether the subtracted ones differ from place to place (zero points)."""
    at, zeroed = number, False
    found: list[str] = []
    for _ in range(4):
        nexts = graph.after.get(at, [])
        if len(nexts) != 1 or graph.kinds.get(nexts[0]) not in _UNPACKING:
            break
        before, at = at, nexts[0]
        if len(graph.before.get(at, ())) > 2:
            break
        for side in graph.before.get(at, ()):
            other = number if side == before else _source(graph, side)
            if other in graph.constants and other != number:
                found.append(other)
                subtracted = graph.kinds.get(at) == "Subtract"
                zeroed |= subtracted and graph.constants[other].elements > 1
        if graph.kinds.get(at) == "Multiply":
            break
    return found, zeroed


def _source(graph: Graph, number: str) -> str:
    """The layer whose values ``number`` only casts or reshapes; itself where there is none."""
    at = number
    for _ in range(8):
        before = graph.before.get(at, [])
        if graph.kinds.get(at) not in _RESHAPING or len(before) > 6:
            break
        data = [
            i for i in before if i not in graph.constants or graph.constants[i].type not in _WHOLE
        ]
        if len(data) != 1:
            break
        at = data[0]
    return at
