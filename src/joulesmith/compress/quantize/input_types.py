"""The types that round inputs as well as weights, and which layers of a static type cannot be.

Knows models, calibration's histograms and smoothing's predictions; no files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from joulesmith.compress.quantize.activations import (
    InputQuantizer,
    Method,
    Scheme,
    observe,
    static_quantizer,
)
from joulesmith.compress.quantize.sites import INPUTS
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    from joulesmith.architectures import TensorRef
    from joulesmith.models import Model

SCHEMES: Mapping[str, Scheme] = {
    "W8A8": Scheme("int8", symmetric=False),
    "W8A8-STATIC": Scheme("int8", dynamic=False, symmetric=False),
    "FP8": Scheme("fp8"),
}
"""Types by name: weights of the same kind with one scale a row.

Integers have zero points: on SmolLM2-135M they halve the KL that rounding inputs costs."""

ALLOWANCE = 0.002
"""Nats a token that all static scales of a model together may cost above scales by token."""


def row_type(scheme: Scheme, columns: int) -> str:
    """The grid of weights that goes with rounded inputs: one scale a row."""
    return f"{'FP8' if scheme.kind == 'fp8' else 'INT8'}-G{columns}"


def too_wide(excess: Mapping[str, float], allowance: float = ALLOWANCE) -> set[str]:
    """Which inputs need a scale by token, worst first, until the rest stay within ``allowance``.

    excess: input -> predicted nats that a static scale costs above one by token.
    """
    left = sum(max(0.0, e) for e in excess.values())
    chosen: set[str] = set()
    for name in sorted(excess, key=lambda n: (-excess[n], n)):
        if left <= allowance:
            break
        left -= max(0.0, excess[name])
        chosen.add(name)
    return chosen


def static_inputs(
    model: Model,
    windows: NDArray[np.int32],
    scheme: Scheme,
    by_token: Sequence[str] = (),
    method: Method = "mse",
    progress: Tick = silent,
) -> dict[str, InputQuantizer]:
    """Quantizers of all layers inside blocks from one pass over ``windows`` (n, length).

    by_token: modules that keep a scale by token. Keys are dotted module names. Layers that
    share an input share its scale.
    """
    import torch

    blocks = len(model.module.model.layers)
    groups = [
        [f"model.layers.{i}.{name}" for name in group] for i in range(blocks) for group in INPUTS
    ]
    static = [g for g in groups if g[0] not in by_token]
    seen = {g[0]: None for g in static}
    ids = torch.from_numpy(np.ascontiguousarray(windows)).long()
    found = observe(
        model.module, list(seen), [ids[i : i + 4] for i in range(0, len(ids), 4)], progress
    )
    dynamic = InputQuantizer(Scheme(scheme.kind, symmetric=scheme.symmetric))
    out = {name: dynamic for group in groups for name in group}
    for group in static:
        quantizer = static_quantizer(found[group[0]], scheme, method)
        out |= dict.fromkeys(group, quantizer)
    return out


def module_of(ref: TensorRef) -> str:
    """The dotted name of the linear layer that holds a matrix."""
    return ref.parameter.removesuffix(".weight")


def words(scheme: Scheme, by_token: int = 0) -> str:
    """A scheme in words."""
    kind = "FP8 (E4M3)" if scheme.kind == "fp8" else "int8"
    if not scheme.symmetric:
        kind += " with zero points"
    if scheme.dynamic:
        return f"{kind}, a scale by token"
    return f"{kind}, static scales" + (f", {by_token} layers by token" if by_token else "")
