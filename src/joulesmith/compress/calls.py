"""How a module is called, and how its blocks are: arguments caught, products coarse where averages
are taken."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from joulesmith.calibrate import products
from joulesmith.errors import JoulesmithError

Batch = Tensor | Mapping[str, Any]
"""What the module is called with: a tensor, or named arguments."""


@contextmanager
def coarse() -> Iterator[None]:
    """Products in bfloat16 with float32 sums where the processor is faster at it.

    Moments are averages over thousands of vectors, whose own noise is far larger. Weights are
    converted once for all batches of the context, in which they must not change.
    """
    fast = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    with products("medium"), torch.autocast("cpu", torch.bfloat16, enabled=fast):
        yield


class ExactAttention(TorchFunctionMode):
    """Attention in full precision, which is also the faster one: coarse products convert each
    of its many small matrices."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with products("highest"):
            return func(*args, **(kwargs or {}))


class ReachedError(Exception):
    """Ends a forward pass at the layer whose input is wanted."""


@contextmanager
def _at(block: nn.Module, hook: Any) -> Iterator[None]:
    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def caught(
    module: nn.Module, first: nn.Module, batch: Batch
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the module calls its first block with."""
    found: list[tuple[Any, Any]] = []

    def catch(_: nn.Module, args: Any, kwargs: Any) -> None:
        found.append((args, kwargs))
        raise ReachedError

    with _at(first, catch), contextlib.suppress(ReachedError):
        call(module, batch)
    return found[0]


def _arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), dict(batch)) if isinstance(batch, Mapping) else ((batch,), {})


def call(module: nn.Module, batch: Batch) -> Any:
    """What the module gives; `JoulesmithError` where it does not take the batch."""
    args, kwargs = _arguments(batch)
    if kwargs and "use_cache" not in kwargs and hasattr(module, "generate"):
        kwargs["use_cache"] = False
    try:
        return module(*args, **kwargs)
    except (TypeError, RuntimeError, IndexError, ValueError) as e:
        line = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise JoulesmithError(
            f"{type(module).__name__} cannot run the calibration data: {line}"
        ) from e


def hidden_of(out: Any) -> Tensor:
    """A block's hidden states: some give a tuple."""
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and (a is b or torch.equal(a, b))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a is b or (type(a) is type(b) and not isinstance(a, nn.Module) and bool(a == b))
