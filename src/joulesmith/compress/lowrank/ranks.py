"""Which rank each matrix gets: by parameters, by energy kept, or as given.

By parameters is the interesting one. Each matrix offers a curve, from rank 1 to left alone, of
numbers stored against damage; damages add up, and the budget goes to whoever loses
most by the next number saved. Knows numbers only: no tensors, no models.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from joulesmith.compress.lowrank.factors import stored
from joulesmith.errors import JoulesmithError


@dataclass(frozen=True)
class Curve:
    """What one matrix loses at each rank.

    energy (min(rows, columns),): damage that each further rank takes away, descending; in
    any unit that is the same for all matrices.
    """

    rows: int
    columns: int
    energy: NDArray[np.float64]

    @property
    def full(self) -> int:
        """The rank at which a matrix is left as it is."""
        return min(self.rows, self.columns)

    def damage(self) -> NDArray[np.float64]:
        """(full + 1,) by rank, from 0; nothing at full rank."""
        out = np.zeros(self.full + 1)
        out[:-1] = np.cumsum(np.asarray(self.energy, np.float64)[::-1])[::-1]
        return out


def choose_ranks(
    curves: Mapping[str, Curve],
    *,
    parameters: int | None = None,
    energy: float | None = None,
    given: Mapping[str, int] | None = None,
    pivoted: bool = True,
    uniform: bool = False,
    multiple: int = 1,
) -> dict[str, int]:
    """Name -> rank of each matrix; the full rank stands for "left as it is".

    parameters: numbers that all matrices together may hold. uniform: the same share of
    every matrix, else the ranks with the least summed damage (see `_allocate`).
    energy: share of each matrix's energy that is kept, in (0, 1]. given: ranks of some
    matrices, which the rule leaves alone; of all of them where there is no rule.
    multiple: ranks are multiples of it. Exactly one of ``parameters`` and ``energy``, or
    neither; a matrix that neither names stays whole.
    Raises `JoulesmithError` for unknown names, impossible ranks, shares or budgets.
    """
    given = dict(given or {})
    if parameters is not None and energy is not None:
        raise JoulesmithError("ranks follow parameters or energy, not both: give one")
    if multiple < 1:
        raise JoulesmithError(f"ranks cannot be multiples of {multiple}")
    for name, curve in curves.items():
        if len(curve.energy) != curve.full or not np.isfinite(curve.energy).all():
            raise JoulesmithError(f"{name} has no finite energy for each of {curve.full} ranks")
    for name, rank in given.items():
        if name not in curves:
            raise JoulesmithError(f"no matrix {name!r} to factor")
        if not 1 <= rank <= curves[name].full:
            raise JoulesmithError(f"rank {rank} of {name}: give 1 to {curves[name].full}")
    free = {n: c for n, c in curves.items() if n not in given}
    out = dict.fromkeys(curves, 0) | {n: c.full for n, c in free.items()} | given
    if energy is not None:
        if not 0 < energy <= 1:
            raise JoulesmithError(f"energy kept is a share above 0 and at most 1, not {energy}")
        out |= {n: _by_energy(c, energy, pivoted, multiple) for n, c in free.items()}
    elif parameters is not None:
        taken = sum(stored(curves[n].rows, curves[n].columns, r, pivoted=pivoted)
                    for n, r in given.items())  # fmt: skip
        if uniform:
            out |= _uniform(free, parameters - taken, pivoted, multiple)
        else:
            out |= _allocate(free, parameters - taken, pivoted, multiple)
    return out


def total(curves: Mapping[str, Curve], ranks: Mapping[str, int], *, pivoted: bool) -> int:
    """Numbers that the matrices hold at those ranks."""
    return sum(stored(c.rows, c.columns, ranks[n], pivoted=pivoted) for n, c in curves.items())


def _options(curve: Curve, pivoted: bool, multiple: int) -> list[tuple[int, int, float]]:
    """(rank, numbers, damage) by rank: all that are smaller than the matrix, then itself."""
    whole = curve.rows * curve.columns
    damage = curve.damage()
    least = min(multiple, curve.full)
    found = []
    for rank in range(least, curve.full, multiple):
        n = stored(curve.rows, curve.columns, rank, pivoted=pivoted)
        if n < whole:
            found.append((rank, n, float(damage[rank])))
    return [*found, (curve.full, whole, 0.0)]


def _by_energy(curve: Curve, share: float, pivoted: bool, multiple: int) -> int:
    allowed = (1 - share) * float(np.sum(curve.energy))
    return next(r for r, _, d in _options(curve, pivoted, multiple) if d <= allowed)


def _too_small(budget: int, least: int) -> JoulesmithError:
    return JoulesmithError(
        f"{budget} numbers are too few for the matrices: rank 1 of each takes {least}: "
        "keep more parameters"
    )


def _uniform(
    curves: Mapping[str, Curve], budget: int, pivoted: bool, multiple: int
) -> dict[str, int]:
    whole = sum(c.rows * c.columns for c in curves.values())
    options = {n: _options(c, pivoted, multiple) for n, c in curves.items()}
    out = {}
    for name, curve in curves.items():
        share = budget * curve.rows * curve.columns // max(whole, 1)
        fitting = [r for r, n, _ in options[name] if n <= share]
        if not fitting:
            raise _too_small(budget, sum(o[0][1] for o in options.values()))
        out[name] = fitting[-1]
    return out


def _allocate(
    curves: Mapping[str, Curve], budget: int, pivoted: bool, multiple: int
) -> dict[str, int]:
    """Least summed damage within the budget: greedy along each curve's lower convex hull.

    That is the Lagrangian's optimum for the budget at which it stops; what is left then
    (less than one hull step) goes to the best single moves that still fit. Against the true
    optimum only that last step can be lost (Everett 1963, theorem 1 and its corollary).
    """
    options = {n: _options(c, pivoted, multiple) for n, c in curves.items()}
    left = budget - sum(o[0][1] for o in options.values())
    if left < 0:
        raise _too_small(budget, budget - left)
    hulls = {n: _hull(o) for n, o in options.items()}
    at = dict.fromkeys(curves, 0)  # index into the hull, whose entries index the options
    heap = [(-_slope(options[n], h[0], h[1]), n) for n, h in hulls.items() if len(h) > 1]
    heapq.heapify(heap)
    chosen = dict.fromkeys(curves, 0)
    closed = []
    while heap:
        _, name = heapq.heappop(heap)
        o, hull = options[name], hulls[name]
        here, there = hull[at[name]], hull[at[name] + 1]
        if o[there][1] - o[here][1] > left:
            closed.append(name)
            continue
        left -= o[there][1] - o[here][1]
        chosen[name] = there
        at[name] += 1
        if at[name] + 1 < len(hull):
            nearer, further = hull[at[name]], hull[at[name] + 1]
            heapq.heappush(heap, (-_slope(o, nearer, further), name))
    for name in closed:  # the most wanted first
        o, here = options[name], chosen[name]
        fits = [i for i in range(here + 1, len(o)) if o[i][1] - o[here][1] <= left]
        if fits and o[fits[-1]][2] < o[here][2]:
            left -= o[fits[-1]][1] - o[here][1]
            chosen[name] = fits[-1]
    return {n: options[n][i][0] for n, i in chosen.items()}


def _slope(o: list[tuple[int, int, float]], here: int, there: int) -> float:
    """Damage saved per number."""
    return (o[here][2] - o[there][2]) / (o[there][1] - o[here][1])


def _hull(o: list[tuple[int, int, float]]) -> list[int]:
    """Indices of the lower convex hull of damage over numbers, both monotone."""
    hull: list[int] = []
    for i in range(len(o)):
        while len(hull) > 1 and _slope(o, hull[-2], hull[-1]) <= _slope(o, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull
