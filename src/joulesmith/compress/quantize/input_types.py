"""The types that round inputs as well as weights, and which layers of a static type cannot be.

A static scale is predicted to cost little and may cost much all the same, since the few tokens
that a prediction is made from lack the ones that stand out. So predictions only say which
inputs are worst; how many of them keep a scale by token is measured, by the KL divergence of
the whole model on calibration windows that no range was chosen on.

Knows models, calibration's histograms and smoothing's predictions; no files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from joulesmith.compress.quantize.activations import (
    InputQuantizer,
    Method,
    Scheme,
    observe,
    quantized_inputs,
    static_quantizer,
)
from joulesmith.compress.quantize.histograms import Histogram
from joulesmith.compress.quantize.sites import INPUTS
from joulesmith.compress.quantize.tune import last_hidden
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    import torch

    from joulesmith.architectures import TensorRef
    from joulesmith.models import Model

SCHEMES: Mapping[str, Scheme] = {
    "W8A8": Scheme("int8", symmetric=False),
    "W8A8-STATIC": Scheme("int8", dynamic=False, symmetric=False),
    "FP8": Scheme("fp8"),
}
"""Types by name: weights of the same kind with one scale a row.

Integers have zero points: on SmolLM2-135M they halve the KL that rounding inputs costs."""

ALLOWANCE = 0.0015
"""Nats a token that all static scales of a model together may cost above scales by token."""
HELD_OUT = 4
"""One calibration window of so many measures what the others' ranges cost."""
ROWS = 128
"""Tokens whose logits stand at a time."""


def row_type(scheme: Scheme, columns: int) -> str:
    """The grid of weights that goes with rounded inputs: one scale a row."""
    return f"{'FP8' if scheme.kind == 'fp8' else 'INT8'}-G{columns}"


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
    groups = _groups(model)
    static = [g for g in groups if g[0] not in by_token]
    found = _seen(model, windows, static, progress)
    dynamic = InputQuantizer(Scheme(scheme.kind, symmetric=scheme.symmetric))
    out = {name: dynamic for group in groups for name in group}
    for group in static:
        quantizer = static_quantizer(found[group[0]], scheme, method)
        out |= dict.fromkeys(group, quantizer)
    return out


def bounded_inputs(
    model: Model,
    windows: NDArray[np.int32],
    scheme: Scheme,
    excess: Mapping[str, float],
    *,
    allowance: float = ALLOWANCE,
    methods: Sequence[Method] = ("mse", "absmax"),
    progress: Tick = silent,
) -> dict[str, InputQuantizer]:
    """`static_inputs` with as few scales by token as keep within ``allowance``.

    model: with its rounded weights. windows: (n, length); one of `HELD_OUT` of them measures,
    the others fix ranges (a single window does both). excess: a module of each group that
    shares an input -> predicted cost of its static scale, which orders them; groups that are
    not named come last. methods: ways to choose ranges; the one that loses least with the
    worst eighth of the inputs by token serves all. Least squares clips, which a few tokens that
    all others attend to may not bear. Allowed is the KL divergence, in nats a token, to the
    model with whole inputs, above that of scales by token everywhere.
    """
    held = np.zeros(len(windows), bool)
    held[HELD_OUT - 1 :: HELD_OUT] = True
    if not held.any():
        held[-1] = len(windows) > 1
    fitted, measured = (windows[~held], windows[held]) if held.any() else (windows, windows)
    seen = _seen(model, fitted, _groups(model), lambda s: progress(0.5 * s))
    dynamic = InputQuantizer(Scheme(scheme.kind, symmetric=scheme.symmetric))
    groups = _groups(model)

    def cost(group: list[str]) -> float:
        return max((excess[n] for n in group if n in excess), default=0.0)

    groups.sort(key=cost, reverse=True)

    static = {
        (g[0], method): static_quantizer(seen[g[0]], scheme, method)
        for g in groups
        for method in methods
    }

    def chosen(n: int, method: Method) -> dict[str, InputQuantizer]:
        found = dict.fromkeys((name for group in groups for name in group), dynamic)
        for group in groups[n:]:
            found |= dict.fromkeys(group, static[group[0], method])
        return found

    whole = last_hidden(model, measured)

    def lost(n: int, method: Method) -> float:
        return _divergence(model, measured, whole, chosen(n, method))

    least = lost(len(groups), methods[0])
    best = min(methods, key=lambda m: lost(len(groups) // 8, m)) if len(methods) > 1 else methods[0]
    steps = 0

    def within(n: int) -> bool:
        nonlocal steps
        steps += 1
        progress(0.5 + 0.5 * (1 - 0.7**steps))
        return lost(n, best) - least <= allowance

    return chosen(fewest(len(groups), within), best)


def _groups(model: Model) -> list[list[str]]:
    """Modules inside blocks, those together that share an input."""
    blocks = len(model.module.model.layers)
    return [
        [f"model.layers.{i}.{name}" for name in group] for i in range(blocks) for group in INPUTS
    ]


def _seen(
    model: Model, windows: NDArray[np.int32], groups: Sequence[Sequence[str]], progress: Tick
) -> dict[str, Histogram]:
    """What the first module of each group reads."""
    import torch

    ids = torch.from_numpy(np.ascontiguousarray(windows)).long()
    batches = [ids[i : i + 4] for i in range(0, len(ids), 4)]
    return observe(model.module, [g[0] for g in groups], batches, progress)


def fewest(most: int, within: Callable[[int], bool]) -> int:
    """The least n of 0..most for which ``within`` holds, where it holds for all above it too.

    ``within(most)`` is taken for granted. Small n are tried first.
    """
    low, high = -1, 0  # it does not hold for low, and perhaps for high
    while high < most and not within(high):
        low, high = high, max(1, 2 * high)
    high = min(high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if within(middle) else (middle, high)
    return high


def _divergence(
    model: Model,
    windows: NDArray[np.int32],
    whole: torch.Tensor,
    quantizers: Mapping[str, InputQuantizer],
) -> float:
    """Mean KL, nats a token, of rounded inputs to whole ones; whole: `last_hidden` of those."""
    import torch

    head, total = model.module.lm_head, 0.0
    with quantized_inputs(model.module, quantizers), torch.no_grad():
        for window, known in zip(windows, whole, strict=True):
            hidden = last_hidden(model, window[None])[0]
            for start in range(0, len(hidden), ROWS):
                cut = slice(start, start + ROWS)
                p, q = (torch.log_softmax(head(h[cut]), dim=-1) for h in (known, hidden))
                total += float((p.exp() * (p - q)).sum())
    return total / whole.shape[0] / whole.shape[1]


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
