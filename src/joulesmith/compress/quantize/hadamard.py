"""Orthogonal matrices that spread outliers: Hadamard where one is known, random elsewhere.

A Hadamard matrix has entries of one magnitude, so every output channel is a mean of all
inputs, up to signs (Chee et al. 2023, "QuIP"; Tseng et al. 2024, "QuIP#", section 3). Pure
functions; knows no model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from joulesmith.errors import JoulesmithError


def hadamard(n: int) -> Tensor | None:
    """A Hadamard matrix scaled to be orthogonal, (n, n) float64; None for an
    ``n`` that neither of the constructions used here reaches.

    Orders ``m 2^k`` where m is 1, or Paley's for a prime q: m = q + 1 with q = 3 mod 4, or
    m = 2 (q + 1) with q = 1 mod 4 (Paley 1933); Sylvester's doubling does the rest.
    """
    if n < 1:
        raise JoulesmithError(f"an orthogonal matrix has 1 row or more, not {n}")
    base = n // (n & -n)  # Paley only where doubling alone does not lead there
    while (found := _paley(base)) is None:
        base *= 2
        if base > n:
            return None
    while len(found) < n:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found / math.sqrt(n)


def random_orthogonal(n: int, seed: int = 0) -> Tensor:
    """Uniformly distributed orthogonal matrix, (n, n) float64 (Stewart 1980)."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    found: Tensor = q * r.diagonal().sign()
    return found


def rotation(n: int, seed: int = 0) -> Tensor:
    """An orthogonal (n, n) float64: Hadamard with random signs, or a random one."""
    h = hadamard(n)
    if h is None:
        return random_orthogonal(n, seed)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (n,), generator=generator, dtype=torch.float64) * 2 - 1
    return h * signs[:, None]


def _paley(m: int) -> Tensor | None:
    """A Hadamard matrix of order m by Paley's constructions, entries +-1, or None."""
    if m in (1, 2):
        one = torch.ones(1, 1, dtype=torch.float64)
        return one if m == 1 else torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if m % 4:
        return None
    q = m - 1
    if _prime(q) and q % 4 == 3:
        s = _bordered(q, 1.0, -1.0)
        return s + torch.eye(m, dtype=torch.float64)
    q = m // 2 - 1
    if _prime(q) and q % 4 == 1:
        s = _bordered(q, 1.0, 1.0)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        zero = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(s, plus) + torch.kron(torch.eye(len(s), dtype=torch.float64), zero)
    return None


def _bordered(q: int, right: float, down: float) -> Tensor:
    """Jacobsthal's matrix of the prime q, with a border: (q + 1, q + 1), zero diagonal."""
    square = torch.full((q,), -1.0, dtype=torch.float64)
    square[[(k * k) % q for k in range(1, q)]] = 1.0
    square[0] = 0.0
    index = torch.arange(q)
    out = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    out[1:, 1:] = square[(index[:, None] - index[None]) % q]
    out[0, 1:], out[1:, 0] = right, down
    return out


def _prime(n: int) -> bool:
    return n > 1 and all(n % k for k in range(2, math.isqrt(n) + 1))
