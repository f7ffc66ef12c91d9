"""Weights that are zero stay zero while the others train. A hook of the loop; knows no models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class KeepZeros:
    """Of the matrices among ``parameters``, as they are now; vectors are left alone.

    Gradients are zero there when the loop takes their norm, and weights are put back to zero after
    each step, since some optimizers move a weight whose gradient is zero. Masks take one byte a
    weight, of matrices that have zeros.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.masks: list[tuple[nn.Parameter, Tensor]] = []
        self._handles: list[Any] = []
        for p in parameters:
            zero = p.detach() == 0
            if p.ndim < 2 or not bool(zero.any()):
                continue
            self.masks.append((p, zero))
            if p.requires_grad:
                hook = _masked(zero)
                handle = p.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                self._handles.append(handle)

    def before(self, step: int) -> None:
        """Nothing."""

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Zeros again."""
        for p, zero in self.masks:
            p.masked_fill_(zero, 0)

    def state(self) -> dict[str, Any]:
        """Nothing: masks follow from the module that the training starts from."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Nothing."""

    def remove(self) -> None:
        """Gradients are let through again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _masked(zero: Tensor) -> Any:
    def mask(p: Tensor) -> None:
        if p.grad is not None:
            p.grad.masked_fill_(zero, 0)

    return mask
