"""One forward pass of a module: logits, and what distillation matches inside. Knows no losses."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from joulesmith.errors import JoulesmithError


@dataclass(frozen=True)
class Outputs:
    """logits (n, length, vocab). hidden: the embedded tokens, then each layer's output (n, length,
    width). attention: of each layer (n, heads, length, length). Empty where not asked for."""

    logits: Tensor
    hidden: tuple[Tensor, ...] = ()
    attention: tuple[Tensor, ...] = ()


def run(
    module: nn.Module, tokens: Tensor, *, hidden: bool = False, attention: bool = False
) -> Outputs:
    """tokens: int64 (n, length), each row read from an empty context.

    module: of transformers, or any that takes tokens and returns logits or has them as ``logits``.
    Raises `JoulesmithError` where it does not give what is asked for.
    """
    config: Any = getattr(module, "config", None)
    if config is None:
        out: Any = module(tokens)
    else:
        given: dict[str, Any] = {"use_cache": False} if hasattr(config, "use_cache") else {}
        given |= {"output_hidden_states": True} if hidden else {}
        given |= {"output_attentions": True} if attention else {}
        out = module(input_ids=tokens, **given)
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    states = getattr(out, "hidden_states", None) if hidden else ()
    weights = getattr(out, "attentions", None) if attention else ()
    if logits is None:
        raise JoulesmithError(f"{type(module).__name__} gives no logits: distil a language model")
    if states is None or (hidden and not states):
        raise JoulesmithError(f"{type(module).__name__} gives no hidden states to match")
    if weights is None or any(w is None for w in weights) or (attention and not weights):
        raise JoulesmithError(
            f"{type(module).__name__} gives no attention weights: run it with eager attention"
        )
    return Outputs(logits, tuple(states), tuple(weights))


@contextmanager
def eager(*modules: nn.Module) -> Iterator[None]:
    """Attention that gives its weights, in modules of transformers; undone at the end."""
    usual: list[tuple[Any, str]] = []
    for m in modules:
        config: Any = getattr(m, "config", None)
        if config is not None and hasattr(m, "set_attn_implementation"):
            usual.append((m, config._attn_implementation))
            m.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        yield
    finally:
        for m, name in usual:
            m.set_attn_implementation(name)


@contextmanager
def fused(module: nn.Module, backend: str = "inductor") -> Iterator[bool]:
    """Training steps of a transformers module on a processor in about half the time: blocks
    compiled (`torch.compile`), which needs a C++ compiler and about a minute at the first steps,
    and attention written out, as the backward pass of torch's fused kernel is slow there. Undone at
    the end. backend: of `torch.compile`. Yields whether blocks are compiled; False where there is
    no compiler.

    For forward passes of changing shapes, and without gradients, use `plainly`.
    """
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    blocks = list(max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=[]))
    able = bool(blocks) and shutil.which(os.environ.get("CXX") or "g++") is not None
    with eager(module):
        if able:
            for block in blocks:
                block.compile(backend=backend)
        try:
            yield able
        finally:
            if able:
                for block in blocks:
                    block._compiled_call_impl = None


def plainly() -> Any:
    """A context in which nothing compiled is used."""
    return torch.compiler.set_stance("force_eager")


def even_spread(student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """Each of ``student`` layers with one of ``teacher``, both from 1: i with the nearest to
    i teacher / student, so that the last meet."""
    return tuple(
        (i, max(1, (2 * i * teacher + student) // (2 * student))) for i in range(1, student + 1)
    )


def device_of(module: nn.Module) -> torch.device:
    """Where its tokens go."""
    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def lockstep(module: nn.Module) -> bool:
    """Whether all ranks must call the module equally often: each holds a part of it."""
    return any(hasattr(p, "device_mesh") for p in module.parameters())
