"""Low-rank adapters of linear layers (Hu et al. 2021, "LoRA", section 4.1), put on and merged.

A layer keeps its place and its name; its class changes and changes back. Knows no models.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class LoraLinear(nn.Linear):
    """``y = (W + scale B A) x + b``; made by `adapt`.

    lora_a (rank, inputs) uniform, lora_b (outputs, rank) zero at first. Where W has zeros to keep,
    B A counts as zero there and the sum is made before it meets x.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale: float
    zero: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs)."""
        if self.zero is not None:
            return linear(x, self.weight + self.change(), self.bias)
        aside = linear(linear(x, self.lora_a), self.lora_b)
        return linear(x, self.weight, self.bias) + self.scale * aside

    def change(self) -> Tensor:
        """What is added to W, (outputs, inputs)."""
        with torch.autocast(self.weight.device.type, enabled=False):
            full = self.scale * (self.lora_b @ self.lora_a)
        return full if self.zero is None else full.masked_fill(self.zero, 0)


def adapt(
    layer: nn.Linear, rank: int, alpha: float, generator: torch.Generator, *, keep_zeros: bool
) -> LoraLinear:
    """Turn ``layer`` into a `LoraLinear`, in place; its output is what it was. generator: CPU."""
    w = layer.weight
    bound = 1 / math.sqrt(layer.in_features)  # as peft's: Kaiming's with a = sqrt(5)
    a = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
    zero = w.detach() == 0
    layer.__class__ = LoraLinear
    assert isinstance(layer, LoraLinear)
    layer.lora_a = nn.Parameter(a.to(w.device, w.dtype))
    layer.lora_b = nn.Parameter(torch.zeros(len(w), rank, device=w.device, dtype=w.dtype))
    layer.scale = alpha / rank
    layer.register_buffer(
        "zero", zero if keep_zeros and bool(zero.any()) else None, persistent=False
    )
    return layer


def take_off(layer: LoraLinear) -> nn.Linear:
    """Back to a linear layer as it was before `adapt`, in place."""
    del layer.lora_a, layer.lora_b, layer.scale, layer.zero
    plain: nn.Linear = layer
    plain.__class__ = nn.Linear
    return plain


@torch.no_grad()
def merge(layer: LoraLinear) -> nn.Linear:
    """Back to a linear layer whose weight is the nearest to W + scale B A, in place."""
    full = layer.scale * (layer.lora_b.double() @ layer.lora_a.double())
    if layer.zero is not None:
        full.masked_fill_(layer.zero, 0)
    layer.weight.copy_(layer.weight.double() + full)
    return take_off(layer)
