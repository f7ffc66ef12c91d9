"""Error feedback and coordinate descent for grids that code neighbouring weights jointly.

GPTQ's loop with a vector of 8 columns in the place of a column, as LDLQ with vector
codebooks in QuIP# (Tseng et al. 2024, section 4): the codewords of a vector are chosen in
the metric of its own block of the Hessian once later columns make up for the error (the
Schur complement), and the error is then pushed onto those columns. Coordinate descent
is `refine.descend` by vectors, with steps moved between the values that a block can store.

Tensors in, tensors out. Knows no model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from joulesmith.compress.quantize.grids import Lattice
from joulesmith.compress.quantize.scales import half
from joulesmith.compress.quantize.vectors import WIDTH, VectorGrid

LAZY = 64
"""Columns whose feedback is gathered before it reaches the columns beyond."""


def feedback_codes(
    w: Tensor, order: Tensor, feedback: Tensor, grid: VectorGrid, lattice: Lattice
) -> Tensor:
    """w (rows, n) and fixed scales -> codes (rows, n / dim) int32.

    order (n,): vectors of neighbours in the order of visiting. feedback (n, n): the upper
    Cholesky factor U of the inverse Hessian in that order, ``U^T U = H^-1``. The cost of an
    error e in a vector with its block B of U is ``|e B^-1|^2``, all later columns at their best.
    """
    rows, n = w.shape
    left = w.T[order].contiguous()
    step, inverse, shift = _scales(lattice)
    codes = torch.empty((rows, n // WIDTH, WIDTH // grid.dim), dtype=torch.int32)
    visits = (order[::WIDTH] // WIDTH).tolist()
    error = torch.empty(LAZY, rows)
    for start in range(0, n, LAZY):
        stop = min(start + LAZY, n)
        for j in range(start, stop, WIDTH):
            cut = slice(j, j + WIDTH)
            vector = visits[j // WIDTH]
            g = vector * WIDTH // grid.group
            solve = torch.linalg.inv(feedback[cut, cut].double()).float()
            u = left[cut] * inverse[g]
            if shift is not None:
                u -= shift[g]
            codes[:, vector], level = grid.choose(u.T.contiguous(), solve @ solve.T)
            level = level.T if shift is None else level.T + shift[g]
            e = torch.mm(
                solve.T, left[cut] - level * step[g], out=error[j - start : j - start + WIDTH]
            )
            if cut.stop < stop:
                left[cut.stop : stop].addmm_(feedback[cut, cut.stop : stop].T, e, alpha=-1)
        if stop < n:
            left[stop:].addmm_(feedback[start:stop, stop:].T, error[: stop - start], alpha=-1)
    return codes.view(rows, -1)


def _scales(lattice: Lattice) -> tuple[Tensor, Tensor, Tensor | None]:
    """Steps, their inverses (0 for 0) and shifts, each (groups, rows)."""
    step = lattice.step.T.contiguous()
    inverse = torch.where(step == 0, torch.zeros_like(step), step.reciprocal())
    shift = None
    if len(lattice.stored) > 2:
        shift = lattice.stored[2].reshape(len(lattice.step), -1).T.contiguous()
    return step, inverse, shift


def descend(
    w: Tensor,
    hessian: Tensor,
    grid: VectorGrid,
    codes: Tensor,
    lattice: Lattice,
    *,
    sweeps: int = 2,
) -> tuple[Tensor, Lattice]:
    """w (rows, n), hessian (n, n) positive definite, codes and lattice -> better ones.

    Never raises ``tr((W - Q) H (W - Q)^T)`` but by float32's rounding. Group by group: its
    integer scale (and shift), then its vectors; block by block: d.
    """
    if sweeps <= 0:
        return codes, lattice
    s = _State(w, hessian, grid, codes, lattice)
    for _ in range(sweeps):
        for block in range(w.shape[1] // grid.block):
            for g in range(grid.block // grid.group):
                s.improve_group(block, g)
            s.improve_d(block)
    return s.codes.view(len(w), -1), grid.lattice(s.stored)


class _State:
    """Where the descent stands; columns first, as rows then lie side by side in memory.

    level, q: (n, rows) levels with shifts, and values. pull: (n, rows), ``H (W - Q)^T``, half
    the negative gradient.
    """

    def __init__(
        self, w: Tensor, hessian: Tensor, grid: VectorGrid, codes: Tensor, lattice: Lattice
    ) -> None:
        self.grid, self.hessian = grid, hessian
        self.codes = codes.view(len(w), -1, WIDTH // grid.dim).clone()
        self.stored = tuple(x.clone() for x in lattice.stored)
        self.level = grid.levels_of(codes, lattice).T.contiguous()
        self.q = grid.values(codes, lattice).T.contiguous()
        self.pull = hessian @ (w.T - self.q)
        solved = hessian.view(hessian.shape[0] // WIDTH, WIDTH, -1, WIDTH).diagonal(dim1=0, dim2=2)
        self.solve = torch.linalg.inv(solved.permute(2, 0, 1).double()).float()

    def step(self, block: int, g: int) -> Tensor:
        """(rows,) of one group."""
        d, s = self.stored[0][:, block], self.stored[1][:, block, g]
        return (d * self.grid.unit) * (2 * s + 1)

    def improve_group(self, block: int, g: int) -> None:
        """Integer, shift and vectors of one group, each the best given the rest."""
        start = block * self.grid.block + g * self.grid.group
        cut = slice(start, start + self.grid.group)
        h = self.hessian[cut, cut]
        level, q, near = self.level[cut], self.q[cut], self.pull[cut].clone()
        before = q.clone()
        self._move_integer(block, g, h, level, q, near)
        if len(self.stored) > 2:
            self._move_shift(block, g, h, level, q, near)
        step = self.step(block, g)
        inverse = torch.where(step == 0, torch.zeros_like(step), step.reciprocal())
        shift = self.stored[2][:, block, g] if len(self.stored) > 2 else 0.0
        for k in range(0, self.grid.group, WIDTH):
            part = slice(k, k + WIDTH)
            vector = (start + k) // WIDTH
            metric = h[part, part]
            # the error is that of the vector's distance to this, in its metric, and a constant
            wanted = torch.addmm(q[part], self.solve[vector], near[part])
            u = (wanted * inverse - shift).T.contiguous()
            code, found = self.grid.choose(u, metric)
            new = found.T + shift
            value = new * step
            old_miss, new_miss = wanted - q[part], wanted - value
            better = _form(new_miss, metric) < _form(old_miss, metric)
            move = torch.where(better, value - q[part], 0.0)
            near.addmm_(h[:, part], move, alpha=-1)
            level[part] = torch.where(better, new, level[part])
            q[part] = torch.where(better, value, q[part])
            now = self.codes[:, vector]
            self.codes[:, vector] = torch.where(better[:, None], code, now)
        self.pull.addmm_(self.hessian[:, cut], q - before, alpha=-1)

    def _move_integer(
        self, block: int, g: int, h: Tensor, level: Tensor, q: Tensor, near: Tensor
    ) -> None:
        """The integer scale nearest the best step for these levels, where it helps."""
        step, curve = self.step(block, g), h @ level
        slope, bend = (level * near).sum(0), (level * curve).sum(0)
        wanted = torch.where(bend > 0, step + slope / bend, step)
        s = self.grid.integer(wanted, self.stored[0][:, block])
        move = (self.stored[0][:, block] * self.grid.unit) * (2 * s + 1) - step
        good = move * (2 * slope - move * bend) > 0
        move = torch.where(good, move, 0.0)
        self.stored[1][:, block, g] = torch.where(good, s, self.stored[1][:, block, g])
        near.sub_(curve * move)
        torch.mul(level, self.step(block, g), out=q)

    def _move_shift(
        self, block: int, g: int, h: Tensor, level: Tensor, q: Tensor, near: Tensor
    ) -> None:
        """The other shift for these codewords, where it helps."""
        step, shift = self.step(block, g), self.stored[2][:, block, g]
        other = sum(self.grid.shifts) - shift
        move = (other - shift) * step
        good = 2 * move * near.sum(0) - move.square() * h.sum() > 0
        near.sub_(h.sum(1)[:, None] * torch.where(good, move, 0.0))
        level.add_(torch.where(good, other - shift, 0.0))
        self.stored[2][:, block, g] = torch.where(good, other, shift)
        torch.mul(level, step, out=q)

    def improve_d(self, block: int) -> None:
        """The float16 that is best for all levels and integers of a block."""
        size = self.grid.block
        cut = slice(block * size, (block + 1) * size)
        h, d = self.hessian[cut, cut], self.stored[0][:, block]
        integers = (2 * self.stored[1][:, block] + 1).T.repeat_interleave(self.grid.group, 0)
        along = self.level[cut] * (integers * self.grid.unit)
        slope, bend = (along * self.pull[cut]).sum(0), (along * (h @ along)).sum(0)
        wanted = half(torch.where(bend > 0, d + slope / bend, d).clamp(min=0))
        move = wanted - d
        good = move * (2 * slope - move * bend) > 0
        self.stored[0][:, block] = torch.where(good, wanted, d)
        before = self.q[cut].clone()
        steps = (self.stored[0][:, block] * self.grid.unit) * integers
        torch.mul(self.level[cut], steps, out=self.q[cut])
        self.pull.addmm_(self.hessian[:, cut], self.q[cut] - before, alpha=-1)


def _form(miss: Tensor, metric: Tensor) -> Tensor:
    """(WIDTH, rows), (WIDTH, WIDTH) -> (rows,) quadratic forms."""
    return (miss * (metric @ miss)).sum(0)
