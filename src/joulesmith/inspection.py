"""What a model file holds, in figures: GGUF, safetensors, a Hugging Face folder, ONNX,
OpenVINO IR, llama2.c. Knows headers only; reads no weights."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from joulesmith.errors import JoulesmithError
from joulesmith.formats import (
    llama2c_file,
    onnx_file,
    openvino_file,
    safetensors_file,
    sparse_layout,
)
from joulesmith.formats.files import StoredTensor, read_bounded_json, regular_size
from joulesmith.formats.packed import Logical, logical, place

if TYPE_CHECKING:
    from joulesmith.gguf_file import GgufFile


@dataclass(frozen=True)
class TypeShare:
    """All tensors of one type: how many, their weights, their bytes (scales and zeros
    counted). Tables that are no weights have no bits per weight."""

    type: str
    tensors: int
    weights: int
    bytes: int
    bits_per_weight: float | None


@dataclass(frozen=True)
class TensorLine:
    """One tensor as the model has it. layer: of its block; None outside blocks."""

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int
    layer: int | None = None
    role: str = ""
    bits_per_weight: float | None = None


@dataclass(frozen=True)
class DecodeCost:
    """Predicted joules per decoded token of the matrices alone: attention over what came
    before, norms and sampling come on top.

    joules: None when unknown, never 0. low, high: the meter's 90 % interval. seconds: of
    the same. pedigree: of the joules. how: what was measured, in words.
    """

    joules: float | None
    low: float | None
    high: float | None
    seconds: float | None
    pedigree: str | None
    how: str


@dataclass(frozen=True)
class Inspection:
    """A model file in figures; None where the file does not say.

    parameters: as the model has them, not as words they are packed in. bits_per_weight:
    of all stored bytes of tensors. cost: None unless it was asked for.
    """

    path: str
    file_bytes: int
    architecture: str
    name: str | None
    parameters: int
    bits_per_weight: float | None
    layers: int | None
    hidden: int | None
    heads: int | None
    kv_heads: int | None
    context: int | None
    vocabulary: int | None
    tied_head: bool | None
    made_by: str | None
    types: tuple[TypeShare, ...]
    tensors: tuple[TensorLine, ...]
    format: str = "GGUF"
    cost: DecodeCost | None = None


def inspect_model(path: str | os.PathLike[str]) -> Inspection:
    """What the model file or folder at ``path`` holds, whatever its format.

    Raises `JoulesmithError`, one line, for a file that is absent, damaged, hostile, an
    archive or a pickle (neither is opened), or of no known format.
    """
    p = Path(path)
    if p.is_dir():
        return _folder(p)
    length = regular_size(p)
    head = _head(p)
    if head[:4] == b"GGUF" or (p.suffix.lower() == ".gguf" and head):
        from joulesmith.gguf_file import read_gguf

        return summarize(read_gguf(p))
    if p.suffix.lower() == ".safetensors" or (head[8:9] == b"{" and head[6:8] == b"\0\0"):
        tensors = safetensors_file.read_safetensors(p)
        beside = p.parent / "config.json"
        config = read_bounded_json(beside) if beside.is_file() else {}
        return _safetensors(p, "safetensors", tensors, config, length)
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start[:5] == b"<?xml" or start[:4] == b"<net" or p.suffix.lower() == ".xml":
        return _openvino(p)
    if p.suffix.lower() == ".onnx":
        return _onnx(p)
    if (found := llama2c_file.read_llama2c(p)) is not None:
        return _llama2c(p, *found, length)
    raise JoulesmithError(f"{_unknown(p, head)}: {p}: {_KNOWN}")


_KNOWN = (
    "known are .gguf, .safetensors, a Hugging Face folder, .onnx, OpenVINO .xml and "
    "llama2.c checkpoints"
)


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as f:
            return f.read(64)
    except OSError as e:
        raise JoulesmithError(f"cannot read: {path}: {e.strerror or e}") from e


def _unknown(path: Path, head: bytes) -> str:
    """What a file is that is not read."""
    if not head:
        return "empty file"
    if head[:8] == b"version ":
        return "a Git LFS pointer, not the model"
    if head[:4] == b"PK\3\4":
        return "a zip archive (pickled weights or a package), which is not opened"
    if head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5":
        return "pickled weights, which can run code and are not opened"
    if head[:2] == b"\x1f\x8b" or head[:6] == b"\xfd7zXZ\0" or head[:4] == b"\x28\xb5\x2f\xfd":
        return "a compressed file, which is not unpacked"
    if path.suffix == ".bin" and path.with_suffix(".xml").is_file():
        return f"the weights of an OpenVINO IR; give {path.with_suffix('.xml').name}"
    return "not a model file that is known"


def _folder(p: Path) -> Inspection:
    config = read_bounded_json(p / "config.json") if (p / "config.json").is_file() else {}
    if any(p.glob("*.safetensors")) or (p / safetensors_file.INDEX).is_file():
        tensors = safetensors_file.read_folder(p)
        files = {t.file for t in tensors}
        total = sum(regular_size(f) for f in files)
        shards = "" if len(files) == 1 else f", {len(files)} files"
        return _safetensors(p, f"Hugging Face folder (safetensors{shards})", tensors, config, total)
    others = [*sorted(p.glob("*.onnx")), *sorted(p.glob("*.xml")), *sorted(p.glob("*.gguf"))]
    models = [f for f in others if f.stem in ("model", "openvino_model")] or others
    if len(models) == 1:
        return inspect_model(models[0])
    if models:
        names = ", ".join(f.name for f in models[:4])
        raise JoulesmithError(f"{len(models)} models in a folder: {p}: give one of {names}")
    safetensors_file.shards(p)  # says what is there instead
    raise JoulesmithError(f"no model in this folder: {p}: {_KNOWN}")


def _safetensors(
    p: Path, kind: str, tensors: list[StoredTensor], config: dict[str, Any], length: int
) -> Inspection:
    if (ours := sparse_layout.sparse_config(config)) is not None:
        inner = ours.get("config")
        parts = sparse_layout.logical(tensors, ours)
        return _filled(
            p, f"{kind}, sparse", parts, inner if isinstance(inner, dict) else {}, length
        )
    quantization = config.get("quantization_config")
    parts = logical(tensors, quantization if isinstance(quantization, dict) else None)
    found = _filled(p, kind, parts, config, length)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if isinstance(method, str):
        return replace(found, format=f"{kind}, {method[:40]}")
    return found


def _onnx(p: Path) -> Inspection:
    model = onnx_file.read_onnx(p)
    files = {p, *(t.file for t in model.tensors.values())}
    total = sum(regular_size(f) for f in files)
    kind = "ONNX" if model.opset is None else f"ONNX (opset {model.opset})"
    found = _filled(p, kind, onnx_file.weights_of(model), _beside(p), total)
    made = model.metadata.get("joulesmith.version")
    by = f"joulesmith {made}" if made else model.producer or None
    return replace(found, name=model.name or None, made_by=by)


def _openvino(p: Path) -> Inspection:
    graph = openvino_file.read_openvino(p)
    weights = p.with_suffix(".bin")
    total = regular_size(p) + (regular_size(weights) if weights.is_file() else 0)
    found = _filled(p, "OpenVINO IR", openvino_file.weights_of(graph), _beside(p), total)
    return replace(found, name=graph.name or None)


def _llama2c(
    p: Path, h: llama2c_file.Llama2c, tensors: list[StoredTensor], length: int
) -> Inspection:
    tables = ("freq_cis_real", "freq_cis_imag")
    parts = [
        Logical(
            t.name,
            t.shape,
            "F32 constants" if t.name in tables else t.type,
            0 if t.name in tables else t.elements,
            t.nbytes,
        )
        for t in tensors
    ]
    config = {
        "model_type": "llama",
        "num_hidden_layers": h.layers,
        "hidden_size": h.hidden,
        "num_attention_heads": h.heads,
        "num_key_value_heads": h.kv_heads,
        "max_position_embeddings": h.context,
        "vocab_size": h.vocabulary,
    }
    return replace(_filled(p, "llama2.c", parts, config, length), tied_head=h.tied)


def _beside(p: Path) -> dict[str, Any]:
    """config.json next to a model file, where there is one."""
    path = p.parent / "config.json"
    return read_bounded_json(path) if path.is_file() else {}


def _filled(
    p: Path, kind: str, parts: list[Logical], config: dict[str, Any], length: int
) -> Inspection:
    """Figures from parameters and a transformers config, each where it is sane."""
    inner = config.get("text_config")
    layers_of = inner if isinstance(inner, dict) else config

    def number(key: str) -> int | None:
        value = layers_of.get(key, config.get(key))
        return value if type(value) is int and 0 < value < 1 << 40 else None

    architecture = config.get("model_type")
    heads = number("num_attention_heads")
    lines = tuple(_line(q.name, q.shape, q.type, q.nbytes, q.weights) for q in parts)
    weights, stored = sum(q.weights for q in parts), sum(q.nbytes for q in parts)
    embedded = any("embed_tokens" in q.name or "wte" in q.name for q in parts)
    headed = any(q.name.endswith(("lm_head.weight", "embed_out.weight")) for q in parts)
    return Inspection(
        path=str(p),
        file_bytes=length,
        architecture=architecture[:40] if isinstance(architecture, str) else "unknown",
        name=p.resolve().name if p.is_dir() else p.stem,
        parameters=weights,
        bits_per_weight=8 * stored / weights if weights else None,
        layers=number("num_hidden_layers"),
        hidden=number("hidden_size"),
        heads=heads,
        kv_heads=number("num_key_value_heads") or heads,
        context=number("max_position_embeddings"),
        vocabulary=number("vocab_size"),
        tied_head=_tied(embedded, headed, config.get("tie_word_embeddings")),
        made_by=None,
        types=_shares((q.type, q.weights, q.nbytes) for q in parts),
        tensors=lines,
        format=kind,
    )


def _tied(embedded: bool, headed: bool, told: object) -> bool | None:
    """Whether one matrix is embedding and head: by what is stored, else by the config."""
    if embedded and headed:
        return False
    if isinstance(told, bool):
        return told
    return True if embedded else None


def _line(name: str, shape: tuple[int, ...], kind: str, n: int, weights: int) -> TensorLine:
    layer, role = place(name)
    return TensorLine(name, shape, kind, n, layer, role, 8 * n / weights if weights else None)


def _shares(parts: Iterable[tuple[str, int, int]]) -> tuple[TypeShare, ...]:
    """(type, weights, bytes) of tensors -> by type, most bytes first."""
    groups: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for kind, weights, n in parts:
        row = groups[kind]
        row[0] += 1
        row[1] += weights
        row[2] += n
    return tuple(
        TypeShare(k, n, w, b, 8 * b / w if w else None)
        for k, (n, w, b) in sorted(groups.items(), key=lambda i: -i[1][2])
    )


def summarize(file: GgufFile) -> Inspection:
    """Count types, weights and bytes of a parsed GGUF."""

    def value(key: str) -> object:
        found = file.metadata.get(key)
        return None if found is None else found.value

    def number(key: str) -> int | None:
        found = value(f"{architecture}.{key}")
        return int(found) if isinstance(found, int) else None

    architecture = str(value("general.architecture") or "unknown")
    counted = [(t, math.prod(t.shape)) for t in file.tensors]
    weights = sum(n for _, n in counted)
    stored = sum(t.nbytes for t in file.tensors)
    tokens = value("tokenizer.ggml.tokens")
    made_by = value("joulesmith.version")
    name = value("general.name")
    return Inspection(
        path=str(file.path),
        file_bytes=file.path.stat().st_size,
        architecture=architecture,
        name=None if name is None else str(name),
        parameters=weights,
        bits_per_weight=8 * stored / weights if weights else None,
        layers=number("block_count"),
        hidden=number("embedding_length"),
        heads=number("attention.head_count"),
        kv_heads=number("attention.head_count_kv"),
        context=number("context_length"),
        vocabulary=len(tokens) if isinstance(tokens, list) else None,
        tied_head=all(t.name != "output.weight" for t in file.tensors),
        made_by=None if made_by is None else f"joulesmith {made_by}",
        types=_shares((t.type, n, t.nbytes) for t, n in counted),
        tensors=tuple(_line(t.name, tuple(t.shape), t.type, t.nbytes, n) for t, n in counted),
    )
