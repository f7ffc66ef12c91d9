"""Writes low-rank corrections as LoRA adapters: a PEFT folder, or a GGUF file for llama.cpp.

A quantized base with the factors that absorb its error (`compress.lowrank.residual`) then
runs in unmodified engines, without code of ours: `transformers` with PEFT and vLLM load the
folder beside their base, llama.cpp loads the file with ``--lora``. The scale is 1 for
every matrix, whatever its rank. Knows no calibration and no rounding.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from joulesmith.atomic import atomic_folder
from joulesmith.compress.quantize.grids import grid
from joulesmith.errors import JoulesmithError
from joulesmith.export.gguf import TensorEntry, write_gguf
from joulesmith.gguf_file import MetaValue

if TYPE_CHECKING:
    from joulesmith.models import Model

Pair = tuple[Tensor, Tensor]
"""outer (rows, rank) with rows in GGUF's order, and inner (rank, columns)."""

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def write_peft(
    model: Model,
    pairs: Mapping[str, Pair],
    folder: str | os.PathLike[str],
    *,
    base: str = "",
    dtype: torch.dtype = torch.float16,
) -> int:
    """Write a PEFT adapter folder; returns the bytes of its weights.

    pairs: GGUF tensor name -> factors that are added to that matrix. base: what
    ``base_model_name_or_path`` says. folder: absent or empty; complete or not at all.
    Raises `JoulesmithError`, before anything is written, for tensors that the model has
    not, shapes that do not belong to them, and values beyond ``dtype``.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, (outer, inner) in _checked(model, pairs).items():
        ref = model.ref(name)
        module = ref.parameter.removesuffix(".weight")
        if ref.rows is not None:
            outer = torch.empty_like(outer).index_copy_(0, torch.from_numpy(ref.rows), outer)
        ranks[module] = outer.shape[1]
        for part, t in (("lora_A", inner), ("lora_B", outer)):
            stored = t.to(dtype).contiguous()
            if not bool(torch.isfinite(stored).all()):
                raise JoulesmithError(f"{name}: factors beyond {dtype}: write them in float32")
            tensors[f"{_PREFIX}{module}.{part}.weight"] = stored
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    with atomic_folder(folder, needed=size + (1 << 20)) as temp:
        save_file(tensors, temp / _WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(_peft_config(model, ranks, base), indent=2, sort_keys=True)
        (temp / _CONFIG).write_text(text + "\n", "utf-8")
    return size


def _peft_config(model: Model, ranks: Mapping[str, int], base: str) -> dict[str, Any]:
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT takes these keys for regular expressions, and scales by alpha / rank.
    other = {re.escape(n): r for n, r in ranks.items() if r != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": _targets(model, ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _targets(model: Model, ranks: Mapping[str, int]) -> list[str]:
    """Short names ("up_proj") where all modules so called are meant; engines like them best."""
    linear = [
        r.parameter.removesuffix(".weight") for r in model.matrices() if r.role != "token_embd"
    ]
    leaves = {n.rpartition(".")[2] for n in ranks}
    if {n for n in linear if n.rpartition(".")[2] in leaves} == set(ranks):
        return sorted(leaves)
    return sorted(ranks)


def write_gguf_lora(
    model: Model,
    pairs: Mapping[str, Pair],
    path: str | os.PathLike[str],
    *,
    type: str = "F16",
) -> int:
    """Write a GGUF adapter that llama.cpp loads with ``--lora``; returns the file's bytes.

    pairs: as `write_peft`. type: of both factors, "F32", "F16" or "Q8_0". The key alpha is
    0, which llama.cpp reads as "scale 1, whatever the rank". Raises `JoulesmithError` as
    `write_peft`, and for ranks that do not cut into blocks of ``type``.
    """
    store = grid(type)
    entries: list[TensorEntry] = []
    for name, (outer, inner) in _checked(model, pairs).items():
        if model.ref(name).layer is None:
            raise JoulesmithError(f"{name}: adapters of matrices inside the blocks only")
        for part, t in (("lora_a", inner), ("lora_b", outer)):
            packed = store.pack(t.float().contiguous())
            entries.append(
                (f"{name}.{part}", store.name, tuple(t.shape), np.ascontiguousarray(packed))
            )
    metadata = {
        "general.architecture": MetaValue.string(model.architecture),
        "general.type": MetaValue.string("adapter"),
        "general.name": MetaValue.string(f"{model.name} correction"),
        "adapter.type": MetaValue.string("lora"),
        "adapter.lora.alpha": MetaValue.f32(0.0),
    }
    return write_gguf(path, metadata, entries)


def _checked(model: Model, pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    if not pairs:
        raise JoulesmithError("an adapter needs at least one matrix")
    for name, (outer, inner) in pairs.items():
        rows, columns = model.ref(name).shape
        ok = outer.ndim == inner.ndim == 2 and outer.shape[1] == inner.shape[0] > 0
        if not ok or (outer.shape[0], inner.shape[1]) != (rows, columns):
            raise JoulesmithError(
                f"{name}: factors {tuple(outer.shape)} and {tuple(inner.shape)} do not belong to "
                f"a {rows} x {columns} matrix"
            )
        if not bool(torch.isfinite(outer).all() and torch.isfinite(inner).all()):
            raise JoulesmithError(f"{name}: the factors hold NaN or infinity")
    return dict(pairs)
