"""Writes a Hugging Face folder with quantized layers, as vLLM and `transformers` load it.

One of three formats of the compressed-tensors library (`compressed_schemes`), a
``quantization_config`` in config.json, and the tokenizer. Everything that is not quantized
is float16: the scales are, and what is written must be what was judged. Knows no
calibration and no search.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from joulesmith.atomic import atomic_folder
from joulesmith.compress.quantize.activations import InputQuantizer
from joulesmith.compress.quantize.grids import Bytes
from joulesmith.errors import JoulesmithError
from joulesmith.export.compressed_schemes import (
    Packed,
    check,
    loadable,
    scheme_of,
    tensors_of,
    words,
)

if TYPE_CHECKING:
    from joulesmith.models import Model

__all__ = ["loadable", "words", "write_compressed"]


def write_compressed(
    model: Model,
    packed: Mapping[str, tuple[str, Bytes]],
    folder: str | os.PathLike[str],
    *,
    inputs: Mapping[str, InputQuantizer] | None = None,
) -> int:
    """Write ``model`` with these matrices packed; returns the bytes of the weights.

    packed: GGUF name -> (name of an `IntGrid` or `FloatGrid`, packed rows in GGUF's order), of
    matrices inside decoder blocks, and of a head that is not the embedding; the rest of the model
    is written as it is. inputs: the same
    names -> what rounds the layer's inputs; none for weight-only types. folder: absent or
    empty; complete or not at all. Raises `JoulesmithError`, before anything is written,
    for a matrix, a type or a mixture that engines cannot load, and for weights beyond float16.
    """
    from safetensors.torch import save_file

    from joulesmith.models import check_dense, write_tokenizer_of

    check_dense(model)
    rounded = inputs or {}
    if stray := sorted(set(rounded) - set(packed)):
        raise JoulesmithError(f"{stray[0]} has rounded inputs but no packed weights")
    layers = {
        model.ref(name).parameter: _layer(model, name, *p, rounded.get(name))
        for name, p in packed.items()
    }
    formats = sorted({p.format for p in layers.values()})
    if len(formats) > 1:
        raise JoulesmithError(
            f"one folder holds one format, not {' and '.join(formats)}: round all inputs or none"
        )
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.module.named_parameters():
        if name in layers:
            stem = name.removesuffix("weight")
            tensors.update({stem + part: t for part, t in tensors_of(layers[name]).items()})
            continue
        half = parameter.detach().to("cpu", torch.float16)
        if not bool(torch.isfinite(half).all()):
            raise JoulesmithError(f"{name} is beyond float16, which this format is written in")
        tensors[name] = half.contiguous()
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    config = _config(model, layers, formats[0] if formats else "pack-quantized")
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


def _layer(
    model: Model, name: str, kind: str, packed: Bytes, inputs: InputQuantizer | None
) -> Packed:
    """One matrix in torch's row order, proven to be loadable."""
    ref, g = model.ref(name), loadable(kind)
    if g is None:
        raise JoulesmithError(
            f"{name} is {kind}: engines load packed integers of 4 and 8 bits (INT4-G128, "
            "INT8-G64-ZP ...)"
        )
    if ref.role == "token_embd":
        raise JoulesmithError(f"{name} is the embedding: engines keep it in float16")
    order = np.argsort(ref.rows) if ref.rows is not None else np.arange(ref.shape[0])
    found = Packed(g, packed[order], (ref.shape[0], ref.shape[1]), inputs)
    check(name, found)
    return found


def _config(model: Model, layers: Mapping[str, Packed], form: str) -> dict[str, Any]:
    """config.json: the model's own, and how its layers are quantized."""
    schemes: dict[str, dict[str, Any]] = {}
    targets: dict[str, list[str]] = {}
    for parameter, p in layers.items():
        scheme = scheme_of(p)
        key = json.dumps(scheme, sort_keys=True)
        schemes[key] = scheme
        targets.setdefault(key, []).append(parameter.removesuffix(".weight"))
    linear = {name for name, m in model.module.named_modules() if isinstance(m, torch.nn.Linear)}
    groups = {
        # One scheme for all: by class, as engines that fuse layers like it best.
        f"group_{i}": {"targets": ["Linear"] if len(schemes) == 1 else sorted(targets[key])} | s
        for i, (key, s) in enumerate(schemes.items())
    }
    packed = {p.removesuffix(".weight") for p in layers}
    config: dict[str, Any] = model.module.config.to_dict()
    config.pop("torch_dtype", None)
    config |= {
        "architectures": [type(model.module).__name__],
        "dtype": "float16",
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted(linear - packed),
        },
    }
    return config
