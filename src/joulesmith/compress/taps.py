"""What reaches linear layers and what they give, as data passes: of modules by hooks, of fused
experts by the multiplication itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from joulesmith.compress.layers import Linear

Before = Callable[[str, Tensor], None]
"""Called with a layer's name and its input."""
After = Callable[[str, Tensor, Tensor], "Tensor | None"]
"""Called with a layer's name, its input and its output; may give another output."""


@contextmanager
def tapped(
    layers: Mapping[str, Linear], *, before: Before | None = None, after: After | None = None
) -> Iterator[None]:
    """Listen to these layers inside the context."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            if layer.expert is not None:
                continue
            if before is not None:

                def enter(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                    before(name, args[0])

                stack.callback(layer.owner.register_forward_pre_hook(enter).remove)
            if after is not None:

                def leave(
                    _: nn.Module, args: tuple[Any, ...], out: Tensor, name: str = name
                ) -> Tensor | None:
                    return after(name, args[0], out)

                stack.callback(layer.owner.register_forward_hook(leave).remove)
        if any(x.expert is not None for x in layers.values()):
            stack.enter_context(_Experts(layers, before, after))  # type: ignore[no-untyped-call]
        yield


class _Experts(TorchFunctionMode):
    """Knows the weights of an expert by where they lie: a slice of the fused parameter."""

    def __init__(
        self, layers: Mapping[str, Linear], before: Before | None, after: After | None
    ) -> None:
        super().__init__()
        self.before, self.after = before, after
        self.names = {
            x.matrix.data_ptr(): name for name, x in layers.items() if x.expert is not None
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = None
        if func is nn.functional.linear and len(args) > 1:
            name = self.names.get(args[1].data_ptr())
        if name is not None and self.before is not None:
            self.before(name, args[0])
        out = func(*args, **(kwargs or {}))
        if name is None or self.after is None:
            return out
        other = self.after(name, args[0], out)
        return out if other is None else other


@contextmanager
def experts_one_by_one(module: nn.Module) -> Iterator[None]:
    """transformers multiplies all experts at once unless told otherwise; here each by itself."""
    config, put = (
        getattr(module, "config", None), getattr(module, "set_experts_implementation", None)
    )  # fmt: skip
    before = getattr(config, "_experts_implementation", None)
    if put is None or before in (None, "eager"):
        yield
        return
    put("eager")
    try:
        yield
    finally:
        put(before)
