"""Rows and columns of a linear layer that are wholly dead, left out of its products and of their
gradients while it trains. Knows layers and masks; not how masks come about."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from joulesmith.compress.layers import Linear

LEAST = 0.7
"""Share of the products that must be dead: picking live rows out of a matrix in both passes costs
more joules than fewer save (benchmarks/results/dead_rows.md)."""


class LiveRows:
    """Of the layers it is told of; only `torch.nn.Linear` itself is called in another way."""

    def __init__(self) -> None:
        self._changed: list[nn.Module] = []

    def update(self, layer: Linear, mask: Tensor) -> float:
        """mask: bool (outputs, inputs), whose dead weights are zero -> the share of the layer's
        products that is left out from here on."""
        owner = layer.owner
        if type(owner) is not nn.Linear:
            return 0.0
        self._undo(owner)
        rows, columns = mask.any(1), mask.any(0)
        left = float(rows.float().mean() * columns.float().mean())
        if 1 - left < LEAST:
            return 0.0
        device = owner.weight.device
        owner.forward = partial(  # type: ignore[method-assign]
            live_linear,
            owner,
            rows.nonzero()[:, 0].to(device) if not bool(rows.all()) else None,
            columns.nonzero()[:, 0].to(device) if not bool(columns.all()) else None,
        )
        self._changed.append(owner)
        return 1 - left

    def end(self) -> None:
        """Layers are called as before."""
        for owner in list(self._changed):
            self._undo(owner)

    def _undo(self, owner: nn.Module) -> None:
        owner.__dict__.pop("forward", None)
        self._changed = [m for m in self._changed if m is not owner]


def live_linear(layer: nn.Linear, rows: Tensor | None, columns: Tensor | None, x: Tensor) -> Tensor:
    """What the layer gives for x (..., inputs): its product with the rows and columns that are
    named (int64, None for all), the bias alone elsewhere -> (..., outputs). Gradients of what is
    left out are zero."""
    weight, bias = layer.weight, layer.bias
    if columns is not None:
        x, weight = x.index_select(-1, columns), weight.index_select(1, columns)
    if rows is None:
        return F.linear(x, weight, bias)
    y = F.linear(x, weight.index_select(0, rows), None if bias is None else bias[rows])
    if bias is None:
        whole = y.new_zeros(*y.shape[:-1], layer.out_features)
    else:
        whole = bias.to(y.dtype).expand(*y.shape[:-1], layer.out_features)
    return whole.index_copy(-1, rows, y)
