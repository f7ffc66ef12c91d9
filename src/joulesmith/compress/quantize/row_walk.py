"""Walk a model once: smooth each block, then round its matrices with one scale a row.

For types whose inputs are rounded too. As `walk` does, the last block comes first, as soon as
calibration has its moments; a block is smoothed when nothing needs its old weights any more.
Codes come from error feedback at eight bits as well: of FP8's error the weights make more
than half, and feedback halves that. Knows models and rounding; not what is done with the
packed tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from joulesmith.calibrate import calibrate
from joulesmith.compress.quantize.activations import Scheme
from joulesmith.compress.quantize.gptq import curvature, gptq
from joulesmith.compress.quantize.grids import grid
from joulesmith.compress.quantize.input_types import row_type
from joulesmith.compress.quantize.sites import folds_of
from joulesmith.compress.quantize.smooth import BEARABLE
from joulesmith.compress.quantize.smooth_step import Smoothed, smooth_block
from joulesmith.compress.quantize.walk import Rounded
from joulesmith.moments import Moments
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    import torch

    from joulesmith.models import Model, TensorRef

SWEEPS = 1
"""Passes of coordinate descent after the feedback pass."""


def walk_rows(
    model: Model,
    windows: NDArray[np.int32],
    scheme: Scheme,
    emit: Callable[[str, list[Rounded]], None],
    *,
    smooth: bool,
    keep: Callable[[int, Smoothed], None],
    known: Callable[[int], Smoothed | None] = lambda _: None,
    skip: Callable[[Sequence[str]], bool] = lambda _: False,
    seed: int = 0,
    scratch: Path | None = None,
    progress: Tick = silent,
) -> None:
    """Calibrate on ``windows`` (n, length), smooth the blocks in place, round their matrices.

    keep: called with a block's number and what smoothing did to it, before ``emit`` is called
    with the block's name and its rounded tensors. known: what an interrupted run kept of a
    block; it is folded instead of searched. skip: whether a block, given its tensor names, is
    rounded already. The module keeps its float weights, smoothed.
    """
    layers: dict[int, dict[str, TensorRef]] = {}
    for ref in model.matrices():
        if ref.layer is not None:
            layers.setdefault(ref.layer, {})[ref.parameter] = ref
    if all(skip([r.name for r in refs.values()]) for refs in layers.values()):
        for index in layers if smooth else ():
            _again(model, index, known(index))
        return

    def visit(index: int, moments: Mapping[str, Moments]) -> None:
        refs = layers.get(index, {})
        if smooth:
            done = known(index)
            if done is None:
                done, moments = smooth_at(model, index, moments, scheme)
                keep(index, done)
            else:
                _again(model, index, done)
                moments = moved(
                    moments, model.module.model.layers[index], model.module.config, done
                )
        if not skip([r.name for r in refs.values()]):
            emit(str(index), round_at(model, index, refs.values(), moments, scheme))

    calibrate(model.module, windows, visit, seed=seed, scratch=scratch, progress=progress)


def smooth_at(
    model: Model, index: int, moments: Mapping[str, Moments], scheme: Scheme
) -> tuple[Smoothed, dict[str, Moments]]:
    """Smooth one block in place; what was done, and its moments as they are now."""
    block, config = model.module.model.layers[index], model.module.config
    done = smooth_block(
        block, config, moments, scheme.kind, scheme.dynamic, scheme.symmetric, BEARABLE
    )
    return done, moved(moments, block, config, done)


def round_at(
    model: Model,
    index: int,
    refs: Iterable[TensorRef],
    moments: Mapping[str, Moments],
    scheme: Scheme,
) -> list[Rounded]:
    """One block's matrices, rounded; the module keeps its float weights."""
    return [_round(model, ref, index, moments, scheme) for ref in refs]


def _again(model: Model, index: int, done: Smoothed | None) -> None:
    """Fold what was found before."""
    from joulesmith.compress.quantize.fold import scale_channels

    block = model.module.model.layers[index]
    for fold in folds_of(block, model.module.config):
        if done is not None and (scale := done.scales.get(fold.producer)) is not None:
            scale_channels(block, fold, 1 / scale.double())


def moved(
    moments: Mapping[str, Moments], block: torch.nn.Module, config: object, done: Smoothed
) -> dict[str, Moments]:
    """The moments of a block's layers as they are after smoothing.

    Inputs divided by s have second moments divided by s s^T; outputs divided by s have
    gradients multiplied by s; how tokens are weighted against each other stays.
    """
    out = dict(moments)
    for fold in folds_of(block, config):
        scale = done.scales.get(fold.producer)
        if scale is None:
            continue
        columns = fold.columns(scale)
        for name in fold.consumers:
            if (m := out.get(name)) is not None:
                sample = None if m.sample is None else replace(m.sample, x=m.sample.x / columns)
                out[name] = replace(
                    m,
                    hessian=m.hessian / columns[:, None] / columns,
                    squares=m.squares / columns.square(),
                    ends=None if m.ends is None else m.ends / columns,
                    sample=sample,
                )
        if (m := out.get(fold.producer)) is not None:  # a linear layer, not a norm
            sample = m.sample
            if sample is not None and sample.g is not None:
                sample = replace(sample, g=sample.g * scale)
            out[fold.producer] = replace(m, fisher=m.fisher * scale.square(), sample=sample)
    return out


def _round(
    model: Model, ref: TensorRef, index: int, moments: Mapping[str, Moments], scheme: Scheme
) -> Rounded:
    import torch

    from joulesmith.models import gguf_view

    weight = gguf_view(model, ref.name)
    name = ref.parameter.split(f".{index}.", 1)[-1].removesuffix(".weight")
    m = moments.get(name)
    g = grid(row_type(scheme, weight.shape[1]))
    if m is None:
        return Rounded(ref, g, g.pack(weight), weight, None, None)
    if ref.rows is not None:  # moments follow torch's row order, the file another one
        order = torch.from_numpy(ref.rows)
        sample = m.sample
        if sample is not None and sample.g is not None:
            sample = replace(sample, g=sample.g[:, order])
        m = replace(m, fisher=m.fisher[order], sample=sample)
    packed = gptq(weight, curvature(m.hessian), g, sweeps=SWEEPS)
    return Rounded(ref, g, packed, weight, m, None)
