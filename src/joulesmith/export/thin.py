"""Models with layers kept as two thin ones: a folder of safetensors, written and read.

No engine loads such layers without code of its own, so the folder must not look as if one
could: its ``model_type`` is ours and its weights have a name of their own, which makes
`transformers` refuse it instead of filling the missing matrices with noise. The model's own
config is inside config.json under ``joulesmith``. Knows no calibration.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from joulesmith.architectures import TensorRef
from joulesmith.atomic import atomic_folder
from joulesmith.compress.lowrank.factors import Factors
from joulesmith.compress.lowrank.thin import ThinLinear, place
from joulesmith.errors import JoulesmithError

if TYPE_CHECKING:
    from joulesmith.models import Model

MODEL_TYPE = "joulesmith_lowrank"
WEIGHTS = "lowrank.safetensors"
_AGAIN = "write the model again"


def write_thin(model: Model, folder: str | os.PathLike[str]) -> int:
    """Write a model whose layers may be `ThinLinear`; returns the bytes of its weights.

    folder: absent or empty; complete or not at all. Raises `JoulesmithError` for a full
    disk or a folder in use.
    """
    from safetensors.torch import save_file

    from joulesmith.models import write_tokenizer_of

    layers: dict[str, dict[str, Any]] = {}
    tensors = {n: p.detach().cpu().contiguous() for n, p in model.module.named_parameters()}
    for name, module in model.module.named_modules():
        if isinstance(module, ThinLinear):
            layers[name] = {"rank": module.rank, "pivoted": module.order is not None}
            if module.order is not None:
                tensors[f"{name}.order"] = module.order.to("cpu", torch.int32)
    config = {
        "model_type": MODEL_TYPE,
        "joulesmith": {
            "lowrank": 1,
            "config": json.loads(model.module.config.to_json_string(use_diff=False)),
            "layers": layers,
        },
    }
    size: int = sum(t.numel() * t.element_size() for t in tensors.values())
    with atomic_folder(folder, needed=size + (1 << 24)) as temp:
        try:
            save_file(tensors, temp / WEIGHTS, metadata={"format": "pt"})
        except Exception as e:
            if type(e).__name__ == "SafetensorError":
                raise JoulesmithError(f"cannot write weights: {folder}: {e}") from e
            raise
        (temp / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        write_tokenizer_of(model, temp)
    return size


def load_thin(folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> Model:
    """Read a folder of `write_thin`. The peak of memory is the dense model.

    Raises `JoulesmithError` in one line for a folder of another kind, damaged files,
    shapes or orders of columns that cannot be, and NaN.
    """
    from safetensors import SafetensorError, safe_open

    from joulesmith import models
    from joulesmith.architectures import GGUF_NAME, check_config, hyperparameters, rope_factors
    from joulesmith.vocab_folder import tokenizer_of_folder
    from joulesmith.weights import build

    at = Path(folder)
    config, layers = _read_config(at)
    check_config(config, at)
    try:
        with safe_open(str(at / WEIGHTS), framework="pt") as handle:
            shelf = _ThinShelf(handle, layers, at)
            module, refs = build(config, shelf, dtype, at)
            for name, (rank, pivoted) in layers.items():
                place(module, name, shelf.factors(name, rank, pivoted), keep=True)
    except (SafetensorError, OSError) as e:
        raise JoulesmithError(f"damaged weights: {at / WEIGHTS}: {e}: {_AGAIN}") from e
    tokenizer, keys = tokenizer_of_folder(at, config)
    name = at.resolve().name
    factors = rope_factors(config)
    return models.Model(
        name,
        module,
        tokenizer,
        GGUF_NAME[config.model_type],
        sum(p.numel() for p in module.parameters()),
        f"{name}, low rank, from the folder {at}",
        at,
        None,
        {**hyperparameters(config, name), **keys},
        dict(refs),
        {} if factors is None else {"rope_freqs.weight": factors},
    )


def _read_config(at: Path) -> tuple[Any, dict[str, tuple[int, bool]]]:
    from joulesmith.vocab_folder import read_config, read_json

    ours = read_json(at / "config.json").get("joulesmith")
    if not isinstance(ours, dict) or ours.get("lowrank") != 1:
        raise JoulesmithError(f"not a low-rank model of joulesmith: {at}")
    given, inside = ours.get("layers"), ours.get("config")
    if not isinstance(given, dict) or not isinstance(inside, dict):
        raise JoulesmithError(f"damaged config.json: {at}: {_AGAIN}")
    layers: dict[str, tuple[int, bool]] = {}
    for name, layer in given.items():
        rank = layer.get("rank") if isinstance(layer, dict) else None
        pivoted = layer.get("pivoted") if isinstance(layer, dict) else None
        if not isinstance(rank, int) or not isinstance(pivoted, bool) or rank < 1:
            raise JoulesmithError(f"layer {name[:80]!r} has no rank: {at}: {_AGAIN}")
        layers[name] = (rank, pivoted)
    with tempfile.TemporaryDirectory(prefix="config-") as temp:
        (Path(temp) / "config.json").write_text(json.dumps(inside), "utf-8")
        try:
            return read_config(Path(temp)), layers
        except JoulesmithError as e:
            raise JoulesmithError(str(e).replace(temp, str(at))) from e


class _ThinShelf:
    """A `weights.Shelf` in which thin layers look dense; they are put in place afterwards."""

    def __init__(self, handle: Any, layers: Mapping[str, tuple[int, bool]], at: Path) -> None:
        self.handle, self.layers, self.at = handle, layers, at
        self.keys = set(handle.keys())

    def _shape(self, key: str) -> tuple[int, ...] | None:
        return tuple(self.handle.get_slice(key).get_shape()) if key in self.keys else None

    def _parts(self, name: str) -> list[str]:
        pivoted = self.layers[name][1]
        return [f"{name}.{p}" for p in ("outer", "inner", *(("order",) if pivoted else ()))]

    def shape(self, ref: TensorRef) -> tuple[int, ...] | None:
        name = ref.parameter.removesuffix(".weight")
        if name not in self.layers or name == ref.parameter:
            return self._shape(ref.parameter)
        rank, pivoted = self.layers[name]
        rows, columns = ref.shape if len(ref.shape) == 2 else (0, 0)
        wanted = [(rows, rank), (rank, columns - rank if pivoted else columns), (columns,)]
        for part, shape in zip(self._parts(name), wanted, strict=False):
            if self._shape(part) != shape:
                raise JoulesmithError(
                    f"tensor {part} has shape {self._shape(part)}, not {shape}: {self.at}: {_AGAIN}"
                )
        return ref.shape

    def read(self, ref: TensorRef) -> torch.Tensor:
        name = ref.parameter.removesuffix(".weight")
        if name in self.layers and name != ref.parameter:
            return torch.zeros(ref.shape)  # its place is taken by the factors
        t: torch.Tensor = self.handle.get_tensor(ref.parameter)
        if not t.is_floating_point():
            raise JoulesmithError(f"tensor {ref.parameter} has type {t.dtype}: {self.at}: {_AGAIN}")
        return t

    def unused(self, refs: Mapping[str, TensorRef]) -> list[str]:
        parameters = {r.parameter for r in refs.values()}
        thin = {n for n in self.layers if f"{n}.weight" in parameters}
        if strange := sorted(set(self.layers) - thin):
            return strange
        known = parameters - {f"{n}.weight" for n in thin}
        return sorted(self.keys - known - {p for n in thin for p in self._parts(n)})

    def factors(self, name: str, rank: int, pivoted: bool) -> Factors:
        """One layer's, checked."""
        outer, inner = (self.handle.get_tensor(f"{name}.{p}") for p in ("outer", "inner"))
        for t in (outer, inner):
            if not t.is_floating_point() or not bool(torch.isfinite(t).all()):
                raise JoulesmithError(f"layer {name} holds NaN or no floats: {self.at}: {_AGAIN}")
        order = None
        if pivoted:
            order = self.handle.get_tensor(f"{name}.order").long()
            if not torch.equal(order.sort().values, torch.arange(len(order))):
                raise JoulesmithError(f"{name}.order is no order of columns: {self.at}: {_AGAIN}")
        return Factors(outer, inner, order)
