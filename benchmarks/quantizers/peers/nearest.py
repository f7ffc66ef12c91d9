"""The floor: every weight to the nearest code, scales from the largest magnitude."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.quantizers.peers.common import installed, linears, load_llama, plain_logits
from benchmarks.quantizers.settings import Setting


def load(folder: Path, task: dict[str, Any]) -> Any:
    """The float model."""
    return load_llama(folder)


def warm_imports() -> None:
    """Nothing more to import."""


def rounded(weight: Any, setting: Setting) -> Any:
    """weight (rows, columns) float32 -> nearest storable values; float16 scales."""
    import torch

    rows, columns = weight.shape
    x = weight.reshape(rows, columns // setting.group, setting.group)
    top = (1 << setting.bits) - 1
    if setting.symmetric:
        step = x.abs().amax(-1, keepdim=True) / (top / 2)
    else:
        low = x.amin(-1, keepdim=True).clamp(max=0)
        step = (x.amax(-1, keepdim=True).clamp(min=0) - low) / top
    step = step.half().float().clamp(min=2**-24)
    if setting.symmetric:
        half = 1 << (setting.bits - 1)
        return ((x / step).round().clamp(-half, half - 1) * step).reshape(rows, columns)
    zero = torch.round(-low / step).clamp(0, top)
    code = ((x / step).round() + zero).clamp(0, top)
    return ((code - zero) * step).reshape(rows, columns)


def quantize(model: Any, windows: Any, setting: Setting, variant: str, seed: int) -> Any:
    """In place; ``windows`` and ``seed`` are without effect."""
    for layer in linears(model).values():
        layer.weight.data.copy_(rounded(layer.weight.data, setting))
    return model


def weights(quantized: Any, setting: Setting, variant: str) -> tuple[dict[str, Any], float, str]:
    """Of the module."""
    words = "absmax" if setting.symmetric else "min and max"
    return quantized.state_dict(), setting.stored_bits(), f"{words}, float16 scales"


def forward(quantized: Any, ids: Any) -> Any:
    """Logits of the module itself."""
    return plain_logits(quantized, ids)


def versions() -> str:
    """Of what was compared."""
    return installed("torch")
