"""Read a llama2.c checkpoint (version 0, float32) into a `transformers` Llama.

The layout is that of karpathy/llama2.c, ``export.py`` ``legacy_export``: seven int32 (dim,
hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len; a negative vocabulary says
that the head is apart), then float32 tensors kind by kind, all layers of one kind together.
Rotary pairs are neighbours there and half a head apart in `transformers`.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

HEADER = struct.Struct("<7i")


def read(path: Path, pad_to: int = 1) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """-> keyword arguments of ``LlamaConfig``, and its float32 tensors by name.

    pad_to: the MLP's width is filled up with zeros to a multiple of this, which leaves the
    model's function as it is and lets groups of columns fit. Raises `ValueError` for a file
    whose sizes do not add up.
    """
    raw = path.read_bytes()
    if len(raw) < HEADER.size:
        raise ValueError(f"{path}: too short for a llama2.c header")
    dim, hidden, layers, heads, kv_heads, signed_vocab, length = HEADER.unpack_from(raw)
    vocab, tied = abs(signed_vocab), signed_vocab > 0
    if min(dim, hidden, layers, heads, kv_heads, vocab, length) < 1 or dim % heads:
        raise ValueError(f"{path}: impossible llama2.c header")
    if heads % kv_heads or dim // heads % 2:
        raise ValueError(f"{path}: impossible number of heads")
    head = dim // heads
    kv = kv_heads * head
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("embed_tokens", (vocab, dim)),
        ("input_layernorm", (layers, dim)),
        ("self_attn.q_proj", (layers, dim, dim)),
        ("self_attn.k_proj", (layers, kv, dim)),
        ("self_attn.v_proj", (layers, kv, dim)),
        ("self_attn.o_proj", (layers, dim, dim)),
        ("post_attention_layernorm", (layers, dim)),
        ("mlp.gate_proj", (layers, hidden, dim)),
        ("mlp.down_proj", (layers, dim, hidden)),
        ("mlp.up_proj", (layers, hidden, dim)),
        ("norm", (dim,)),
        ("frequencies", (2, length, head // 2)),  # computed anew by transformers
    ]
    if not tied:
        shapes.append(("lm_head", (vocab, dim)))
    wanted = HEADER.size + 4 * sum(int(np.prod(s, dtype=np.int64)) for _, s in shapes)
    if len(raw) != wanted:
        raise ValueError(f"{path}: {len(raw)} bytes, but its header asks for {wanted}")
    found, at = {}, HEADER.size
    for name, shape in shapes:
        count = int(np.prod(shape))
        found[name] = np.frombuffer(raw, "<f4", count, at).reshape(shape).astype(np.float32)
        at += 4 * count
    del found["frequencies"]
    width = -(-hidden // pad_to) * pad_to
    tensors: dict[str, np.ndarray] = {}
    for name, array in found.items():
        if name == "lm_head":
            tensors["lm_head.weight"] = array
            continue
        if name in ("embed_tokens", "norm"):
            tensors[f"model.{name}.weight"] = array
            continue
        for i, part in enumerate(array):
            whole = part
            if name in ("mlp.gate_proj", "mlp.up_proj"):
                whole = np.pad(part, ((0, width - hidden), (0, 0)))
            elif name == "mlp.down_proj":
                whole = np.pad(part, ((0, 0), (0, width - hidden)))
            elif name in ("self_attn.q_proj", "self_attn.k_proj"):
                whole = _halves(part, head)
            tensors[f"model.layers.{i}.{name}.weight"] = np.ascontiguousarray(whole)
    config = {
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return config, tensors


def _halves(weight: np.ndarray, head: int) -> np.ndarray:
    """Rows of each head: pairs (0, 1), (2, 3) ... -> first of all pairs, then all second."""
    rows, columns = weight.shape
    pairs = weight.reshape(rows // head, head // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))
