"""AWQ: factors of input channels that protect the weights which large inputs meet.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization", equations 4 and 5:

    s = mean|X|^alpha,   alpha = argmin || Q(W diag(s)) diag(1/s) X - W X ||

The paper rounds to nearest with the grid's plain scales and takes the error on some
tokens; here scales are those that `Grid.fit` searches, and the error is that of all
calibration tokens, through their second moments. `fold` moves the factors into the layer
before, so that nothing is added to the model.

Tensors in, tensors out. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from joulesmith.compress.quantize.grids import Grid
from joulesmith.errors import JoulesmithError

ALPHAS = tuple(k / 20 for k in range(1, 20))
"""As in the paper's code: 20 points of [0, 1), of which 0 is no scaling."""
REACH = 1e3
"""Factors stay within this of their geometric mean: norms may be stored in float16."""


@dataclass(frozen=True)
class Protection:
    """alpha: chosen, 0 for none. scale: (channels,) to multiply weights' columns by.

    error: ``tr(D H D^T)`` over all layers with it; before: without.
    """

    alpha: float
    scale: Tensor
    error: float
    before: float


def protect(
    hessian: Tensor,
    weights: Sequence[Tensor],
    grid: Grid,
    *,
    magnitude: Tensor | None = None,
    channels: Callable[[Tensor], Tensor] = lambda peak: peak,
    columns: Callable[[Tensor], Tensor] = lambda scale: scale,
    alphas: Sequence[float] = ALPHAS,
) -> Protection:
    """The alpha of least output error when the layers are rounded to nearest, and its factors.

    hessian: (columns, columns), E[x x^T] of the inputs that all layers read. weights: each
    (rows, columns). magnitude: (columns,) mean |x|; by default the root of the Hessian's
    diagonal, which is the same up to the shape of the distribution. channels, columns:
    from columns to producer channels and back (`Fold`'s methods of these names).
    Raises `JoulesmithError` for moments that are not finite or do not fit the weights.
    """
    h = hessian.detach().float()
    if not bool(torch.isfinite(h).all()):
        raise JoulesmithError("the Hessian holds NaN or infinity: check the calibration")
    if any(w.shape[1] != len(h) for w in weights):
        raise JoulesmithError(f"a Hessian of {len(h)} columns does not belong to these weights")
    size = h.diagonal().clamp(min=0).sqrt() if magnitude is None else magnitude.detach().float()
    size = channels(size)
    diagonal = h.diagonal().clamp(min=0)

    def error(scale: Tensor | None) -> float:
        s = None if scale is None else columns(scale)
        total = 0.0
        for w in weights:
            moved = w.detach().float() if s is None else w.detach().float() * s
            importance = diagonal if s is None else diagonal / s.square()
            bound = grid.bind(moved, importance)
            back = torch.as_tensor(bound.unpack(bound.pack(moved, importance), len(h)))
            d = (back - moved) if s is None else (back - moved) / s
            total += float(((d @ h) * d).sum())
        return total

    before = error(None)
    best = Protection(0.0, torch.ones_like(size), before, before)
    for alpha in alphas:
        scale = protecting_scale(size, alpha)
        found = error(scale)
        if found < best.error:
            best = Protection(alpha, scale, found, before)
    return best


def protecting_scale(magnitude: Tensor, alpha: float) -> Tensor:
    """Equation 5: mean magnitudes (channels,) -> factors (channels,), geometric mean 1.

    Channels without input keep a factor of 1. Raises `JoulesmithError` for an alpha outside
    0..1.
    """
    if not 0 <= alpha <= 1:
        raise JoulesmithError(f"alpha is between 0 and 1, not {alpha:g}")
    alive = magnitude > 0
    log = torch.where(alive, alpha * magnitude.double().clamp_min(1e-300).log(), 0.0)
    log = torch.where(alive, log - log[alive].mean() if bool(alive.any()) else log, 0.0)
    bound = torch.tensor(REACH, dtype=torch.float64).log()
    return log.clamp(-bound, bound).exp().float()
