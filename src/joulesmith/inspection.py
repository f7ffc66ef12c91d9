"""What a GGUF file holds, in figures. Knows headers only; reads no weights."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from joulesmith.gguf_file import GgufFile


@dataclass(frozen=True)
class TypeShare:
    """All tensors of one type: how many, their weights, their bytes."""

    type: str
    tensors: int
    weights: int
    bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class TensorLine:
    """One tensor as stored."""

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """A model file in figures; None where the header does not say."""

    path: str
    file_bytes: int
    architecture: str
    name: str | None
    parameters: int
    bits_per_weight: float
    layers: int | None
    hidden: int | None
    heads: int | None
    kv_heads: int | None
    context: int | None
    vocabulary: int | None
    tied_head: bool
    made_by: str | None
    types: tuple[TypeShare, ...]
    tensors: tuple[TensorLine, ...]


def summarize(file: GgufFile) -> Inspection:
    """Count types, weights and bytes of a parsed file."""

    def value(key: str) -> object:
        found = file.metadata.get(key)
        return None if found is None else found.value

    def number(key: str) -> int | None:
        found = value(f"{architecture}.{key}")
        return int(found) if isinstance(found, int) else None

    architecture = str(value("general.architecture") or "unknown")
    groups: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for t in file.tensors:
        row = groups[t.type]
        row[0] += 1
        row[1] += int(np.prod(t.shape))
        row[2] += t.nbytes
    weights = sum(g[1] for g in groups.values())
    stored = sum(g[2] for g in groups.values())
    tokens = value("tokenizer.ggml.tokens")
    made_by = value("joulesmith.version")
    name = value("general.name")
    return Inspection(
        path=str(file.path),
        file_bytes=file.path.stat().st_size,
        architecture=architecture,
        name=None if name is None else str(name),
        parameters=weights,
        bits_per_weight=8 * stored / weights if weights else 0.0,
        layers=number("block_count"),
        hidden=number("embedding_length"),
        heads=number("attention.head_count"),
        kv_heads=number("attention.head_count_kv"),
        context=number("context_length"),
        vocabulary=len(tokens) if isinstance(tokens, list) else None,
        tied_head=all(t.name != "output.weight" for t in file.tensors),
        made_by=None if made_by is None else f"joulesmith {made_by}",
        types=tuple(
            TypeShare(k, n, w, b, 8 * b / w if w else 0.0)
            for k, (n, w, b) in sorted(groups.items(), key=lambda i: -i[1][2])
        ),
        tensors=tuple(TensorLine(t.name, tuple(t.shape), t.type, t.nbytes) for t in file.tensors),
    )
