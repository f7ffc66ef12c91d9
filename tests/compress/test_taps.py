"""Hearing what reaches linear layers, fused experts too."""

from __future__ import annotations

import torch
from torch import Tensor

from joulesmith.compress.layers import linears_of
from joulesmith.compress.taps import experts_one_by_one, tapped
from small_modules import language, mlp, tokens


def test_inputs_and_outputs() -> None:
    module = mlp()
    layers = linears_of(module)
    heard: dict[str, tuple[Tensor, Tensor]] = {}
    order: list[str] = []

    def after(name: str, x: Tensor, out: Tensor) -> Tensor | None:
        heard[name] = x.clone(), out.clone()
        return out + 1 if name == "4" else None

    x = torch.randn(5, 12)
    with tapped(layers, before=lambda n, _: order.append(n), after=after):
        changed = module(x)
    assert order == ["0", "2", "4"]
    torch.testing.assert_close(changed, module(x) + 1)
    for name, (a, out) in heard.items():
        layer = layers[name]
        assert layer.bias is not None
        torch.testing.assert_close(a @ layer.matrix.T + layer.bias, out)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_experts() -> None:
    module = language("mixtral")
    layers = {n: x for n, x in linears_of(module).items() if x.expert is not None}
    heard: dict[str, int] = {}

    def after(name: str, x: Tensor, out: Tensor) -> None:
        heard[name] = heard.get(name, 0) + len(x)
        torch.testing.assert_close(x @ layers[name].matrix.T, out)

    kind = module.config._experts_implementation
    with torch.no_grad(), experts_one_by_one(module), tapped(layers, after=after):
        module(input_ids=tokens())
    assert module.config._experts_implementation == kind
    for part in ("gate_up_proj", "down_proj"):
        for layer in range(2):
            whole = [n for n in heard if f"layers.{layer}." in n and part in n]
            assert sum(heard[n] for n in whole) == 60 * 2, "each token goes to two experts"
