"""Rounding with error feedback: GPTQ onto the block grids of GGUF.

Each column's rounding error is pushed onto the columns not yet rounded, so that
the layer's output changes least: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ"
(2022), algorithm 1, with columns visited in order of decreasing Hessian
diagonal ("act-order"). Scales are fixed before the first column is rounded,
since a GGUF block is a run of neighbouring columns and the order is not.
Afterwards `refine.descend` improves scales and codes together.

Tensors in, packed bytes out. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from joulesmith.compress.quantize import vector_feedback
from joulesmith.compress.quantize.grids import Array, Bytes, Format, Grid, Lattice, rows_of
from joulesmith.compress.quantize.refine import descend
from joulesmith.compress.quantize.vectors import WIDTH, VectorGrid
from joulesmith.errors import JoulesmithError

ROWS = 1024
"""Rows whose error is summed at a time."""
WEIGHTS = 1 << 19
"""Weights rounded at a time, which bounds memory: rows do not depend on each other."""
DAMPING = 0.1
"""Share of each Hessian diagonal; 0.25 loses 3 % more KL at four bits on held-out text."""
LAZY = 32
"""Columns whose feedback is gathered before it reaches the columns beyond (GPTQ, section 3.3)."""


@dataclass(frozen=True)
class Curvature:
    """What one Hessian offers to all matrices that share their input.

    hessian: (n, n) float32, damped, symmetric. order: (n,) the visiting order.
    feedback: (n, n) float32, upper triangular, in that order: the Cholesky factor
    of the inverse (GPTQ, equation 5 and step 3).
    """

    hessian: Tensor
    order: Tensor
    feedback: Tensor

    @property
    def importance(self) -> Tensor:
        """(n,) what a squared error in each column costs once the others make up for it."""
        cost = torch.empty_like(self.order, dtype=torch.float32)
        cost[self.order] = self.feedback.diagonal().square().reciprocal()
        return cost

    @cached_property
    def by_vectors(self) -> tuple[Tensor, Tensor]:
        """order (n,) and feedback (n, n) that keep vectors of neighbours together.

        Vectors go in order of decreasing sums of their diagonal; columns in a vector stay.
        """
        h = self.hessian
        sums = h.diagonal().view(-1, WIDTH).sum(1)
        vectors = torch.argsort(sums, descending=True, stable=True)
        order = (vectors[:, None] * WIDTH + torch.arange(WIDTH)).view(-1)
        factor = _inverse_factor(h, order)
        assert factor is not None  # positive definite in one order is so in any
        return order, factor


def curvature(hessian: Array, *, damping: float = DAMPING) -> Curvature:
    """hessian (n, n), e.g. the sum over tokens of ``x x^T`` -> `Curvature`.

    damping: added to the diagonal, as a share of itself, and a tenth of that as a share
    of its mean; the latter is raised tenfold until the matrix is safely positive definite.
    Correlations between columns shrink by it, since those of a sample are larger than
    those of the text that the model will see. Columns that were never active
    (zero diagonal) count as average ones: they are rounded to nearest.
    Raises `JoulesmithError` where the matrix is not square, finite and symmetric.
    """
    h = torch.as_tensor(hessian).detach().cpu()
    if h.dtype != torch.float64:
        h = h.float()
    if h.ndim != 2 or h.shape[0] != h.shape[1]:
        raise JoulesmithError(f"a Hessian is square, not {tuple(h.shape)}")
    if not bool(torch.isfinite(h).all()):
        raise JoulesmithError(
            "the Hessian holds NaN or infinity: check the calibration activations"
        )
    if damping < 0:
        raise JoulesmithError(f"damping must not be negative, and is {damping}")
    h = h / 2  # as precise as it came: in float64 it is for the factoring alone
    h = h + h.T
    diagonal = h.diagonal()
    if bool((diagonal < 0).any()):
        raise JoulesmithError("the Hessian has a negative diagonal: it is no sum of squares")
    dead = diagonal <= 0
    mean = float(diagonal[~dead].double().mean()) if bool((~dead).any()) else 1.0
    h /= mean  # only proportions matter, and they fit float32
    h[dead] = 0
    h[:, dead] = 0
    h.diagonal()[dead] = 1.0
    h.diagonal().mul_(1 + damping)
    # float64 rounding needs this much at least, whatever was asked for
    ridge = max(damping / 10, 1e-7)
    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    for _ in range(10):
        factor = _inverse_factor(h, order, ridge)
        if factor is not None:
            h.diagonal().add_(ridge)
            return Curvature(h.float(), order, factor)
        ridge *= 10
    raise JoulesmithError("the Hessian is far from positive semidefinite: check the calibration")


def _inverse_factor(h: Tensor, order: Tensor, ridge: float = 0.0) -> Tensor | None:
    """Upper U, float32, with ``U^T U = (h[order, order] + ridge)^-1``; None where there is none.

    Reversing rows and columns turns the wanted factor into the inverse of an
    ordinary Cholesky factor, which LAPACK works out in place, in float64. h symmetric.
    """
    from scipy.linalg.lapack import dpotrf, dtrtri

    back = order.flip(0)
    turned = h.index_select(0, back).index_select(1, back).double()
    turned.diagonal().add_(ridge)
    # A symmetric matrix by rows is the same by columns, LAPACK's order.
    lower, info = dpotrf(turned.numpy().T, lower=True, clean=True, overwrite_a=True)
    if info == 0:
        lower, info = dtrtri(lower, lower=True, overwrite_c=True)
    if info != 0:
        return None
    inverse = torch.from_numpy(lower[::-1, ::-1].astype(np.float32, order="C"))
    return inverse if bool(inverse.isfinite().all()) else None


def feedback_codes(w: Tensor, c: Curvature, grid: Grid, lattice: Lattice) -> Tensor:
    """GPTQ's loop: w (rows, n) and fixed scales -> codes (rows, n) uint8."""
    rows, n = w.shape
    left = w.T[c.order].contiguous()  # (n, rows): a column is one run of memory
    level = torch.empty_like(left)
    group = c.order // grid.group
    step = lattice.step.T.contiguous()
    inverse = torch.where(step == 0, torch.zeros_like(step), step.reciprocal())
    offset = None if lattice.offset is None else lattice.offset.T.contiguous()
    groups = group.tolist()
    diagonal = c.feedback.diagonal().tolist()
    error = torch.empty(LAZY, rows)
    for start in range(0, n, LAZY):
        stop = min(start + LAZY, n)
        for j in range(start, stop):
            g, x = groups[j], left[j]
            if offset is None:
                level[j] = grid.nearest_level(x * inverse[g])
                miss = x - level[j] * step[g]
            else:
                level[j] = grid.nearest_level((x - offset[g]) * inverse[g])
                miss = x - level[j] * step[g] - offset[g]
            e = torch.div(miss, diagonal[j], out=error[j - start])
            if j + 1 < stop:
                left[j + 1 : stop].addr_(c.feedback[j, j + 1 : stop], e, alpha=-1)
        if stop < n:
            left[stop:].addmm_(c.feedback[start:stop, stop:].T, error[: stop - start], alpha=-1)
    codes = torch.empty((n, rows), dtype=torch.uint8)
    codes[c.order] = grid.nearest_code(level)
    return codes.T.contiguous()


def gptq(
    w: Array,
    hessian: Array | Curvature,
    grid: Format,
    *,
    damping: float = DAMPING,
    sweeps: int = 2,
    importance: Array | None = None,
) -> Bytes:
    """w (rows, n) float32 -> packed (rows, row_bytes) that make ``tr(dW H dW^T)`` small.

    hessian: (n, n), or a `Curvature` made once for several matrices of one input.
    sweeps: passes of `refine.descend` after the feedback pass; 0 for plain GPTQ.
    importance: weighting of the scale search, (n,) or (rows, n); by default the
    cost of each column under the Hessian. The same input gives the same bytes.
    Plain casts have no codes to choose and are packed to nearest.
    Errors: those of `Format.pack` and `curvature`.
    """
    t = rows_of(w, grid)
    if not isinstance(grid, Grid | VectorGrid):
        return grid.pack(t)
    c = hessian if isinstance(hessian, Curvature) else curvature(hessian, damping=damping)
    if c.hessian.shape[0] != t.shape[1]:
        raise JoulesmithError(
            f"a Hessian of {c.hessian.shape[0]} columns does not belong to weights of {t.shape[1]}"
        )
    if not len(t):
        return grid.pack(t)
    importance = c.importance if importance is None else importance
    grid = grid.bind(t, importance)
    lattice = grid.fit(t, importance)
    out = np.empty((t.shape[0], grid.row_bytes(t.shape[1])), np.uint8)
    pieces = min(len(t), -(-t.numel() // WEIGHTS))
    size = -(-len(t) // pieces)  # of one size, which takes the least memory
    for start in range(0, len(t), size):
        stop = min(start + size, len(t))
        part = lattice.rows(start, stop)
        x = t[start:stop]
        if isinstance(grid, VectorGrid):
            codes = vector_feedback.feedback_codes(x, *c.by_vectors, grid, part)
            codes, part = vector_feedback.descend(x, c.hessian, grid, codes, part, sweeps=sweeps)
        else:
            codes = feedback_codes(x, c, grid, part)
            codes, part = descend(x, c.hessian, grid, codes, part, sweeps=sweeps)
        out[start:stop] = grid.write(codes, part)
    return out


def output_error(w: Array, packed: Bytes, hessian: Array, grid: Format) -> float:
    """``tr((W - Q) H (W - Q)^T)``: the squared error of the layer's output, summed.

    w (rows, n), hessian (n, n), packed as from `gptq`. With H the sum over tokens
    of ``x x^T`` this is the summed squared change of the outputs on those tokens.
    """
    t = rows_of(w, grid)
    h = torch.as_tensor(hessian).to(torch.float64)
    total = 0.0
    for start in range(0, t.shape[0], ROWS):
        part = packed[start : start + ROWS]
        d = t[start : start + ROWS] - torch.from_numpy(grid.unpack(part, t.shape[1]))
        d = d.double()
        total += float(((d @ h) * d).sum())
    return total
