"""The outer factor once more, on the inputs that the compressed model really has.

Layers before this one have changed, so its inputs x' are not the inputs x on which it was
cut. With the inner factor B held, ``min_A E ||W x - A B x'||^2`` is linear least squares:
the closed form of SVD-LLM's update (Wang et al. 2024, section 3.3), with the dense model's
outputs as the target, as MPIFA has it (Zhao et al. 2025, section 4).

Tensors in, tensors out; float64 inside. Knows no models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from joulesmith.compress.lowrank.svd import check_matrix
from joulesmith.errors import JoulesmithError

RIDGE = 1e-3
"""Share of the mean diagonal that is added to both moments: where inputs hardly vary, the
layer is then pulled towards its own weights and not towards noise."""


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


def refit_left(
    w: Tensor, right: Tensor, gram: Tensor, cross: Tensor, *, ridge: float = RIDGE
) -> Tensor:
    """The A that makes ``E ||W x - A B x'||^2`` least: (rows, rank), float64.

    w (rows, columns); right B (rank, columns); gram E[x' x'^T] and cross E[x x'^T], both
    (columns, columns) and in the same unit. Directions of B that no input reaches are
    kept out of the answer. Raises `JoulesmithError` for shapes that do not belong together.
    """
    t, b = check_matrix(w), check_matrix(right, "right factor")
    n = t.shape[1]
    if b.shape[1] != n or tuple(gram.shape) != (n, n) or tuple(cross.shape) != (n, n):
        raise JoulesmithError(
            f"moments {tuple(gram.shape)}, {tuple(cross.shape)} and a factor {tuple(b.shape)} do "
            f"not belong to weights of {n} columns"
        )
    c, d = check_matrix(gram, "moment matrix"), check_matrix(cross, "moment matrix")
    extra = max(ridge, 1e-12) * float(c.diagonal().mean())
    if extra <= 0:  # no input at all: nothing to fit
        extra = 1.0
    eye = torch.eye(n, dtype=t.dtype)
    c, d = c + extra * eye, d + extra * eye
    normal = b @ c @ b.T
    wanted = t @ d @ b.T
    # normal may be singular where B has dependent rows: the least-norm solution then
    solution: Tensor = torch.linalg.lstsq(normal, wanted.T, driver="gelsd").solution
    return solution.T
