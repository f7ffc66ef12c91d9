"""Quantize a model's blocks with a small factor for each matrix that absorbs its error.

One streamed pass; the model is left as it is. The packed matrices go to any exporter of
quantized models, the factors to `export.lora`. Knows models; not file formats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from joulesmith.calibrate import calibrate
from joulesmith.compress.lowrank.residual import Residual, absorb
from joulesmith.compress.lowrank.walk import Metric, factorable, roots
from joulesmith.compress.quantize.gptq import Curvature
from joulesmith.compress.quantize.grids import Bytes, Format, grid
from joulesmith.compress.quantize.rounding import round_weight, shared_curvature
from joulesmith.errors import JoulesmithError
from joulesmith.moments import Moments
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    from joulesmith.models import Model, TensorRef


def absorb_model(
    model: Model,
    windows: NDArray[np.int32],
    types: Callable[[TensorRef], str],
    ranks: Callable[[TensorRef], int],
    *,
    effort: str = "default",
    metric: Metric = "fisher",
    sweeps: int = 1,
    factor_type: str = "F16",
    seed: int = 0,
    progress: Tick = silent,
) -> dict[str, Residual]:
    """GGUF tensor name -> `Residual`, rows in GGUF's order, of every matrix in the blocks.

    windows: int32 (n, length) of calibration tokens. types: the block type of a matrix.
    ranks: of its factor, at least 1. effort: of rounding, as `rounding.EFFORTS`. metric: in
    which the factors are best. sweeps, factor_type: as `residual.absorb`.
    Raises `JoulesmithError` for types and ranks that do not fit, before any work is done.
    """
    shapes = factorable(model)
    refs = {r.parameter.removesuffix(".weight"): r for r in model.matrices() if r.layer is not None}
    for name, (rows, columns) in shapes.items():
        grid(types(refs[name])).row_bytes(columns)
        rank = ranks(refs[name])
        if not 1 <= rank <= min(rows, columns):
            raise JoulesmithError(f"rank {rank} of {refs[name].name}: 1 to {min(rows, columns)}")
        for length in (rows, columns):
            grid(factor_type).row_bytes(length)
    out: dict[str, Residual] = {}

    def visit(index: int, moments: Mapping[str, Moments]) -> None:
        for inner, m in moments.items():
            name = next((n for n in shapes if n.endswith(f".{index}.{inner}")), None)
            if name is None:
                continue
            ref = refs[name]
            kind, curve = grid(types(ref)), shared_curvature(m, effort)
            inputs, outputs = roots(m, metric)
            found = absorb(
                model.module.get_submodule(name).weight,
                partial(_rounded, curve=curve, kind=kind, effort=effort),
                kind,
                ranks(ref),
                inputs=inputs,
                outputs=outputs,
                sweeps=sweeps,
                factor_type=factor_type,
            )
            if ref.rows is not None:  # rows are rounded apart, so they may be put in order after
                order = torch.from_numpy(ref.rows)
                packed = np.ascontiguousarray(found.packed[ref.rows])
                found = replace(found, packed=packed, outer=found.outer[order])
            out[ref.name] = found

    calibrate(
        model.module, windows, visit, seed=seed, outputs=metric == "fisher", progress=progress
    )
    return out


def _rounded(w: torch.Tensor, curve: Curvature | None, kind: Format, effort: str) -> Bytes:
    return round_weight(w, curve, kind, effort=effort)
