"""Better scales and codes for a matrix that is already rounded: block coordinate descent.

Each block in turn gets the step (and offset) that are best under the full
Hessian given every code, then each of its codes is chosen again given all the
others. The layer's squared output error never rises. Coordinate descent on codes
is that of QuantEase (Behdin et al. 2023, section 3); scales are moved only to
values that the file can store.
"""

from __future__ import annotations

import torch
from torch import Tensor

from joulesmith.compress.quantize.grids import Grid, Lattice
from joulesmith.compress.quantize.scales import Snap


def descend(
    w: Tensor, hessian: Tensor, grid: Grid, codes: Tensor, lattice: Lattice, *, sweeps: int = 2
) -> tuple[Tensor, Lattice]:
    """w (rows, n), hessian (n, n) positive definite, codes and lattice -> better ones.

    Scales move only in the types whose groups each own a scale
    (``grid.free_scales``); elsewhere codes alone do. All in float32.
    """
    if sweeps <= 0:
        return codes, lattice
    size = grid.group
    level = (grid.values(codes, _unit(lattice))).T.contiguous()
    step = lattice.step.T.contiguous()
    offset = None if lattice.offset is None else lattice.offset.T.contiguous()
    q = grid.values(codes, lattice).T.contiguous()
    pull = hessian @ (w.T - q)  # half the negative gradient of the error by Q
    diagonal = hessian.diagonal()
    for _ in range(sweeps):
        for g in range(len(step)):
            cut = slice(g * size, (g + 1) * size)
            h = hessian[cut, cut]
            block, near, before = level[cut], pull[cut].clone(), q[cut].clone()
            now = q[cut]
            if grid.free_scales:
                moved = None if offset is None else offset[g]
                _move_scales(h, block, near, now, step[g], moved, grid.storable)
            inverse = torch.where(step[g] == 0, torch.zeros_like(step[g]), step[g].reciprocal())
            for k in range(size):
                wanted = torch.addcdiv(now[k], near[k], diagonal[g * size + k])
                if offset is None:
                    new = grid.nearest_level(wanted * inverse)
                    value = new * step[g]
                else:
                    new = grid.nearest_level((wanted - offset[g]) * inverse)
                    value = new * step[g] + offset[g]
                near.addr_(h[:, k], value - now[k], alpha=-1)
                block[k], now[k] = new, value
            pull.addmm_(hessian[:, cut], now - before, alpha=-1)
    codes = grid.nearest_code(level).T.contiguous()
    off = None if offset is None else offset.T.contiguous()
    stored = grid.snap(step.T.contiguous(), off) if grid.free_scales else lattice
    return codes, stored


def _unit(lattice: Lattice) -> Lattice:
    return Lattice(torch.ones_like(lattice.step), None, ())


def _move_scales(
    h: Tensor,
    level: Tensor,
    near: Tensor,
    q: Tensor,
    step: Tensor,
    offset: Tensor | None,
    snap: Snap,
) -> None:
    """Exact line searches along step, then offset, of one block; in place.

    h (size, size); level, near, q (size, rows); step, offset (rows,). ``near`` is
    the block's part of ``H (W - Q)``.
    """
    hl = h @ level
    for scale, direction, curve in (
        (step, level, hl),
        (offset, torch.ones_like(level), h.sum(1)[:, None].expand_as(level)),
    ):
        if scale is None:
            continue
        slope = (direction * near).sum(0)
        bend = (direction * curve).sum(0)
        wanted = torch.where(bend > 0, scale + slope / bend, scale)
        move = snap(wanted) - scale
        move = torch.where(move * (2 * slope - move * bend) > 0, move, torch.zeros_like(move))
        scale += move
        near.sub_(curve * move)
        q.add_(direction * move)
