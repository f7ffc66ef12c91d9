"""Integer grids whose scales come from a named way of choosing ranges, for recipes.

`ranges`, `lsq` and `second_order` choose; what they choose is brought to the values
that the grid stores, and codes are then rounded to these scales, which stay. Without a name,
`gptq` searches scales under the Hessian itself and moves them with the codes. Knows no model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from joulesmith.compress.quantize import lsq, ranges, scales, second_order
from joulesmith.compress.quantize.gptq import ROWS, Curvature, feedback_codes
from joulesmith.compress.quantize.grids import Bytes, Format, Lattice, rows_of
from joulesmith.compress.quantize.integers import IntGrid
from joulesmith.compress.quantize.refine import descend
from joulesmith.compress.quantize.tiles import Levels, Range, group
from joulesmith.errors import JoulesmithError

Ranges = Literal["absmax", "percentile", "mse", "lsq", "second-order"]
"""Ways by the names that recipes give them; `entropy.kl` is for activations, see `activations`."""
WAYS: tuple[str, ...] = get_args(Ranges)


def check(kind: Format, way: str) -> IntGrid:
    """``kind``, proven to be one whose ranges can be chosen. Raises `JoulesmithError`."""
    if way not in WAYS:
        raise JoulesmithError(f"no way to choose ranges is called {way!r}: {', '.join(WAYS)}")
    if not isinstance(kind, IntGrid):
        raise JoulesmithError(
            f"ranges: {way} is for integers by group (INT4-G64 ...), and {kind.name} searches its "
            "own scales: leave ranges out"
        )
    return kind


def lattice_of(w: Tensor, g: IntGrid, way: str, curve: Curvature | None) -> Lattice:
    """w (rows, n) float32 -> its scales by that way, as ``g`` stores them.

    curve: the layer's; its diagonal weights the errors of "mse" and "lsq", all of it those of
    "second-order". Without it errors count alike, and "second-order" is "mse".
    """
    levels = levels_of(g)
    by_group = group(g.group)
    weight = None if curve is None else curve.importance.expand_as(w)
    if way == "second-order" and curve is not None:
        found: Range = second_order.curved(w, curve.hessian, levels, g.group)[0]
    else:
        ways: dict[str, Callable[[], Range]] = {
            "absmax": partial(ranges.absmax, w, levels, by_group),
            "percentile": partial(ranges.percentile, w, levels, by_group),
            "mse": partial(ranges.mse, w, levels, by_group, weight=weight, snap=scales.half),
            "second-order": partial(ranges.mse, w, levels, by_group, snap=scales.half),
            "lsq": partial(lsq.learned, w, levels, by_group, weight=weight),
        }
        found = ways[way]()
    step = found.step.view(len(w), -1)
    if g.symmetric:
        return g.snap(step, None)
    return g.snap(step, -found.zero.view(len(w), -1) * step)


def levels_of(g: IntGrid) -> Levels:
    """The levels of an integer grid as `tiles` has them."""
    if g.name.startswith("TERNARY"):
        return Levels.ternary()
    return Levels.integers(g.bits, affine=not g.symmetric)


def round_chosen(
    weight: Tensor, curve: Curvature | None, kind: Format, way: str, *, sweeps: int | None
) -> Bytes:
    """weight (rows, columns) float32 -> packed uint8 (rows, row bytes) under chosen scales.

    sweeps: of coordinate descent on codes after error feedback; None, or no curve, rounds to
    nearest. Errors: those of `check` and of `Format.pack`.
    """
    g = check(kind, way)
    w = rows_of(weight, g)
    lattice = lattice_of(w, g, way, curve)
    if curve is None or sweeps is None:
        return g.write(g.codes(w, lattice), lattice)
    fixed = copy.copy(g)
    vars(fixed).update(free_scales=False)
    codes = torch.empty(w.shape, dtype=torch.uint8)
    for start in range(0, len(w), ROWS):
        cut = slice(start, min(start + ROWS, len(w)))
        part = lattice.rows(cut.start, cut.stop)
        first = feedback_codes(w[cut], curve, fixed, part)
        codes[cut] = descend(w[cut], curve.hessian, fixed, first, part, sweeps=sweeps)[0]
    return g.write(codes, lattice)
