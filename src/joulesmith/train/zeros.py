"""Weights that are zero stay zero while the others train, by any optimizer. A hook of the loop;
knows no models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from joulesmith.train.masks import pack, unpack


class KeepZeros:
    """Of the matrices among ``parameters``, as they are now; vectors are left alone.

    Gradients there do not count in the clip, and weights are put back to zero after each step,
    since some optimizers move a weight whose gradient is zero. One bit a weight of matrices that
    have zeros.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._bits: dict[nn.Parameter, Tensor] = {}
        for p in parameters:
            self._look(p)

    def _look(self, p: nn.Parameter) -> None:
        zero = local(p.detach()) == 0
        if p.ndim >= 2 and bool(zero.any()):
            self._bits[p] = pack(zero)

    def moved(self, pairs: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """Other parameters train in the place of those, or parts of them on this rank."""
        before, self._bits = self._bits, {}
        for p in before:
            self._look(pairs.get(p, p))

    def zeros(self) -> dict[nn.Parameter, Tensor]:
        """Matrix -> what stays zero, bool of its shape."""
        return {p: self._zero(p) for p in self._bits}

    def _zero(self, p: nn.Parameter) -> Tensor:
        return unpack(self._bits[p], local(p.detach()).shape)

    @property
    def identity(self) -> str:
        """Which zeros is told by the module."""
        return "keep zeros"

    def wrap(self, optimizer: Optimizer) -> Optimizer:
        """The same."""
        return optimizer

    def before(self, step: int) -> None:
        """No gradient by what stays zero."""
        for p in self._bits:
            if p.grad is not None:
                local(p.grad).masked_fill_(self._zero(p), 0)

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Zeros again."""
        for p in self._bits:
            local(p).masked_fill_(self._zero(p), 0)

    def state(self) -> dict[str, Any]:
        """Nothing: what is kept follows from the module that the training starts from."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


def local(t: Tensor) -> Tensor:
    """This rank's part of a tensor, or all of it where it is whole."""
    found: Tensor = t.to_local() if hasattr(t, "to_local") else t  # type: ignore[operator]
    return found
