"""A layer cut anew for the inputs that the compressed model really has.

Layers before this one have changed, so its inputs x' are not the inputs x on which it was
calibrated. The factors with the least ``E ||R (W t - A B x')||^2`` are those of a reduced-rank
regression (Izenman 1975): the unrestricted least-squares solution, cut in the metric of
x'. The target ``W t`` lies between the dense model's outputs (t = x), which undoes the errors
of earlier layers as MPIFA does (Zhao et al. 2025, section 4), and the layer's own (t = x'),
which has no noise of that to fit. SVD-LLM's update (Wang et al. 2024, section 3.3) solves
for A alone.

Tensors in, tensors out; float64 inside. Knows no models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from joulesmith.compress.lowrank.svd import check_matrix
from joulesmith.compress.lowrank.weighted import Spectrum, decompose, root
from joulesmith.errors import JoulesmithError

RIDGE = 1e-3
"""Share of the mean diagonal that is added to both moments: where inputs hardly vary, the
layer is then pulled towards its own weights and not towards noise."""
MIX = 0.5
"""Share of the dense model's inputs in the target; measured best of 0, 0.5 and 1."""


class Cross:
    """Streams ``E[x' x'^T]`` and ``E[x x'^T]`` of one layer, float64.

    gram, cross: (columns, columns), sums until read; tokens: how many are in them.
    """

    def __init__(self, columns: int) -> None:
        self.gram = torch.zeros(columns, columns, dtype=torch.float64)
        self.cross = torch.zeros_like(self.gram)
        self.tokens = 0

    def add(self, dense: Tensor, thin: Tensor) -> None:
        """dense, thin: (tokens, columns) inputs of the layer in both models."""
        # products in the inputs' own precision, sums over batches in double
        self.gram += thin.T @ thin
        self.cross += dense.T @ thin
        self.tokens += len(thin)


def refit(
    w: Tensor,
    gram: Tensor,
    cross: Tensor,
    outputs: Tensor | None = None,
    *,
    mix: float = MIX,
    ridge: float = RIDGE,
) -> Spectrum:
    """w (rows, columns) -> the `Spectrum` whose cuts are the best factors for the new inputs.

    gram E[x' x'^T] and cross E[x x'^T]: (columns, columns), in the same unit. outputs: root
    of G as `decompose` takes it. mix: as `MIX`, 0 to 1. Where nothing comes in, the
    weights themselves are cut. Raises `JoulesmithError` for shapes that do not belong together
    and settings that cannot be.
    """
    t = check_matrix(w)
    n = t.shape[1]
    if tuple(gram.shape) != (n, n) or tuple(cross.shape) != (n, n):
        raise JoulesmithError(
            f"moments {tuple(gram.shape)} and {tuple(cross.shape)} do not belong to weights of "
            f"{n} columns"
        )
    if not 0 <= mix <= 1 or ridge < 0:
        raise JoulesmithError(f"a mix of {mix} and a ridge of {ridge} cannot be")
    c, d = check_matrix(gram, "moment matrix"), check_matrix(cross, "moment matrix")
    if float(c.diagonal().sum()) <= 0:
        return decompose(t, None, outputs)
    lower = root(c, ridge=ridge)
    damped = lower @ lower.T
    target = mix * (d + damped - (c + c.T) / 2) + (1 - mix) * damped
    # target @ c^-1, c symmetric
    solution = t @ torch.cholesky_solve(target.T, lower).T
    return decompose(solution, lower, outputs)
