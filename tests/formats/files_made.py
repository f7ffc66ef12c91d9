"""Small model files of each format, made by hand from the formats' descriptions."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def safetensors(tensors: Mapping[str, tuple[str, list[int], bytes]], **meta: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": meta} if meta else {}
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": offsets}
        data += raw
    return with_header(header, data)


def with_header(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def varint(n: int) -> bytes:
    n &= (1 << 64) - 1
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def number(field: int, n: int) -> bytes:
    return varint(field << 3) + varint(n)


def chunk(field: int, raw: bytes | str) -> bytes:
    raw = raw.encode() if isinstance(raw, str) else raw
    return varint(field << 3 | 2) + varint(len(raw)) + raw


def tensor(
    name: str, kind: int, dims: Sequence[int], raw: bytes | None = None, **ext: str
) -> bytes:
    out = b"".join(number(1, d) for d in dims) + number(2, kind) + chunk(8, name)
    if raw is not None:
        out += chunk(9, raw)
    for key, value in ext.items():
        out += chunk(13, chunk(1, key) + chunk(2, value))
    return out + (number(14, 1) if ext else b"")


def node(op: str, inputs: Sequence[str], outputs: Sequence[str] = ("y",), **ints: int) -> bytes:
    out = b"".join(chunk(1, i) for i in inputs) + b"".join(chunk(2, o) for o in outputs)
    out += chunk(4, op)
    return out + b"".join(chunk(5, chunk(1, k) + number(3, v)) for k, v in ints.items())


def onnx(tensors: Sequence[bytes] = (), nodes: Sequence[bytes] = (), more: bytes = b"") -> bytes:
    graph = b"".join(chunk(1, n) for n in nodes) + chunk(2, "g")
    graph += b"".join(chunk(5, t) for t in tensors) + more
    return number(1, 10) + chunk(2, "hand") + chunk(7, graph) + chunk(8, number(2, 18))


def layer(i: int, kind: str, data: str = "", name: str | None = None) -> str:
    return f'<layer id="{i}" name="{name or f"n{i}"}" type="{kind}">{data}</layer>'


def constant(i: int, kind: str, shape: str, offset: int, n: int) -> str:
    place = f'element_type="{kind}" shape="{shape}" offset="{offset}" size="{n}"'
    return layer(i, "Const", f"<data {place}/>")


def ir(layers: Sequence[str], edges: Sequence[tuple[int, int]] = (), head: str = "") -> bytes:
    lines = "".join(f'<edge from-layer="{a}" to-layer="{b}"/>' for a, b in edges)
    body = f"<layers>{''.join(layers)}</layers><edges>{lines}</edges>"
    return f'<?xml version="1.0"?>{head}<net name="m" version="11">{body}</net>'.encode()


def write_ir(folder: Path, xml: bytes, weights: bytes | None = b"") -> Path:
    path = folder / "openvino_model.xml"
    path.write_bytes(xml)
    if weights is not None:
        path.with_suffix(".bin").write_bytes(weights)
    return path


def llama2c(dim: int = 8, inner: int = 12, layers: int = 2, vocabulary: int = 10) -> bytes:
    heads, kv, context = 2, 1, 16
    head = struct.pack("<7i", dim, inner, layers, heads, kv, vocabulary, context)
    n = abs(vocabulary) * dim + dim + context * (dim // heads)
    n += layers * (2 * dim + 2 * dim * dim + 2 * dim * dim * kv // heads + 3 * dim * inner)
    return head + bytes(4 * (n + (abs(vocabulary) * dim if vocabulary < 0 else 0)))
