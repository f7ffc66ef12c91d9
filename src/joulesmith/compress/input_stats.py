"""Moments of what linear layers read, summed as batches come."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class InputStats:
    """What a group of layers reads. gram: (n, n) E[x x^T] now; cross: (n, n) E[y x^T], y the
    same input of the module as it was, None where they are the same. mean, dense_mean: (n,) of
    both. squares: (n,) E[x^2]. count: vectors seen."""

    gram: Tensor
    cross: Tensor | None
    mean: Tensor
    dense_mean: Tensor
    count: int = 0

    @property
    def squares(self) -> Tensor:
        """(n,) E[x^2]."""
        return self.gram.diagonal()


class Sums:
    """Moments as batches come, summed about the first batch's means: products in bfloat16 would
    else lose the spread of inputs whose mean is far from zero."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, x: Tensor, y: Tensor | None) -> None:
        """x (n, columns) as it is by now; y as it was, None where there is no such pair."""
        if self.count == 0:
            n = x.shape[1]
            self.x0, self.x_sum, self.gram = x.mean(0), torch.zeros(n), torch.zeros(n, n)
            self.y0 = None if y is None else y.mean(0)
            self.y_sum, self.cross = torch.zeros(n), torch.zeros(n, n)
        x = x - self.x0
        self.gram.addmm_(x.T, x)
        self.x_sum += x.sum(0)
        self.count += len(x)
        if y is not None and self.y0 is not None:
            y = y - self.y0
            self.cross.addmm_(y.T, x)
            self.y_sum += y.sum(0)

    def done(self) -> InputStats:
        """The means, about zero again."""
        x, x0, y0 = self.x_sum / self.count, self.x0, self.y0
        gram = self.gram.div_(self.count)
        gram += torch.outer(x0, x) + torch.outer(x, x0) + torch.outer(x0, x0)
        if y0 is None:
            return InputStats(gram, None, x + x0, x + x0, self.count)
        y = self.y_sum / self.count
        cross = self.cross.div_(self.count)
        cross += torch.outer(y0, x) + torch.outer(y, x0) + torch.outer(y0, x0)
        return InputStats(gram, cross, x + x0, y + y0, self.count)
