"""What a module and its products are in while they train. Knows no data and no optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from joulesmith.errors import JoulesmithError
from joulesmith.train.settings import TrainSettings


def out_of_memory(e: BaseException) -> bool:
    """Whether memory ended, of a GPU or of the machine: torch has no type of its own for that."""
    known = isinstance(e, (torch.OutOfMemoryError, MemoryError))
    return known or (isinstance(e, RuntimeError) and "DefaultCPUAllocator" in str(e))


@contextmanager
def fits() -> Iterator[None]:
    """What does not fit into memory inside is told as a `JoulesmithError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if not out_of_memory(e):
            raise
        raise JoulesmithError(
            "out of memory: give fewer windows a pass (--micro) or shorter ones (--length), "
            "--recompute, or a smaller model"
        ) from e


@contextmanager
def training(module: nn.Module, settings: TrainSettings) -> Iterator[None]:
    """Training mode and recomputed activations, undone at the end."""
    before = module.training
    config: Any = getattr(module, "config", None)
    recomputing: Any = module
    cache = getattr(config, "use_cache", None)
    module.train()
    if cache is not None:
        config.use_cache = False
    # transformers 5.18 and later have it under the second name
    word = next(
        (w for w in ("activation", "gradient") if hasattr(module, f"{w}_checkpointing_enable")),
        None,
    )
    if settings.recompute:
        if word is None:
            raise JoulesmithError(f"{type(module).__name__} cannot recompute its activations")
        getattr(recomputing, f"{word}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        if settings.recompute:
            getattr(recomputing, f"{word}_checkpointing_disable")()
        if cache is not None:
            config.use_cache = cache
        module.train(before)


def precision(settings: TrainSettings, device: torch.device) -> Any:
    """The context of a forward pass."""
    if settings.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
