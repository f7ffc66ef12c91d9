"""Dead rows and columns left out: the same numbers, fewer products."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from joulesmith.compress.layers import linears_of
from joulesmith.train import live_rows, losses
from joulesmith.train.live_rows import LiveRows
from joulesmith.train.loop import train
from joulesmith.train.settings import TrainSettings
from joulesmith.train.sparse import SparseTraining
from joulesmith.train.sparse_settings import SparseSettings

MASKS = {
    "rows": ((1, 4, 5), ()),
    "columns": ((), (0, 2, 7)),
    "both": ((0, 7), (3, 4)),
    "all": (tuple(range(8)), ()),
}


def one(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8, bias=bias))


@pytest.fixture
def any_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few dead rows are left out too."""
    monkeypatch.setattr(live_rows, "LEAST", 0.01)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("which", MASKS)
def test_the_same_as_dense(which: str, bias: bool, any_share: None) -> None:
    rows, columns = MASKS[which]
    module, peer = one(bias), one(bias)
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[list(rows)] = False
    mask[:, list(columns)] = False
    for m in (module, peer):
        with torch.no_grad():
            m[0].weight.mul_(mask)
    live = LiveRows()
    left_out = live.update(linears_of(module)["0"], mask)
    assert left_out == pytest.approx(1 - (8 - len(rows)) * (8 - len(columns)) / 64)
    x = torch.randn(3, 5, 8, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    a, b = module(x), peer(y)
    torch.testing.assert_close(a, b)
    upstream = torch.randn_like(a)
    a.backward(upstream)
    b.backward(upstream)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(module[0].weight.grad, peer[0].weight.grad * mask)
    if bias:
        torch.testing.assert_close(module[0].bias.grad, peer[0].bias.grad)
    live.end()
    assert "forward" not in module[0].__dict__


def test_half_precision_under_autocast(any_share: None) -> None:
    module = one()
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[:4] = False
    live = LiveRows()
    live.update(linears_of(module)["0"], mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(torch.randn(2, 8)).dtype == torch.bfloat16


def test_few_dead_rows_are_left_in() -> None:
    module = nn.Sequential(nn.Linear(8, 64))
    mask = torch.ones(64, 8, dtype=torch.bool)
    mask[: int(64 * live_rows.LEAST) - 1] = False
    live = LiveRows()
    assert live.update(linears_of(module)["0"], mask) == 0
    assert "forward" not in module[0].__dict__


def products(module: nn.Module) -> list[int]:
    """Sizes of the matrices that a forward pass multiplies with."""
    from torch.overrides import TorchFunctionMode

    seen: list[int] = []

    class Counting(TorchFunctionMode):
        def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if f is nn.functional.linear:
                seen.append(args[1].numel())
            return f(*args, **(kwargs or {}))

    with Counting():
        module(torch.zeros(1, 4, dtype=torch.int64))
    return seen


@pytest.mark.parametrize("method", ["static", "magnitude", "set", "rigl"])
def test_in_sparse_training(method: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(17, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 17))
    windows = np.random.default_rng(0).integers(0, 17, (8, 6)).astype(np.int32)
    block = method in ("static", "magnitude")
    how: dict[str, Any] = {"pattern": "block:1x16"} if block else {}
    s = TrainSettings(steps=8, batch=4, rate=1e-2)
    kind = SparseSettings(method=method, sparsity=0.75, layers=("1",), **how)  # type: ignore[arg-type]
    hook = SparseTraining(module, kind, s)
    sizes: list[list[int]] = []

    def objective(m: nn.Module, tokens: Tensor, places: Any) -> Tensor:
        sizes.append(products(m))
        return losses.hard(m(tokens[:, :-1]), tokens[:, 1:])

    train(module, windows, objective, s, hook=hook)
    assert "forward" not in module[1].__dict__, "put back"
    dead = int((~hook.layer_masks()["1"].any(1)).sum())
    if block:
        assert dead == 24 and sizes[-1][0] == 8 * 16
    if method == "rigl":
        assert all(found[0] == 32 * 16 for found in sizes)
