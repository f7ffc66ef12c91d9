"""Truncated singular value decompositions: exact, and randomized with an error bound.

Tensors in, tensors out; float64 inside. Knows no activations and no models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from joulesmith.errors import JoulesmithError

OVERSAMPLE = 10
"""Columns of the random test matrix beyond the rank (Halko et al. 2011, section 1.3)."""
POWER = 2
"""Power iterations: the spectra of weights fall slowly, and each one steepens them."""
PROBES = 10
"""Random vectors of the error estimate: it fails with probability 10^-PROBES at most."""


@dataclass(frozen=True)
class Truncated:
    """``w ~ u diag(s) v^T``, float64.

    u (rows, k), s (k,) descending, v (columns, k). bound: of the spectral norm of what is
    left out, ``||w - u diag(s) v^T||_2``; exact (the next singular value) or, after random
    projection, an upper bound that holds with probability ``1 - 10^-PROBES``.
    left: Frobenius norm of what is left out, exact in both cases.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    bound: float
    left: float

    def dense(self) -> Tensor:
        """(rows, columns), the product."""
        return (self.u * self.s) @ self.v.T


def check_matrix(w: Tensor, what: str = "matrix") -> Tensor:
    """``w`` as float64 on the CPU. Raises `JoulesmithError`: not a finite, non-empty matrix."""
    t = torch.as_tensor(w).detach().to(device="cpu", dtype=torch.float64)
    if t.ndim != 2 or not t.numel():
        raise JoulesmithError(f"a {what} has rows and columns, not shape {tuple(t.shape)}")
    if not bool(torch.isfinite(t).all()):
        raise JoulesmithError(f"the {what} holds NaN or infinity: check the weights")
    return t


def check_rank(rank: int, rows: int, columns: int) -> int:
    """``rank`` itself. Raises `JoulesmithError` when no (rows, columns) matrix has it."""
    if not 1 <= rank <= min(rows, columns):
        raise JoulesmithError(
            f"rank {rank} is not possible for a {rows} x {columns} matrix: "
            f"give 1 to {min(rows, columns)}"
        )
    return rank


def exact(w: Tensor, rank: int) -> Truncated:
    """The best approximation of that rank (Eckart and Young 1936).

    w (rows, columns), any float. Raises `JoulesmithError` for bad values or ranks.
    """
    t = check_matrix(w)
    check_rank(rank, *t.shape)
    u, s, vh = torch.linalg.svd(t, full_matrices=False)
    bound = float(s[rank]) if rank < len(s) else 0.0
    left = float(s[rank:].square().sum().sqrt())
    return Truncated(u[:, :rank], s[:rank], vh[:rank].T, bound, left)


def randomized(
    w: Tensor,
    rank: int,
    *,
    oversample: int = OVERSAMPLE,
    power: int = POWER,
    seed: int = 0,
) -> Truncated:
    """Nearly the best approximation of that rank, from a few products with ``w``.

    Halko, Martinsson, Tropp, "Finding structure with randomness" (2011): algorithm 4.4
    (subspace iteration with orthonormalisation at each half step), then algorithm 5.1. The
    bound is the a-posteriori estimate of equation 4.3 for the range, plus the first
    singular value that truncation drops. Same seed, same result.
    Raises `JoulesmithError` for bad values, ranks, or negative settings.
    """
    t = check_matrix(w)
    rows, columns = t.shape
    check_rank(rank, rows, columns)
    if oversample < 0 or power < 0:
        raise JoulesmithError(
            f"oversampling and power iterations must not be negative: {oversample}, {power}"
        )
    width = min(rank + oversample, rows, columns)
    generator = torch.Generator().manual_seed(seed)
    q = _basis(t @ torch.randn(columns, width, generator=generator, dtype=t.dtype))
    for _ in range(power):
        q = _basis(t @ _basis(t.T @ q))
    inner = q.T @ t
    ub, s, vh = torch.linalg.svd(inner, full_matrices=False)
    outside = range_error(t, q, seed=seed + 1)
    dropped = float(s[rank]) if rank < len(s) else 0.0
    kept = s[:rank]
    # the kept part is an orthogonal projection of w, so squares subtract
    left = math.sqrt(max(float(t.square().sum() - kept.square().sum()), 0.0))
    return Truncated(q @ ub[:, :rank], kept, vh[:rank].T, outside + dropped, left)


def range_error(w: Tensor, q: Tensor, *, probes: int = PROBES, seed: int = 0) -> float:
    """An upper bound of ``||(I - q q^T) w||_2`` that fails with probability 10^-probes.

    w (rows, columns), q (rows, k) orthonormal. Halko, Martinsson, Tropp (2011), lemma 4.1
    and equation 4.3: ``10 sqrt(2 / pi) max_i ||(I - q q^T) w g_i||`` with Gaussian g_i.
    """
    generator = torch.Generator().manual_seed(seed)
    y = w @ torch.randn(w.shape[1], probes, generator=generator, dtype=w.dtype)
    y = y - q @ (q.T @ y)
    return 10 * math.sqrt(2 / math.pi) * float(torch.linalg.vector_norm(y, dim=0).max())


def truncate(w: Tensor, rank: int, *, seed: int = 0) -> Truncated:
    """`exact`, or `randomized` where the rank is so small that it is several times cheaper."""
    t = torch.as_tensor(w)
    if t.ndim == 2 and min(t.shape) > 8 * (rank + OVERSAMPLE):
        return randomized(t, rank, seed=seed)
    return exact(t, rank)


def _basis(y: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(y)[0]
    return q
