"""Grids that code neighbouring weights jointly: a codebook of vectors, and signs.

The protocol beside `grids.Grid` for GGUF's IQ1, IQ2 and IQ3 types. A *vector* is `WIDTH`
neighbouring weights; it is one codeword of 8 levels or two of 4, each level with a sign
where the type has signs. A weight reads back as ``step * (level + shift)``, the step being
``d * unit * (2 s + 1)`` with d a float16 for 256 weights and s a small integer for each group.

Which codeword is nearest depends on the metric. `VectorGrid.nearest` takes a weight for
each squared error, `VectorGrid.choose` a full matrix for the errors of a vector; the
search is by matrix products against the codebook. Knows no layers and no calibration.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from itertools import combinations, product
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from joulesmith.compress.quantize import scales
from joulesmith.compress.quantize.grids import (
    CHUNK,
    Array,
    Bytes,
    Format,
    Lattice,
    balanced,
    check_packed,
    importance_of,
    join,
    rows_of,
)

WIDTH = 8
"""Weights of a vector."""
SIGN_SHIFT = 12
"""A code is ``index | signs << SIGN_SHIFT``; a set bit of signs is a negative level."""
ROUNDS = 2
"""Passes of polishing the integers, then d."""
SIGN_ROUNDS = 1
"""Flips of signs, each with a new search of codewords: worth 1 % where even, less where free."""
_SLICE = 1 << 19
"""Scores (vectors x codewords) held at a time, so that they stay in the processor's cache."""


class VectorGrid(Format):
    """A type of vector codes: see the module's head.

    codes: (rows, columns / dim) int32. Lattices store (d, s) or, where groups shift their
    levels, (d, s, shift); d (rows, blocks); s and shift (rows, blocks, groups).
    """

    block = 256
    group: ClassVar[int]
    """Weights that share a step: two vectors or four."""
    dim: ClassVar[int]
    """Weights of a codeword: 4 or 8."""
    signs: ClassVar[str]
    """"free"; "even": an even number of negative levels in a vector; "none"."""
    top: ClassVar[int]
    """The largest integer scale."""
    unit: ClassVar[float]
    """The smallest step where d is 1."""
    shifts: ClassVar[tuple[float, ...]] = (0.0,)
    """What a group may add to its levels; one 0 where it may nothing."""
    largest: ClassVar[float]
    """The largest magnitude that the type can hold."""
    landings: ClassVar[tuple[float, ...]]
    """Where on the level axis the largest weight of a group is tried."""

    # -- codebook -------------------------------------------------------------

    @abstractmethod
    def codebook(self) -> Tensor:
        """(codewords, dim) float32; positive where there are signs."""

    @cached_property
    def book(self) -> Tensor:
        """`codebook`, made once."""
        return self.codebook()

    @cached_property
    def _diagonal(self) -> Tensor:
        """(2 dim, codewords): what a codeword's squares and levels are multiplied with."""
        return torch.cat([self.book.square().T, -2 * self.book.T]).contiguous()

    @cached_property
    def _products(self) -> Tensor:
        """(pairs of levels, codewords): twice the products of two levels of a codeword."""
        return torch.stack([2 * self.book[:, i] * self.book[:, j] for i, j in _pairs(self.dim)])

    @cached_property
    def _sign_table(self) -> Tensor:
        masks = torch.arange(1 << self.dim)[:, None]
        return 1.0 - 2.0 * ((masks >> torch.arange(self.dim)) & 1).float()

    def decode(self, codes: Tensor) -> Tensor:
        """codes (..., m) int32 -> levels (..., m * dim) float32, signs included."""
        flat = codes.reshape(-1)
        level = self.book.index_select(0, flat & ((1 << SIGN_SHIFT) - 1))
        if self.signs != "none":
            level.mul_(self._sign_table.index_select(0, flat >> SIGN_SHIFT))
        return level.view(*codes.shape[:-1], codes.shape[-1] * self.dim)

    # -- rounding -------------------------------------------------------------

    def nearest(self, u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """u, weight (m, WIDTH): codes (m, WIDTH / dim) and levels of small weighted error.

        Exactly the least where signs are free or none; with even signs the best of
        alternating between codewords and signs.
        """
        return self._in_slices(u, weight, False)

    def choose(self, u: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
        """As `nearest`, under ``(u - level) metric (u - level)^T``, metric (WIDTH, WIDTH).

        Alternates between codewords given signs (searched exactly) and signs given codewords.
        """
        return self._in_slices(u, metric, True)

    def _in_slices(self, u: Tensor, metric: Tensor, full: bool) -> tuple[Tensor, Tensor]:
        size = max(1, _SLICE // len(self.book))
        found = [
            self._search(u[i : i + size], metric if full else metric[i : i + size], full)
            for i in range(0, len(u), size)
        ]
        if len(found) == 1:
            return found[0]
        return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])

    def _search(self, u: Tensor, metric: Tensor, full: bool) -> tuple[Tensor, Tensor]:
        sign = torch.ones_like(u) if self.signs == "none" else torch.where(u < 0, -1.0, 1.0)
        if self.signs == "even":
            _make_even(sign, (metric.diagonal() if full else metric) * u.square())
        # where a vector is two codewords, the first is found as if the second had no error
        index = self._codewords(u, sign, metric, full, u)
        level = self._signed(index, sign)
        if self.signs == "even" or (full and self.signs == "free"):
            for _ in range(SIGN_ROUNDS):
                changed = self._flip(u, sign, level, metric, full)
                if not len(changed):
                    break
                some = metric if full else metric[changed]
                index[changed] = self._codewords(
                    u[changed], sign[changed], some, full, level[changed]
                )
                level[changed] = self._signed(index[changed], sign[changed])
        if self.signs != "none":
            bits = (sign.view(len(u), -1, self.dim) < 0) * self._bit_values
            index = index | (bits.sum(-1, dtype=torch.int32) << SIGN_SHIFT)
        return index, level

    @cached_property
    def _bit_values(self) -> Tensor:
        return 1 << torch.arange(self.dim, dtype=torch.int32)

    def _signed(self, index: Tensor, sign: Tensor) -> Tensor:
        return self.book.index_select(0, index.reshape(-1)).view(sign.shape).mul_(sign)

    def _codewords(
        self, u: Tensor, sign: Tensor, metric: Tensor, full: bool, level: Tensor
    ) -> Tensor:
        """The best codewords (m, WIDTH / dim) int32 for given signs, one after the other.

        level: what the other half of the vector holds.
        """
        found = []
        pulled = u @ metric if full else u * metric
        for start in range(0, WIDTH, self.dim):
            cut = slice(start, start + self.dim)
            linear = pulled[:, cut]
            if not full:
                score = torch.cat([metric[:, cut], linear * sign[:, cut]], 1) @ self._diagonal
            else:
                own = metric[cut, cut]
                if self.dim < WIDTH:
                    rest = slice(WIDTH - start - self.dim, WIDTH - start)
                    linear = linear - level[:, rest] @ metric[rest, cut]
                cross = torch.stack([own[i, j] for i, j in _pairs(self.dim)])
                constant = own.diagonal() @ self._diagonal[: self.dim]
                if self.signs == "none":
                    constant = constant + cross @ self._products
                    terms, table = [linear], [self._diagonal[self.dim :]]
                else:
                    s = sign[:, cut]
                    first, second = (list(t) for t in zip(*_pairs(self.dim), strict=True))
                    terms = [linear * s, s[:, first] * s[:, second] * cross]
                    table = [self._diagonal[self.dim :], self._products]
                # a column of ones carries the constant: cheaper than adding it to all scores
                one = torch.ones(len(u), 1)
                score = torch.cat([*terms, one], 1) @ torch.cat([*table, constant[None]])
            best = torch.from_numpy(score.numpy().argmin(1).astype(np.int32))
            found.append(best)
            if full and self.dim < WIDTH:
                level = level.clone()
                level[:, cut] = self._signed(best, sign[:, cut])
        return torch.stack(found, 1)

    def _flip(self, u: Tensor, sign: Tensor, level: Tensor, metric: Tensor, full: bool) -> Tensor:
        """Flip the one sign (the two, where even) that helps most, in place; -> rows changed."""
        miss = u - level
        pulled = miss @ metric if full else miss * metric
        diagonal = metric.diagonal() if full else metric
        cost = 4 * level * (pulled + level * diagonal)
        if self.signs == "free":
            least, which = cost.min(1)
            moves = which[:, None]
        else:
            first, second = (list(t) for t in zip(*_pairs(WIDTH), strict=True))
            cost = cost[:, first] + cost[:, second]
            if full:
                cost.add_(8 * level[:, first] * level[:, second] * metric[first, second])
            least, which = cost.min(1)
            moves = torch.tensor(_pairs(WIDTH))[which]
        changed = (least < -1e-6 * cost.abs().amax(1)).nonzero()[:, 0]
        for k in range(moves.shape[1]):
            at = (changed, moves[changed, k])
            sign[at] = -sign[at]
            level[at] = -level[at]
        return changed

    def levels_of(self, codes: Tensor, lattice: Lattice) -> Tensor:
        """codes -> levels with their groups' shifts, (rows, columns) float32."""
        level = self.decode(codes)
        if len(lattice.stored) > 2:
            shift = lattice.stored[2].reshape(len(codes), -1, 1)
            level.view(len(codes), -1, self.group).add_(shift)
        return level

    def values(self, codes: Tensor, lattice: Lattice) -> Tensor:
        """codes (rows, columns / dim) -> float32 weights, as llama.cpp reads them."""
        level = self.levels_of(codes, lattice)
        level.view(len(codes), -1, self.group).mul_(lattice.step[:, :, None])
        return level

    # -- scales ---------------------------------------------------------------

    def lattice(self, stored: tuple[Tensor, ...]) -> Lattice:
        """(d, s) or (d, s, shift) -> lattice."""
        step = (stored[0] * self.unit)[..., None] * (2 * stored[1] + 1)
        return Lattice(step.reshape(len(step), -1), None, stored)

    def integer(self, step: Tensor, d: Tensor) -> Tensor:
        """The integer scale whose step is nearest the wanted one, given d, of like shape."""
        ratio = scales.safe_ratio(step, d * self.unit)
        return ((ratio - 1) / 2).round().clamp(0, self.top)

    def fit(self, w: Array, importance: Array | None = None) -> Lattice:
        """Scales for w (rows, columns) that make the weighted squared error small.

        As `Grid.fit`: steps of groups are searched freely, as if each weight chose its level
        by itself, then rounded to what is stored; then integers and d are polished in turn,
        on the error of the codewords found anew.
        """
        t = rows_of(w, self)
        weight = importance_of(importance, t)
        size = max(1, CHUNK // t.shape[1])
        return join(
            [
                self._fit_chunk(t[i : i + size], balanced(weight, t, i, i + size, self.group))
                for i in range(0, len(t), size)
            ]
        )

    def _fit_chunk(self, x: Tensor, weight: Tensor) -> Lattice:
        blocks = (len(x), -1, self.block // self.group)
        x, weight = x.reshape(-1, self.group), weight.reshape(-1, self.group)
        peak = x.abs().amax(1, keepdim=True)
        best = torch.full_like(peak, -1.0)
        step, shift = torch.zeros_like(peak), torch.full_like(peak, self.shifts[0])
        for landing, offer in product(self.landings, self.shifts):
            level = self._alone(scales.safe_ratio(x, peak / landing) - offer) + offer
            weighted = weight * level
            along = (weighted * x).sum(1, keepdim=True)
            fit = scales.safe_ratio(along, (weighted * level).sum(1, keepdim=True)).clamp(min=0)
            gain = fit * along
            better = gain > best
            best = torch.where(better, gain, best)
            step, shift = torch.where(better, fit, step), torch.where(better, offer, shift)
        wanted = step.view(blocks)
        d = scales.half(wanted.amax(2) / (self.unit * (2 * self.top + 1)))
        stored = [d, self.integer(wanted, d[..., None])]
        if len(self.shifts) > 1:
            stored.append(shift.view(blocks))
        level, best = self._errors(x, weight, stored)
        for _ in range(ROUNDS):
            stored, level, best = self._polish(x, weight, stored, level, best)
        return self.lattice(tuple(stored))

    def _alone(self, u: Tensor) -> Tensor:
        """The nearest level of each weight by itself: a codebook's coarse but quick stand-in."""
        size = u if self.signs == "none" else u.abs()
        level = self._all_levels[torch.bucketize(size, self._borders)]
        return level if self.signs == "none" else level.copysign_(u)

    @cached_property
    def _all_levels(self) -> Tensor:
        return torch.from_numpy(np.unique(self.book.numpy()))

    @cached_property
    def _borders(self) -> Tensor:
        return (self._all_levels[1:] + self._all_levels[:-1]) / 2

    def _levels(self, x: Tensor, weight: Tensor, step: Tensor, shift: Tensor) -> Tensor:
        """Nearest levels, shifts included; x, weight (n, group); step, shift (n, 1)."""
        u = (scales.safe_ratio(x, step) - shift).view(-1, WIDTH)
        return self.nearest(u, weight.view(-1, WIDTH))[1].view(x.shape) + shift

    def _errors(self, x: Tensor, weight: Tensor, stored: list[Tensor]) -> tuple[Tensor, Tensor]:
        """-> levels (groups, group) and the groups' errors (rows, blocks, groups)."""
        step = self.lattice(tuple(stored)).step.view(-1, 1)
        shift = stored[2].reshape(-1, 1) if len(stored) > 2 else torch.zeros_like(step)
        level = self._levels(x, weight, step, shift)
        return level, (weight * (x - step * level).square()).sum(1).view(stored[1].shape)

    def _polish(
        self, x: Tensor, weight: Tensor, start: list[Tensor], level: Tensor, best: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Neighbours of each integer (and other shifts), then d; kept where they help."""
        stored = list(start)
        moves = [(m, False) for m in (-1, 1)]
        if len(self.shifts) > 1:
            moves += [(m, True) for m in (-1, 0, 1)]
        for move, other in moves:
            tried = list(start)
            tried[1] = (start[1] + move).clamp(0, self.top)
            if other:
                tried[2] = sum(self.shifts) - start[2]
            its_level, its = self._errors(x, weight, tried)
            better = its < best
            best = torch.where(better, its, best)
            level = torch.where(better.view(-1, 1), its_level, level)
            for i in range(1, len(tried)):
                stored[i] = torch.where(better, tried[i], stored[i])
        a = (2 * stored[1] + 1).view(-1, 1) * self.unit * level
        across = (stored[0].numel(), -1)
        along = (weight * a * x).view(across).sum(1)
        norm = (weight * a * a).view(across).sum(1)
        fit = scales.half(scales.safe_ratio(along, norm).clamp(min=0)).view(stored[0].shape)
        its_level, its = self._errors(x, weight, [fit, *stored[1:]])
        better = its.sum(2) < best.sum(2)
        wide = better[..., None]
        level = torch.where(wide.expand_as(best).reshape(-1, 1), its_level, level)
        d = torch.where(better, fit, stored[0])
        return [d, *stored[1:]], level, torch.where(wide, its, best)

    # -- bytes ----------------------------------------------------------------

    @abstractmethod
    def write(self, codes: Tensor, lattice: Lattice) -> Bytes:
        """codes (rows, columns / dim) int32 and their lattice -> packed rows."""

    @abstractmethod
    def read(self, packed: Bytes, columns: int) -> tuple[Tensor, Lattice]:
        """Packed rows -> codes and lattice; the inverse of `write`."""

    def codes(self, w: Tensor, lattice: Lattice, weight: Tensor) -> Tensor:
        """w, weight (rows, columns) -> nearest codes on the lattice."""
        step = lattice.step[:, :, None]
        u = scales.safe_ratio(w.view(len(w), -1, self.group), step.expand(-1, -1, self.group))
        if len(lattice.stored) > 2:
            u = u - lattice.stored[2].reshape(len(w), -1, 1)
        return self.nearest(u.view(-1, WIDTH), weight.reshape(-1, WIDTH))[0].view(len(w), -1)

    def pack(self, w: Array, importance: Array | None = None) -> Bytes:
        t = rows_of(w, self)
        out = np.empty((t.shape[0], self.row_bytes(t.shape[1])), np.uint8)
        weight = importance_of(importance, t)
        size = max(1, CHUNK // t.shape[1])
        for start in range(0, len(t), size):
            x = t[start : start + size]
            its = balanced(weight, t, start, start + size, self.group)
            lattice = self._fit_chunk(x, its)
            out[start : start + size] = self.write(self.codes(x, lattice, its), lattice)
        return out

    def unpack(self, packed: Bytes, columns: int) -> np.ndarray:
        check_packed(packed, columns, self)
        out = np.empty((packed.shape[0], columns), np.float32)
        size = max(1, CHUNK // columns)
        for start in range(0, len(packed), size):
            codes, lattice = self.read(packed[start : start + size], columns)
            out[start : start + size] = self.values(codes, lattice).numpy()
        return out


def _pairs(n: int) -> list[tuple[int, int]]:
    return list(combinations(range(n), 2))


def _make_even(sign: Tensor, cost: Tensor) -> None:
    """Flip the cheapest sign of each row that has an odd number of negative ones."""
    odd = (sign.prod(1) < 0).nonzero()[:, 0]
    at = (odd, cost[odd].argmin(1))
    sign[at] = -sign[at]
