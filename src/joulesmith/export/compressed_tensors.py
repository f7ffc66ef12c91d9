"""Writes a Hugging Face folder with packed integer weights, as vLLM and `transformers` load it.

Format "pack-quantized" of the compressed-tensors library: for each linear layer
``weight_packed`` (int32 words, codes from the low bits up), ``weight_scale``,
``weight_zero_point`` (packed along the rows, where there are zeros), ``weight_shape``,
and a ``quantization_config`` in config.json. Everything else is float16: the scales are,
and what is written must be what was judged. Knows no calibration and no search.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from joulesmith.atomic import atomic_folder
from joulesmith.compress.quantize.grids import Bytes, grid
from joulesmith.compress.quantize.integers import IntGrid, pack_codes
from joulesmith.errors import JoulesmithError

if TYPE_CHECKING:
    from joulesmith.models import Model

ENGINE_BITS = (4, 8)
"""Widths whose packing all engines share, and for which they have kernels."""


def write_compressed(
    model: Model,
    packed: Mapping[str, tuple[str, Bytes]],
    folder: str | os.PathLike[str],
) -> int:
    """Write ``model`` with these matrices packed; returns the bytes of the weights.

    packed: GGUF name -> (name of an `IntGrid`, packed rows in GGUF's order), of matrices
    inside decoder blocks; the rest of the model is written as it is. folder: absent or
    empty; complete or not at all. Raises `JoulesmithError`, before anything is written,
    for a matrix or a type that engines cannot load, and for weights beyond float16.
    """
    from safetensors.torch import save_file

    from joulesmith.models import check_dense, write_tokenizer_of

    check_dense(model)
    layers = {model.ref(name).parameter: _layer(model, name, *p) for name, p in packed.items()}
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.module.named_parameters():
        if name in layers:
            g, found = layers[name]
            tensors.update({f"{name}_{part}": t for part, t in _parts(g, *found).items()})
            continue
        half = parameter.detach().to("cpu", torch.float16)
        if not bool(torch.isfinite(half).all()):
            raise JoulesmithError(f"{name} is beyond float16, which this format is written in")
        tensors[name] = half.contiguous()
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    config = _config(model, {name: g for name, (g, _) in layers.items()})
    with atomic_folder(folder, needed=size + (1 << 24)) as temp:
        try:
            save_file(tensors, temp / "model.safetensors", metadata={"format": "pt"})
        except Exception as e:
            if type(e).__name__ == "SafetensorError":
                raise JoulesmithError(f"cannot write weights: {folder}: {e}") from e
            raise
        (temp / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if getattr(model.module, "generation_config", None) is not None:
            model.module.generation_config.save_pretrained(temp)
        write_tokenizer_of(model, temp)
    return size


def loadable(kind: str) -> IntGrid | None:
    """The grid of that name where engines have kernels for it, else None."""
    g = grid(kind)
    return g if isinstance(g, IntGrid) and g.bits in ENGINE_BITS else None


def _layer(
    model: Model, name: str, kind: str, packed: Bytes
) -> tuple[IntGrid, tuple[NDArray[np.uint8], Tensor, Tensor | None]]:
    """-> the grid; codes, steps and zeros in torch's row order."""
    ref, g = model.ref(name), loadable(kind)
    if g is None:
        raise JoulesmithError(
            f"{name} is {kind}: engines load packed integers of 4 and 8 bits (INT4-G128, "
            "INT8-G64-ZP ...)"
        )
    if ref.layer is None:
        raise JoulesmithError(f"{name} is not inside a block: engines keep it in float16")
    codes, lattice = g.read(packed, ref.shape[1])
    order = np.argsort(ref.rows) if ref.rows is not None else np.arange(ref.shape[0])
    zero = None if g.symmetric else lattice.stored[1][order]
    return g, (codes.numpy()[order], lattice.step[order], zero)


def _parts(
    g: IntGrid, codes: NDArray[np.uint8], step: Tensor, zero: Tensor | None
) -> dict[str, Tensor]:
    parts = {
        "packed": words(codes, g.bits),
        "scale": step.to(torch.float16).contiguous(),
        "shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if zero is not None:
        rows = words(np.ascontiguousarray(zero.numpy().astype(np.uint8).T), g.bits)
        parts["zero_point"] = rows.T.contiguous()
    return parts


def words(codes: NDArray[np.uint8], bits: int) -> Tensor:
    """(rows, n) codes -> (rows, ceil(n bits / 32)) int32, from the low bits up."""
    n = -(-codes.shape[1] * bits // 32) * 32 // bits
    wide = np.zeros((codes.shape[0], n), np.uint8)
    wide[:, : codes.shape[1]] = codes
    raw = np.ascontiguousarray(pack_codes(wide, bits))
    return torch.from_numpy(raw.view("<i4").astype(np.int32))


def _config(model: Model, grids: Mapping[str, IntGrid]) -> dict[str, Any]:
    """config.json: the model's own, and how its weights are packed."""
    by_name: dict[str, list[str]] = {}
    for parameter, g in grids.items():
        by_name.setdefault(g.name, []).append(parameter.removesuffix(".weight"))
    kinds = {g.name: g for g in grids.values()}
    linear = {name for name, m in model.module.named_modules() if isinstance(m, torch.nn.Linear)}
    groups = {}
    for i, (name, modules) in enumerate(by_name.items()):
        g = kinds[name]
        weights = {
            "num_bits": g.bits,
            "type": "int",
            "symmetric": g.symmetric,
            "strategy": "group",
            "group_size": g.group,
            "dynamic": False,
        }
        # One scheme for all: by class, as engines that fuse layers like it best.
        targets = ["Linear"] if len(by_name) == 1 else sorted(modules)
        groups[f"group_{i}"] = {
            "targets": targets,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
    packed = {p.removesuffix(".weight") for p in grids}
    config: dict[str, Any] = model.module.config.to_dict()
    config.pop("torch_dtype", None)
    config |= {
        "architectures": [type(model.module).__name__],
        "dtype": "float16",
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted(linear - packed),
        },
    }
    return config
