"""An optimizer that keeps states of live weights only. Knows masks; not why they move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from joulesmith.train.masks import pack, unpack
from joulesmith.train.optimizers import Several

MOVEMENT = "movement"
"""Name of the movement scores among a parameter's states."""


class Live(Several):
    """torch's own optimizer, one that treats each weight by itself (SGD, AdamW), on live weights.

    In a step it sees the live weights of a parameter as one vector; the dead ones are not touched,
    and stay zero. States are vectors of that length in the parameter's order; masks are held as
    bits.

    masks: parameter -> bool of its shape; dead weights become zero here. movement: also keep, of
    each live weight, the sum over steps of -w dL/dw (Sanh et al. 2020, "Movement pruning",
    equation 5 without its constant factor).
    """

    def __init__(
        self, inner: Optimizer, masks: Mapping[nn.Parameter, Tensor], movement: bool = False
    ) -> None:
        super().__init__([inner])
        self.movement = movement
        self.beside = {p: pack(m) for p, m in masks.items()}
        for p, mask in masks.items():
            p.data.masked_fill_(~mask, 0)

    def mask(self, p: nn.Parameter) -> Tensor:
        """bool, of the parameter's shape."""
        return unpack(self.beside[p], p.shape)

    def scores(self, p: nn.Parameter) -> Tensor:
        """Movement scores in the parameter's shape, 0 where it is dead or never had a gradient."""
        found = torch.zeros_like(p.data)
        if MOVEMENT in self.state.get(p, {}):
            found[self.mask(p)] = self.state[p][MOVEMENT]
        return found

    def mask_gradients(self) -> None:
        """Gradients of dead weights become zero."""
        for p in self.beside:
            if p.grad is not None:
                p.grad.masked_fill_(~self.mask(p), 0)

    def move(self, p: nn.Parameter, mask: Tensor) -> None:
        """Another mask: weights that die become zero; states of those that stay are kept, and
        those of new ones, which begin at zero, are zero."""
        before = self.mask(p)
        stays, known = mask[before], before[mask]
        for name, value in self.state.get(p, {}).items():
            if isinstance(value, Tensor) and value.shape == stays.shape:  # not the count of steps
                moved = value.new_zeros(known.shape)
                moved[known] = value[stays]
                self.state[p][name] = moved
        p.data.masked_fill_(~mask, 0)
        self.beside[p].copy_(pack(mask))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Of live weights. Gradients are left as they were."""
        dense: dict[nn.Parameter, tuple[Tensor, Tensor, Tensor]] = {}
        moved: dict[nn.Parameter, Tensor] = {}
        for p in self.beside:
            if p.grad is None:
                continue
            mask = self.mask(p)
            dense[p] = p.data, p.grad, mask
            p.grad = None
            p.data = dense[p][0][mask]
            p.grad = dense[p][1][mask]
            if self.movement:
                moved[p] = -p.data * p.grad
        try:
            super().step(closure)
        finally:
            for p, (data, grad, mask) in dense.items():
                data[mask] = p.data
                p.grad = None
                p.data = data
                p.grad = grad
        for p, score in moved.items():  # an optimizer takes a state that is there for its own
            self.state[p][MOVEMENT] = self.state[p].get(MOVEMENT, 0) + score
