"""Two thin matrices in place of one: how many numbers they hold, and the form with fewest.

A product ``a @ b`` of rank r has r^2 numbers too many: any invertible r x r matrix may go
between the two. `pivot` spends them on making r columns of b the identity, which need not
be stored (Zhao et al. 2025, "Pivoting Factorization", section 3, with columns in place of
rows). So r (rows + columns - r) numbers are left, fewer than the dense matrix at every rank,
where the plain product is smaller only below r = rows columns / (rows + columns).

Tensors in, tensors out. Knows no models and no damage.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from joulesmith.compress.lowrank.svd import check_matrix, check_rank
from joulesmith.errors import JoulesmithError


@dataclass(frozen=True)
class Factors:
    """``W ~ outer @ [I inner]`` (pivoted) or ``outer @ inner``.

    outer (rows, rank). inner: (rank, columns), or pivoted (rank, columns - rank).
    order: (columns,) int64, pivoted only: the columns of W in the order in which
    ``[I inner]`` has them, the ``rank`` pivots first.
    """

    outer: Tensor
    inner: Tensor
    order: Tensor | None = None

    @property
    def rank(self) -> int:
        """Columns of ``outer``."""
        return self.outer.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix that they stand for."""
        columns = self.inner.shape[1] + (0 if self.order is None else self.rank)
        return self.outer.shape[0], columns

    @property
    def parameters(self) -> int:
        """Numbers stored; the order of the columns is not counted."""
        return self.outer.numel() + self.inner.numel()

    def dense(self) -> Tensor:
        """(rows, columns), the product, in the factors' dtype."""
        product = self.outer @ self.inner
        if self.order is None:
            return product
        out = torch.empty(self.shape, dtype=product.dtype)
        out[:, self.order] = torch.cat([self.outer, product], dim=1)
        return out


def stored(rows: int, columns: int, rank: int, *, pivoted: bool) -> int:
    """Numbers that the factors of that rank hold, or the matrix itself at full rank."""
    if rank >= min(rows, columns):
        return rows * columns
    return rank * (rows + columns - (rank if pivoted else 0))


def plain(left: Tensor, right: Tensor) -> Factors:
    """left (rows, r), right (r, columns) -> the same product, with columns of equal length.

    Each pair is scaled so that a column of ``outer`` and its row of ``inner`` have the same
    norm: a small float type then loses least.
    """
    a, b = _product(left, right)
    na, nb = torch.linalg.vector_norm(a, dim=0), torch.linalg.vector_norm(b, dim=1)
    ratio = torch.where((na > 0) & (nb > 0), nb / na, torch.ones_like(na)).sqrt()
    return Factors(a * ratio, b / ratio[:, None])


def pivot(left: Tensor, right: Tensor) -> Factors:
    """left (rows, r), right (r, columns) -> the same product with an identity inside.

    Pivots come from QR with column pivoting, which keeps ``inner`` small in practice. Where
    ``right`` has not the rank r that it says, the answer has the rank that it does have.
    Raises `JoulesmithError` for shapes that do not belong together or NaN.
    """
    from scipy.linalg import qr

    a, b = _product(left, right)
    q, upper, order = qr(b.numpy(), mode="economic", pivoting=True)
    diagonal = abs(upper.diagonal())
    floor = diagonal[0] * max(b.shape) * torch.finfo(b.dtype).eps if diagonal.size else 0.0
    rank = max(1, int((diagonal > floor).sum()))
    r = torch.from_numpy(upper[:rank])
    if diagonal[0] == 0:  # a zero matrix: any column will do
        inner = torch.zeros(1, b.shape[1] - 1, dtype=b.dtype)
        return Factors(torch.zeros(len(a), 1, dtype=a.dtype), inner, torch.from_numpy(order).long())
    inner = torch.linalg.solve_triangular(r[:, :rank], r[:, rank:], upper=True)
    outer = a @ (torch.from_numpy(q[:, :rank]) @ r[:, :rank])
    return Factors(outer, inner, torch.from_numpy(order).long())


def _product(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    a, b = check_matrix(left, "left factor"), check_matrix(right, "right factor")
    if a.shape[1] != b.shape[0]:
        raise JoulesmithError(
            f"factors of {tuple(a.shape)} and {tuple(b.shape)} have no product: ranks differ"
        )
    check_rank(a.shape[1], a.shape[0], b.shape[1])
    return a, b
