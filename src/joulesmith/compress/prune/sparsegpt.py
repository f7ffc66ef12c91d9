"""Column by column: choose zeros, and let the columns to the right make up for them.

Frantar & Alistarh 2023, "SparseGPT: massive language models can be accurately pruned in one
shot", algorithm 1. Pure functions of weights and input moments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from joulesmith.compress.prune.patterns import Pattern
from joulesmith.errors import JoulesmithError

BLOCK = 128
"""Columns whose zeros are chosen together (the paper's mask selection block size, section 4)."""
DAMPING = 0.01
"""Share of the mean diagonal that is added to it (the paper's reference code)."""


def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    pattern: Pattern,
    sparsity: float,
    *,
    block: int = BLOCK,
    damping: float = DAMPING,
) -> Tensor:
    """weight (rows, n), gram (n, n) E[x x^T] -> pruned weights (rows, n), float32.

    sparsity: share of zeros in each block of columns; N:M has its own. Raises `JoulesmithError`
    where the gram matrix is far from positive semidefinite.
    """
    w = weight.float().clone()
    rows, n = w.shape
    if pattern.of:
        block -= block % pattern.of or 0
        block = max(block, pattern.of)
    block -= block % pattern.tile[1]
    block = max(block, pattern.tile[1])
    dead = gram.diagonal() <= 0
    w[:, dead] = 0
    factor = inverse_factor(gram, damping)
    diagonal = factor.diagonal()
    error = torch.empty(rows, block)
    for start in range(0, n, block):
        stop = min(start + block, n)
        part, d = w[:, start:stop], diagonal[start:stop]
        saliency = (part / d).square()
        stays = None
        if not pattern.of:
            stays = pattern.mask(saliency, round((1 - sparsity) * part.numel()))
        for j in range(stop - start):
            if pattern.of and j % pattern.of == 0:
                # Chosen when the columns before have been made up for.
                span = slice(j, j + pattern.of)
                now = (part[:, span] / d[span]).square()
                group = pattern.mask(now, 0)
                stays = group if j == 0 or stays is None else torch.cat([stays, group], 1)
            assert stays is not None
            column = part[:, j]
            e = torch.where(stays[:, j], 0.0, column) / d[j]
            part[:, j:].addr_(e, factor[start + j, start + j : stop], alpha=-1)
            error[:, j] = e
        assert stays is not None
        part.masked_fill_(~stays, 0.0)
        if stop < n:
            w[:, stop:].addmm_(error[:, : stop - start], factor[start:stop, stop:], alpha=-1)
    return w


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Upper U, (n, n) float32, with ``U^T U = (gram + damping mean(diagonal) I)^-1``.

    The damping is raised tenfold until the matrix is positive definite.
    """
    h = gram.to(torch.float64, copy=True)
    dead = h.diagonal() <= 0
    mean = float(h.diagonal()[~dead].mean()) if bool((~dead).any()) else 1.0
    h.diagonal()[dead] = mean
    for _ in range(8):
        damped = h.clone()
        damped.diagonal().add_(damping * mean)
        # The factor of an inverse: reversed, it is the inverse of an ordinary one.
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(info) == 0:
            inverse = torch.linalg.solve_triangular(
                lower, torch.eye(len(lower), dtype=lower.dtype), upper=False
            )
            found: Tensor = inverse.flip(0, 1).float().contiguous()
            return found
        damping *= 10
    raise JoulesmithError(
        "the input moments are far from positive semidefinite: check the calibration data"
    )
