"""Ranges of the second order: steps under a Hessian.

Pure functions beside those of `ranges`. Knows no file format and no model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from joulesmith.compress.quantize import scales
from joulesmith.compress.quantize.ranges import RATIOS, absmax, mse
from joulesmith.compress.quantize.tiles import (
    Granularity,
    Levels,
    Range,
    group,
    settled,
    tiles_of,
)
from joulesmith.errors import JoulesmithError


def curved(
    w: Tensor, hessian: Tensor, levels: Levels, size: int, *, sweeps: int = 2, rounds: int = 4
) -> tuple[Range, Tensor]:
    """Steps of groups that make ``(w - s q)^T H (w - s q)`` least, each under its block of H.

    w (rows, n); hessian (n, n), positive semidefinite, of which only the blocks of ``size``
    columns on the diagonal count. Given codes q the best step is ``q^T H w / q^T H q``;
    given the step, codes go through ``sweeps`` of coordinate descent (0: to nearest).
    The two alternate for ``rounds`` and never raise the error; the start is the best of
    clipped ranges. The objective is GPTQ's (Frantar et al. 2022, equation 1) for one
    group. Where affine, zeros near `mse`'s are tried. Returns the range and its levels (rows, n).
    Raises `JoulesmithError` where shapes do not fit or values are not finite.
    """
    tiles_of(w, group(size))
    w = w.detach().float()
    h = torch.as_tensor(hessian).detach().to(device="cpu", dtype=torch.float32)
    if h.shape != (w.shape[1], w.shape[1]) or not bool(torch.isfinite(h).all()):
        raise JoulesmithError(
            f"a finite Hessian of {w.shape[1]} x {w.shape[1]} belongs to weights "
            f"{tuple(w.shape)}, not one of {tuple(h.shape)}"
        )
    if bool((h.diagonal() < 0).any()):
        raise JoulesmithError("the Hessian has a negative diagonal: it is no sum of squares")
    steps, zeros, found = [], [], []
    for start in range(0, w.shape[1], size):
        x, part = w[:, start : start + size], h[start : start + size, start : start + size]
        mean = part.diagonal().mean()
        # only proportions matter, and a dead column costs a little so that it stays sane
        part = part / mean if mean > 0 else torch.eye(size)
        part = part + 1e-6 * torch.eye(size)
        step, zero, level = _one_group(x, part, levels, sweeps, rounds)
        steps.append(step)
        zeros.append(zero)
        found.append(level)
    step, zero = torch.stack(steps, 1).flatten(), torch.stack(zeros, 1).flatten()
    return settled(step, zero, levels, group(size)), torch.cat(found, 1)


def _one_group(
    x: Tensor, h: Tensor, levels: Levels, sweeps: int, rounds: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x (rows, size), h (size, size) -> step, zero (rows,), levels (rows, size)."""
    whole = Granularity(1, 0)
    first = absmax(x, levels, whole)
    plain = mse(x, levels, whole)
    zeros = [first.zero]
    if levels.affine:
        zeros += [(plain.zero + move).clamp(levels.low, levels.high) for move in (-1, 0, 1)]
    best = [first.step, first.zero, first.codes(x)]
    best_error = _curved_error(x, h, *best)

    def keep(step: Tensor, zero: Tensor, level: Tensor) -> None:
        nonlocal best_error
        error = _curved_error(x, h, step, zero, level)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best[0] = torch.where(better, step, best[0])
        best[1] = torch.where(better, zero, best[1])
        best[2] = torch.where(better[:, None], level, best[2])

    keep(plain.step, plain.zero, plain.codes(x))
    for zero in zeros:
        for ratio in RATIOS:
            step = first.step * ratio
            level = levels.nearest(x / step[:, None] + zero[:, None])
            keep(_best_step(x, h, level - zero[:, None], step), zero, level)
    for _ in range(rounds):
        step, zero, level = best
        if sweeps:
            level = _descend(x, h, step, zero, level, levels, sweeps)
        else:
            level = levels.nearest(scales.safe_ratio(x, step[:, None].expand_as(x)) + zero[:, None])
        keep(step, zero, level)
        keep(_best_step(x, h, level - zero[:, None], step), zero, level)
    return best[0], best[1], best[2]


def _curved_error(x: Tensor, h: Tensor, step: Tensor, zero: Tensor, level: Tensor) -> Tensor:
    miss = x - step[:, None] * (level - zero[:, None])
    return ((miss @ h) * miss).sum(1)


def _best_step(x: Tensor, h: Tensor, q: Tensor, otherwise: Tensor) -> Tensor:
    pulled = q @ h
    step = scales.safe_ratio((pulled * x).sum(1), (pulled * q).sum(1))
    return torch.where(step > 0, step, otherwise)


def _descend(
    x: Tensor, h: Tensor, step: Tensor, zero: Tensor, level: Tensor, levels: Levels, sweeps: int
) -> Tensor:
    """Each code in turn chosen anew given all others; QuantEase (Behdin et al. 2023)."""
    level = level.clone()
    pull = (x - step[:, None] * (level - zero[:, None])) @ h
    for _ in range(sweeps):
        for k in range(x.shape[1]):
            now = step * (level[:, k] - zero)
            wanted = now + pull[:, k] / h[k, k]
            new = levels.nearest(wanted / step + zero)
            pull.addr_(step * (new - level[:, k]), h[k], alpha=-1)
            level[:, k] = new
    return level
