"""Pruned models in few bytes: a folder of safetensors, written and read.

Each matrix is stored in whichever layout takes least (`compress.sparse`): dense, a bitmask,
coded gaps, N:M or blocks, with float values or the codes of an integer grid. No engine loads
such layouts (vLLM, transformers and compressed-tensors dropped theirs in March to June 2026),
so, as with `export.thin`, ``model_type`` and the file's name are ours: `transformers` refuses
the folder instead of filling matrices with noise. Knows no calibration.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from joulesmith.architectures import TensorRef
from joulesmith.atomic import atomic_folder
from joulesmith.compress.quantize.grids import Bytes
from joulesmith.compress.quantize.integers import by_name
from joulesmith.compress.sparse.tensor import (
    FLOATS,
    SparseTensor,
    least_kind,
    pack,
    pack_codes,
    unpack,
)
from joulesmith.compress.sparse.tensor import check as check_tensor
from joulesmith.errors import JoulesmithError
from joulesmith.formats.sparse_layout import MODEL_TYPE, PARTS, TYPES, WEIGHTS

if TYPE_CHECKING:
    from joulesmith.models import Model

_AGAIN = "write the model again"
_PLAIN = ("dense", True)


@dataclass(frozen=True)
class SparseBytes:
    """What one tensor takes. nonzero: share of its weights that are not zero. bytes: places,
    values, scales and all. dense: bytes of the same type without a sparse layout."""

    name: str
    layout: str
    kind: str
    nonzero: float
    bytes: int
    dense: int


def write_sparse(
    model: Model,
    folder: str | os.PathLike[str],
    packed: Mapping[str, tuple[str, Bytes]] | None = None,
    *,
    kind: str | None = None,
) -> list[SparseBytes]:
    """Write ``model`` with its zeros left out; returns what each tensor took.

    folder: absent or empty; complete or not at all. packed: GGUF name -> (name of an
    `IntGrid`, packed rows in GGUF's order) of matrices that are quantized as well. kind: of all
    other weights, "F16", "BF16" or "F32"; None: for each the smallest that is exact. The
    model stays as it is; memory is taken for the packed model and one dense matrix. Raises
    `JoulesmithError` for types that are no integer grid, weights that ``kind`` does not hold
    exactly, a full disk or a folder in use.
    """
    from safetensors.torch import save_file

    from joulesmith.models import check_dense, write_tokenizer_of

    check_dense(model)
    if kind is not None and kind not in FLOATS:
        raise JoulesmithError(f"unknown float type {kind[:20]!r}: give F16, BF16 or F32")
    given = {_parameter(model, n): (n, *p) for n, p in (packed or {}).items()}
    matrices: dict[str, dict[str, Any]] = {}
    tensors: dict[str, torch.Tensor] = {}
    sizes = []
    for name, parameter in model.module.named_parameters():
        weight = parameter.detach()
        if weight.dim() != 2:
            stored = kind or least_kind(weight)
            narrow = weight.to("cpu", FLOATS[stored]).contiguous()
            if not torch.equal(narrow.to(weight.dtype), weight.cpu()):
                raise JoulesmithError(f"{name}: weights that {stored} does not hold exactly")
            tensors[name] = narrow
            continue
        try:
            found = _quantized(model, *given[name]) if name in given else pack(weight, kind=kind)
        except JoulesmithError as e:
            raise JoulesmithError(f"{name}: {e}") from e
        for part in PARTS:
            if (array := getattr(found, part)) is not None:
                tensors[f"{name}.{part}"] = torch.from_numpy(array)
        matrices[name] = {"layout": found.layout, "kind": found.kind, "shape": list(weight.shape)}
        sizes.append(_size(name, found))
    config = {
        "model_type": MODEL_TYPE,
        "joulesmith": {
            "sparse": 1,
            "config": json.loads(model.module.config.to_json_string(use_diff=False)),
            "matrices": matrices,
        },
    }
    total: int = sum(t.numel() * t.element_size() for t in tensors.values())
    with atomic_folder(folder, needed=total + (1 << 24)) as temp:
        try:
            save_file(tensors, temp / WEIGHTS, metadata={"format": "pt"})
        except Exception as e:
            if type(e).__name__ == "SafetensorError":
                raise JoulesmithError(f"cannot write weights: {folder}: {e}") from e
            raise
        (temp / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        write_tokenizer_of(model, temp)
    return sizes


def _parameter(model: Model, name: str) -> str:
    ref = model.ref(name)
    if ref.name == "output.weight" and model.tied:
        raise JoulesmithError("output.weight is tied to the embedding: it has no type of its own")
    return ref.parameter


def _quantized(model: Model, name: str, kind: str, rows: Bytes) -> SparseTensor:
    ref, grid = model.ref(name), by_name(kind)
    if grid is None:
        raise JoulesmithError(f"{kind} is no integer grid: give INT4-G64, TERNARY-G64 ...")
    if len(rows) != ref.shape[0]:
        raise JoulesmithError(f"{ref.shape[0]} rows, not {len(rows)}")
    return pack_codes(grid, rows if ref.rows is None else rows[np.argsort(ref.rows)], ref.shape[1])


def _size(name: str, p: SparseTensor) -> SparseBytes:
    n = p.rows * p.columns
    bits = 8 * FLOATS[p.kind].itemsize if p.grid is None else p.grid.bits_per_weight
    return SparseBytes(name, p.layout, p.kind, p.stored / max(1, n), p.nbytes, int(n * bits // 8))


def load_sparse(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    packed: bool = False,
    native: bool = False,
) -> Model:
    """Read a folder of `write_sparse`. The peak of memory is the model and one tensor.

    dtype: of the weights in memory. packed: keep matrices packed, but for those stored as
    dense floats: for inference only and far slower (`engines.sparse_store`); else the model
    is as dense as any other. native: with ``packed``, run them on a C kernel where one can be
    built (`engines.sparse_native`). Raises `JoulesmithError` in one line for a folder of
    another kind, damaged files, and NaN.
    """
    from safetensors import SafetensorError, safe_open

    from joulesmith import models
    from joulesmith.architectures import GGUF_NAME, check_config, hyperparameters, rope_factors
    from joulesmith.formats.safetensors_file import read_safetensors
    from joulesmith.vocab_folder import tokenizer_of_folder
    from joulesmith.weights import check_shape, fill, finish, refuse_unexpected, skeleton

    at = Path(folder)
    config, matrices = _read_config(at)
    check_config(config, at)
    read_safetensors(at / WEIGHTS)  # the library takes a name given twice
    try:
        with safe_open(str(at / WEIGHTS), framework="pt") as handle:
            shelf = _SparseShelf(handle, matrices, at)
            module, refs = skeleton(config, at)
            count = sum(p.numel() for p in module.parameters())
            for ref in refs.values():
                check_shape(ref, shelf.shape(ref), at)
            refuse_unexpected(shelf.unused(refs), at)
            # dense floats have nothing to gain by staying packed
            kept = {p for p, (form, kind) in matrices.items() if (form, kind in FLOATS) != _PLAIN}
            stay = {n: r for n, r in refs.items() if packed and r.parameter in kept}
            fill(module, {n: r for n, r in refs.items() if n not in stay}, shelf.read, dtype, at)
            for ref in stay.values():
                _swap(module, ref.parameter, shelf, native=native)
    except (SafetensorError, OSError) as e:
        raise JoulesmithError(f"damaged weights: {at / WEIGHTS}: {e}: {_AGAIN}") from e
    _finish(module, dtype, finish, packed=packed)
    tokenizer, keys = tokenizer_of_folder(at, config)
    name = at.resolve().name
    factors = rope_factors(config)
    return models.Model(
        name,
        module,
        tokenizer,
        GGUF_NAME[config.model_type],
        count,
        f"{name}, sparse, from the folder {at}",
        at,
        None,
        {**hyperparameters(config, name), **keys},
        {n: r for n, r in refs.items() if n not in stay},
        {} if factors is None else {"rope_freqs.weight": factors},
    )


def _swap(module: Any, parameter: str, shelf: _SparseShelf, *, native: bool) -> None:
    """A packed module in the place of the matrix, and of the head that is tied to it."""
    from joulesmith.engines.packed import sharing, swap
    from joulesmith.engines.sparse_store import SparseStore, fastest

    weight = module.get_parameter(parameter)
    store = shelf.told(parameter, fastest if native else SparseStore)
    for name in sorted({parameter, *sharing(module, weight)}):
        swap(module, name, store)


def _finish(module: Any, dtype: torch.dtype, finish: Any, *, packed: bool) -> None:
    from joulesmith.engines.packed import PackedEmbedding

    finish(module, dtype)
    for part in module.modules():
        if isinstance(part, PackedEmbedding):
            part.like = torch.empty(0, dtype=dtype)
    if packed:
        for parameter in module.parameters():
            parameter.requires_grad_(False)


def _read_config(at: Path) -> tuple[Any, dict[str, tuple[str, str]]]:
    """The model's own config, and (layout, kind) of each matrix."""
    from joulesmith.vocab_folder import read_config, read_json

    ours = read_json(at / "config.json").get("joulesmith")
    if not isinstance(ours, dict) or ours.get("sparse") != 1:
        raise JoulesmithError(f"not a sparse model of joulesmith: {at}")
    given, inside = ours.get("matrices"), ours.get("config")
    if not isinstance(given, dict) or not isinstance(inside, dict):
        raise JoulesmithError(f"damaged config.json: {at}: {_AGAIN}")
    matrices: dict[str, tuple[str, str]] = {}
    for name, entry in given.items():
        layout = entry.get("layout") if isinstance(entry, dict) else None
        kind = entry.get("kind") if isinstance(entry, dict) else None
        if not isinstance(layout, str) or not isinstance(kind, str):
            raise JoulesmithError(f"matrix {name[:80]!r} has no layout: {at}: {_AGAIN}")
        matrices[name] = (layout, kind)
    with tempfile.TemporaryDirectory(prefix="config-") as temp:
        (Path(temp) / "config.json").write_text(json.dumps(inside), "utf-8")
        try:
            return read_config(Path(temp)), matrices
        except JoulesmithError as e:
            raise JoulesmithError(str(e).replace(temp, str(at))) from e


class _SparseShelf:
    """A `weights.Shelf` in which packed matrices look dense; each is unpacked as it is read."""

    def __init__(self, handle: Any, matrices: Mapping[str, tuple[str, str]], at: Path) -> None:
        self.handle, self.matrices, self.at = handle, matrices, at
        self.keys = set(handle.keys())
        self.refs: dict[str, TensorRef] = {}

    def shape(self, ref: TensorRef) -> tuple[int, ...] | None:
        self.refs[ref.parameter] = ref
        if ref.parameter not in self.matrices or len(ref.shape) != 2:
            if ref.parameter not in self.keys:
                return None
            return tuple(self.handle.get_slice(ref.parameter).get_shape())
        for part in PARTS:
            key = f"{ref.parameter}.{part}"
            if key not in self.keys:
                if part in PARTS[:3]:
                    return None
                continue
            found = self.handle.get_slice(key)
            if found.get_dtype() != TYPES[part] or len(found.get_shape()) != (
                1 if part in ("places", "values") else 2
            ):
                raise JoulesmithError(
                    f"tensor {key} is {found.get_dtype()} {found.get_shape()}: {self.at}: {_AGAIN}"
                )
        return ref.shape

    def read(self, ref: TensorRef) -> torch.Tensor:
        if ref.parameter in self.matrices:
            found: torch.Tensor = self.told(ref.parameter, unpack)
            return found
        t: torch.Tensor = self.handle.get_tensor(ref.parameter)
        if not t.is_floating_point():
            raise JoulesmithError(f"tensor {ref.parameter} has type {t.dtype}: {self.at}: {_AGAIN}")
        return t

    def told(self, parameter: str, use: Any) -> Any:
        """``use`` of a packed matrix; what it finds wrong is told with name and folder."""
        rows, columns = self.refs[parameter].shape
        parts = {
            part: self.handle.get_tensor(f"{parameter}.{part}").numpy()
            for part in PARTS
            if f"{parameter}.{part}" in self.keys
        }
        try:
            found = SparseTensor(rows, columns, *self.matrices[parameter], **parts)
            check_tensor(found)
            return use(found)
        except JoulesmithError as e:
            raise JoulesmithError(f"damaged {parameter}: {e}: {self.at}: {_AGAIN}") from e

    def unused(self, refs: Mapping[str, TensorRef]) -> list[str]:
        known = {r.parameter for r in refs.values()}
        if strange := sorted(set(self.matrices) - known):
            return strange
        parts = {f"{name}.{part}" for name in self.matrices for part in PARTS}
        return sorted(self.keys - parts - (known - set(self.matrices)))
