"""A small quantized model with its ONNX folder, and what an engine is fed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from joulesmith.compress.quantize.grids import grid
from joulesmith.models import Model, set_gguf_weight

KINDS = {
    "attn_q": "INT4-G32", "attn_k": "INT8-G32", "attn_v": "INT8-G16-ZP", "attn_output": "INT4-G16-ZP",
    "ffn_gate": "INT4-G64", "ffn_up": "INT4-G32-ZP", "ffn_down": "INT4-G32-ZP",
}  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """folder: ONNX, of the model with ``packed``. bytes: what the exporter returned."""

    model: Model
    packed: dict[str, tuple[str, Any]]
    folder: Path
    bytes: int

    def judged(self, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Logits of torch on the weights that the file holds, float16 where not packed."""
        import torch

        before = {n: p.detach().clone() for n, p in self.model.module.named_parameters()}
        try:
            with torch.no_grad():
                for p in self.model.module.parameters():
                    p.copy_(p.half().float() if p.ndim > 1 else p)
                for name, (kind, rows) in self.packed.items():
                    back = grid(kind).unpack(rows, self.model.ref(name).shape[1])
                    set_gguf_weight(self.model, name, torch.from_numpy(back))
                return np.asarray(self.model.module(torch.from_numpy(tokens)).logits)
        finally:
            with torch.no_grad():
                for n, p in self.model.module.named_parameters():
                    p.copy_(before[n])


def inputs(model: Model, tokens: np.ndarray[Any, Any], past: int = 0) -> dict[str, Any]:
    """What an engine is fed: ``tokens`` after an empty cache."""
    c = model.module.config
    rows, n = tokens.shape
    empty = np.zeros((rows, c.num_key_value_heads, past, c.head_dim), np.float32)
    names = [
        f"past_key_values.{i}.{p}" for i in range(c.num_hidden_layers) for p in ("key", "value")
    ]
    return {
        "input_ids": tokens,
        "attention_mask": np.ones((rows, past + n), np.int64),
        "position_ids": np.arange(past, past + n)[None].repeat(rows, 0),
    } | dict.fromkeys(names, empty)
