"""Linear layers that train on the grid that they will be stored in (quantization-aware training).

The weight that trains is a float one; what meets the input is that weight rounded, by steps that
train too (Esser et al. 2020, "Learned step size quantization", sections 2.1 and 2.2) and are
always ones that the grid stores: float16, say. So that the layer at the end is the one that was
trained, to the bit. Knows no models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from joulesmith.compress.quantize.grids import Bytes, Grid, Lattice, check_packed, grid
from joulesmith.compress.quantize.integers import IntGrid
from joulesmith.compress.quantize.lsq import lsq
from joulesmith.compress.quantize.tiles import Levels, group
from joulesmith.errors import JoulesmithError


class _Stored(torch.autograd.Function):
    """Steps -> the nearest that are stored; the gradient passes. One that would be 0 stays what it
    was at first."""

    @staticmethod
    def forward(ctx: Any, step: Tensor, first: Tensor, g: Grid) -> Tensor:
        stored = g.storable(step)
        return torch.where(stored == 0, first, stored)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        return upstream[0], None, None


class QuantizedLinear(nn.Linear):
    """``y = round(W) x + b`` with a step for each group of a row; made by `quantize`.

    weight: what is rounded. log_step (groups,): natural logarithm of each step over its first, so
    that one learning rate suits all. zero: as in the grid, whole and fixed, or None.
    """

    grid: Grid
    levels: Levels
    first: Tensor
    zero: Tensor | None
    log_step: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs)."""
        return linear(x, self.rounded(), self.bias)

    def steps(self) -> tuple[Tensor, Tensor | None]:
        """Steps and offsets as stored, (groups,) each."""
        wanted = self.first * self.log_step.exp()
        step: Tensor = _Stored.apply(wanted, self.first, self.grid)  # type: ignore[no-untyped-call]
        return step, None if self.zero is None else -self.zero * step

    def rounded(self) -> Tensor:
        """(outputs, inputs), differentiable in weight and steps."""
        step, offset = self.steps()
        return lsq(self.weight, step, self.levels, group(self.grid.group), offset=offset)

    @torch.no_grad()
    def packed(self) -> Bytes:
        """The rounded weight as the grid stores it, (outputs, row bytes)."""
        rows = self.out_features
        step, offset = self.steps()
        lattice = self.grid.snap(
            step.float().cpu().view(rows, -1),
            None if offset is None else offset.float().cpu().view(rows, -1),
        )
        return self.grid.write(
            self.grid.codes(self.weight.detach().float().cpu(), lattice), lattice
        )


def quantize(
    layer: nn.Linear, kind: str, packed: Bytes | None = None, *, keep_zeros: bool = True
) -> QuantizedLinear:
    """Turn ``layer`` into a `QuantizedLinear`, in place.

    kind: an integer grid ("INT4-G32", "INT3-G64-ZP"), or another whose groups own their scale and
    have no offset ("Q4_0", "TQ2_0", "NVFP4", "NF4-G64"). packed: the weight in that grid, torch's
    rows, whose scales are the first; None to fit them.

    Raises `JoulesmithError` for other grids, rows that do not cut into its groups, weights that
    are not finite, and zeros to be kept on a grid that has none.
    """
    g = grid(kind)
    if not isinstance(g, Grid) or not (isinstance(g, IntGrid) or (g.free_scales and not g.affine)):
        raise JoulesmithError(
            f"{kind} does not train: its groups share scales or have offsets: give INT4-G32, "
            "INT4-G32-ZP, Q4_0 or the like"
        )
    w = layer.weight
    if packed is None:
        lattice: Lattice = g.fit(w)
    else:
        check_packed(packed, layer.in_features, g)
        lattice = g.read(packed, layer.in_features)[1]
    step = lattice.step.flatten()
    spare = step[step != 0].abs().mean() if bool((step != 0).any()) else torch.tensor(1.0)
    step = torch.where(step == 0, g.storable(spare), step)  # groups of zeros alone
    zero = lattice.stored[1].flatten() if isinstance(g, IntGrid) and g.affine else None
    layer.__class__ = QuantizedLinear
    assert isinstance(layer, QuantizedLinear)
    layer.grid = g
    layer.levels = Levels(g.levels[g.first], g.levels[g.last], g.affine, g.nearest_level)
    layer.register_buffer("first", step.to(w.device), persistent=False)
    layer.register_buffer("zero", None if zero is None else zero.to(w.device), persistent=False)
    layer.log_step = nn.Parameter(torch.zeros_like(layer.first))
    with torch.no_grad():
        if keep_zeros and bool((layer.rounded()[w == 0] != 0).any()):
            take_off(layer)
            raise JoulesmithError(f"{kind} has no zero: weights that are pruned cannot stay so")
    return layer


def take_off(layer: QuantizedLinear) -> nn.Linear:
    """Back to a linear layer with the float weight, in place."""
    del layer.grid, layer.levels, layer.first, layer.zero, layer.log_step
    plain: nn.Linear = layer
    plain.__class__ = nn.Linear
    return plain


@torch.no_grad()
def settle(layer: QuantizedLinear) -> Bytes:
    """Back to a linear layer whose weight is the rounded one, in place; and that one packed."""
    g, raw = layer.grid, layer.packed()
    layer.weight.copy_(torch.from_numpy(g.unpack(raw, layer.in_features)))
    take_off(layer)
    return raw
