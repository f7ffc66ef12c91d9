"""What the peers share: loading the float model, names of its matrices, package versions."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any


def load_llama(folder: Path, attention: str = "eager") -> Any:
    """The float32 model of the folder, in eval mode, on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation=attention
    )
    model.config.use_cache = False  # calibration replays layers, and a cache would grow
    return model.eval()


def linears(model: Any) -> dict[str, Any]:
    """name -> linear layer inside the decoder blocks: what every peer quantizes."""
    import torch

    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and ".layers." in name
    }


def installed(*names: str) -> str:
    """ "llmcompressor 0.14.0, torch 2.13.0"."""
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} absent")
    return ", ".join(found)


def plain_logits(model: Any, ids: Any) -> Any:
    """Logits of a module, without gradients."""
    import torch

    with torch.no_grad():
        return model(input_ids=ids).logits
