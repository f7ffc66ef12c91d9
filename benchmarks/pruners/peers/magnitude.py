"""The floor: the smallest weights go, of each layer alike or of all layers together."""

from __future__ import annotations

from typing import Any

from benchmarks.pruners.settings import Setting
from benchmarks.quantizers.peers.common import linears, plain_logits
from benchmarks.quantizers.peers.nearest import load, versions, warm_imports

__all__ = ["forward", "load", "prune", "versions", "warm_imports", "weights"]

WORDS = {"layer": "each layer its share", "global": "one threshold for all layers"}


def smallest(size: Any, setting: Setting) -> Any:
    """size (rows, columns), not negative -> mask of what goes: the smallest, ties by place."""
    import torch

    if setting.group:
        rows, columns = size.shape
        whole = columns - columns % setting.group  # a short last group stays
        groups = size[:, :whole].reshape(rows, -1, setting.group)
        gone = torch.zeros_like(groups, dtype=torch.bool)
        order = groups.argsort(dim=-1, stable=True)
        gone.scatter_(-1, order[..., : setting.zeros], True)
        mask = torch.zeros_like(size, dtype=torch.bool)
        mask[:, :whole] = gone.reshape(rows, whole)
        return mask
    flat = size.flatten()
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.argsort(stable=True)[: round(setting.sparsity * flat.numel())]] = True
    return mask.reshape(size.shape)


def prune(model: Any, windows: Any, setting: Setting, variant: str, seed: int) -> Any:
    """In place; ``windows`` and ``seed`` are without effect."""
    import torch

    layers = [layer.weight.data for layer in linears(model).values()]
    if variant == "global":
        every = torch.cat([w.abs().flatten() for w in layers])[None]
        masks = smallest(every, setting)[0].split([w.numel() for w in layers])
        for w, mask in zip(layers, masks, strict=True):
            w[mask.reshape(w.shape)] = 0
        return model
    for w in layers:
        w[smallest(w.abs(), setting)] = 0
    return model


def weights(pruned: Any, setting: Setting, variant: str) -> tuple[dict[str, Any], str]:
    """Of the module."""
    return pruned.state_dict(), WORDS[variant]


def forward(pruned: Any, ids: Any) -> Any:
    """Logits of the module itself."""
    return plain_logits(pruned, ids)
