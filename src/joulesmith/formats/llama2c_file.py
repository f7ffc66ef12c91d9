"""Reads the header of a llama2.c checkpoint: seven int32, then float32 weights.

Format: https://github.com/karpathy/llama2.c (export.py, "legacy"). There is no magic
number: a file is one only where its size is exactly what the seven numbers ask for.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from joulesmith.formats.files import StoredTensor, regular_size


@dataclass(frozen=True)
class Llama2c:
    """The header. tied: the head is the embedding."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    tied: bool


_LIMITS = (1 << 17, 1 << 19, 1 << 12, 1 << 12, 1 << 12, 1 << 23, 1 << 24)


def read_llama2c(path: Path) -> tuple[Llama2c, list[StoredTensor]] | None:
    """Header and tensors; None where the file is of another kind."""
    length = regular_size(path)
    with path.open("rb") as f:
        raw = f.read(28)
    if len(raw) < 28:
        return None
    *numbers, vocabulary, context = struct.unpack("<7i", raw)
    given = (*numbers, abs(vocabulary), context)
    if any(not 0 < n <= most for n, most in zip(given, _LIMITS, strict=True)):
        return None
    dim, inner, layers, heads, kv_heads = numbers
    if dim % heads or heads % kv_heads or (dim // heads) % 2:
        return None
    h = Llama2c(dim, inner, layers, heads, kv_heads, abs(vocabulary), context, vocabulary > 0)
    tensors, at = [], 28
    for name, shape in _layout(h):
        count = 1
        for d in shape:
            count *= d
        tensors.append(StoredTensor(name, shape, "F32", 32, path, at, 4 * count))
        at += 4 * count
    return (h, tensors) if at == length else None


def _layout(h: Llama2c) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes in file order; a tensor holds all layers."""
    n, width = h.layers, h.hidden // h.heads
    kv = h.kv_heads * width
    out: list[tuple[str, tuple[int, ...]]] = [
        ("tok_embeddings", (h.vocabulary, h.hidden)),
        ("attention_norm", (n, h.hidden)),
        ("wq", (n, h.hidden, h.hidden)),
        ("wk", (n, kv, h.hidden)),
        ("wv", (n, kv, h.hidden)),
        ("wo", (n, h.hidden, h.hidden)),
        ("ffn_norm", (n, h.hidden)),
        ("w1", (n, h.intermediate, h.hidden)),
        ("w2", (n, h.hidden, h.intermediate)),
        ("w3", (n, h.intermediate, h.hidden)),
        ("norm", (h.hidden,)),
        ("freq_cis_real", (h.context, width // 2)),
        ("freq_cis_imag", (h.context, width // 2)),
    ]
    return out if h.tied else [*out, ("output", (h.vocabulary, h.hidden))]
