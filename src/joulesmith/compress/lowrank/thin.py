"""A linear layer kept as two thin ones, and the way back. Knows no calibration and no files."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from joulesmith.compress.lowrank.factors import Factors


class ThinLinear(nn.Module):
    """``y = outer (inner x) + bias``, or pivoted ``y = outer (x_p + inner x_rest) + bias``.

    Shapes as `Factors` has them. ``weight`` is the product, made anew at each look, for
    exporters that store one matrix; writing to it raises RuntimeError rather than being lost.
    """

    factored = True

    def __init__(
        self, outer: Tensor, inner: Tensor, order: Tensor | None, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.outer = nn.Parameter(outer.contiguous(), requires_grad=False)
        self.inner = nn.Parameter(inner.contiguous(), requires_grad=False)
        self.order: Tensor | None
        self.register_buffer("order", order)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = self.factors.shape

    @classmethod
    def of(cls, factors: Factors, linear: nn.Linear) -> ThinLinear:
        """In place of ``linear``: its dtype, device and bias."""
        w = linear.weight
        bias = None if linear.bias is None else linear.bias.detach()
        order = None if factors.order is None else factors.order.to(w.device)
        return cls(
            factors.outer.to(w.device, w.dtype), factors.inner.to(w.device, w.dtype), order, bias
        )

    @property
    def factors(self) -> Factors:
        """As stored."""
        return Factors(self.outer.detach(), self.inner.detach(), self.order)

    @property
    def rank(self) -> int:
        """Width between the two."""
        return int(self.outer.shape[1])

    @property
    def weight(self) -> Tensor:
        """(rows, columns), the product; read only."""
        with torch.inference_mode():
            return nn.Parameter(self.factors.dense(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., columns) -> (..., rows)."""
        if self.order is None:
            between = nn.functional.linear(x, self.inner)
        else:
            x = x.index_select(-1, self.order)
            between = x[..., : self.rank] + nn.functional.linear(x[..., self.rank :], self.inner)
        return nn.functional.linear(between, self.outer, self.bias)

    def extra_repr(self) -> str:
        how = "plain" if self.order is None else "pivoted"
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, {how}"


def place(module: nn.Module, name: str, factors: Factors, *, keep: bool) -> None:
    """Put factors in place of the linear layer ``name``, as `ThinLinear` or as their product."""
    linear = module.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{name} is a {type(linear).__name__}, no linear layer")
    if keep:
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, ThinLinear.of(factors, linear))
        return
    with torch.no_grad():
        linear.weight.copy_(factors.dense())


def merge(module: nn.Module) -> int:
    """Turn every `ThinLinear` back into one `nn.Linear`, in place; returns how many."""
    found = [(n, m) for n, m in module.named_modules() if isinstance(m, ThinLinear)]
    for name, thin in found:
        linear = nn.Linear(
            thin.in_features, thin.out_features, bias=thin.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(thin.factors.dense(), requires_grad=False)
        if thin.bias is not None:
            linear.bias = thin.bias
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, linear)
    return len(found)
