"""The factors that change a layer's outputs least: SVD in the metric of its activations.

With x the inputs of ``y = W x`` and g the gradients of the loss at y, a change D of the
weights costs to second order ``tr(G D H D^T)``, H = E[x x^T], G = E[g g^T]: the Fisher
information of the layer as one Kronecker product. ``||R D L||_F^2`` is the same with
``H = L L^T`` and ``G = R^T R``, so truncating the SVD of ``R W L`` is the best choice
of a given rank. G = I is the whitening of SVD-LLM (Wang et al. 2024, section 3.1, theorem
3.2); a diagonal G is that of FWSVD (Hsu et al. 2022) joined to it.

Tensors in, tensors out; float64 inside. Knows no models and no parameter counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from joulesmith.compress.lowrank.svd import check_matrix, check_rank
from joulesmith.errors import JoulesmithError

RIDGE = 1e-9
"""Least share of the mean diagonal that is added: float64 rounding needs this much."""


@dataclass(frozen=True)
class Spectrum:
    """A matrix in the metric of its layer, ready to be cut at any rank.

    left (rows, k) and right (k, columns), k = min(rows, columns): ``left[:, :r] @ right[:r]``
    is the best approximation of rank r, and ``left @ right`` the matrix itself.
    energy (k,): what each rank adds, descending; the damage of rank r is ``energy[r:].sum()``.
    """

    left: Tensor
    right: Tensor
    energy: Tensor

    def cut(self, rank: int) -> tuple[Tensor, Tensor]:
        """(rows, rank) and (rank, columns). Raises `JoulesmithError` for a rank it has not."""
        check_rank(rank, self.left.shape[0], self.right.shape[1])
        return self.left[:, :rank], self.right[:rank]

    def damage(self, rank: int) -> float:
        """``tr(G D H D^T)`` of the cut at ``rank``."""
        return float(self.energy[rank:].sum())


def root(moment: Tensor, *, ridge: float = RIDGE) -> Tensor:
    """Lower L with ``L L^T = moment + ridge * mean diagonal * I``; (n, n) -> (n, n).

    The ridge is raised tenfold until the factor exists, so that moments of fewer samples
    than dimensions, or of inputs that never vary, have one too. A moment that is all zero is
    taken for the identity: nothing is known. Raises `JoulesmithError` where the matrix is
    not square, finite or a sum of squares.
    """
    m = check_matrix(moment, "moment matrix")
    if m.shape[0] != m.shape[1]:
        raise JoulesmithError(f"a moment matrix is square, not {tuple(m.shape)}")
    m = (m + m.T) / 2
    mean = float(m.diagonal().mean())
    if bool((m.diagonal() < 0).any()):
        raise JoulesmithError("a moment matrix has a negative diagonal: it is no sum of squares")
    if mean == 0:
        return torch.eye(len(m), dtype=m.dtype)
    if ridge < 0:
        raise JoulesmithError(f"a ridge must not be negative, and is {ridge}")
    ridge = max(ridge, RIDGE)
    for _ in range(10):
        damped = m.clone()
        damped.diagonal().add_(ridge * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            found: Tensor = lower
            return found
        ridge *= 10
    raise JoulesmithError("a moment matrix is far from positive semidefinite")


def decompose(w: Tensor, inputs: Tensor | None = None, outputs: Tensor | None = None) -> Spectrum:
    """w (rows, columns) in the metric of its inputs and outputs -> `Spectrum`.

    inputs: L of ``H = L L^T`` (columns, columns), as from `root`; None for the identity.
    outputs: root of G, (rows,) where G is diagonal (all above 0) or as from `root`
    (rows, rows). The right factor is ``left^+ W`` in the metric of the outputs, so no root of
    H is ever inverted: directions that calibration never showed keep the best that the left
    factor can give them. Raises `JoulesmithError` for shapes that do not belong together.
    """
    t = check_matrix(w)
    rows, columns = t.shape
    white = t
    if outputs is not None:
        if outputs.shape[0] != rows or (outputs.ndim == 1 and not bool((outputs > 0).all())):
            raise JoulesmithError(
                f"a root of {tuple(outputs.shape)}, all above 0, does not weigh {rows} rows"
            )
        outputs = outputs.double()
        white = outputs[:, None] * t if outputs.ndim == 1 else outputs.T @ t
    raw = white
    if inputs is not None:
        if tuple(inputs.shape) != (columns, columns):
            raise JoulesmithError(
                f"a root of {tuple(inputs.shape)} does not weigh {columns} columns"
            )
        white = white @ inputs.double()
    u, s, _ = torch.linalg.svd(white, full_matrices=False)
    right = u.T @ raw
    if outputs is None:
        left = u
    elif outputs.ndim == 1:
        left = u / outputs[:, None]
    else:
        left = torch.linalg.solve_triangular(outputs.T, u, upper=True)
    return Spectrum(left, right, s.square())


def output_root(diagonal: Tensor, sample: Tensor | None = None, *, shrink: float = 0.5) -> Tensor:
    """Root of G from its diagonal and, where given, gradients of some tokens.

    diagonal (rows,) E[g^2]. sample (n, rows) gradients: G is then ``shrink`` times the
    diagonal plus the rest of their second moment, rescaled to that diagonal (the
    correlations of a sample, shrunk). Rows below a millionth of the mean count as that.
    Returns (rows,) or (rows, rows) as `decompose` takes it.
    """
    d = diagonal.detach().double()
    mean = float(d.mean())
    if not bool(torch.isfinite(d).all()) or bool((d < 0).any()):
        raise JoulesmithError("squared output gradients must be finite and not negative")
    if mean == 0:
        return torch.ones_like(d)
    d = d.clamp_min(1e-6 * mean)
    if sample is None or not len(sample):
        return d.sqrt()
    if not 0 < shrink <= 1:
        raise JoulesmithError(f"shrinking by {shrink} is not a share above 0")
    g = sample.double()
    moment = g.T @ g / len(g)
    scale = torch.where(moment.diagonal() > 0, moment.diagonal(), torch.ones_like(d)).rsqrt()
    scale = scale * d.sqrt()
    moment = (1 - shrink) * scale[:, None] * moment * scale
    moment.diagonal().copy_(d)
    return root(moment)
