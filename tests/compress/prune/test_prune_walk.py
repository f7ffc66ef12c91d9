"""Pruning of whole modules: what becomes zero, what makes up for it, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from joulesmith.compress import stream
from joulesmith.compress.layers import linears_of
from joulesmith.compress.prune import walk
from joulesmith.compress.prune.patterns import parse_pattern
from joulesmith.compress.prune.walk import METHODS, Pruned, prunable, prune_module
from joulesmith.errors import JoulesmithError
from small_modules import Branches, language, mlp, tokens

IDS = tokens(16, 12).int().numpy()


def state(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters()}


def zeros(module: nn.Module, found: list[Pruned]) -> float:
    """The share that is zero in truth; each layer's own is checked on the way."""
    layers, gone, size = linears_of(module), 0, 0
    for p in found:
        w = layers[p.name].matrix
        assert p.shape == tuple(w.shape)
        assert p.sparsity == pytest.approx(float((w == 0).double().mean()), abs=1e-6)
        gone, size = gone + int((w == 0).sum()), size + w.numel()
    return gone / size


# -- any module --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A classifier of clusters, and data that it was not trained on."""
    torch.manual_seed(0)
    centres = torch.randn(8, 24)

    def data(n: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(0, 8, (n,))
        return centres[y] + 0.9 * torch.randn(n, 24), y

    module = nn.Sequential(
        nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 8)
    )
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(150):
        x, y = data(256)
        loss = nn.functional.cross_entropy(module(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (module.eval(), *data(2000))


def accuracy(module: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((module(x).argmax(1) == y).float().mean())


def test_a_classifier_keeps_more(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    module, x, y = trained
    calibration = list(x[:1000].split(250))
    kept: dict[str, float] = {}
    for method in ("admm", "sparsegpt", "wanda", "magnitude", "taylor", "fisher"):
        other = copy.deepcopy(module)
        found = prune_module(
            other, calibration, sparsity=0.85, method=method, labels="drawn"
        )  # fmt: skip
        assert zeros(other, found) == pytest.approx(0.85, abs=2e-3)
        kept[method] = accuracy(other, x[1000:], y[1000:])
    whole = accuracy(module, x[1000:], y[1000:])
    assert whole > 0.95 and kept["admm"] > whole - 0.1
    assert kept["admm"] == max(kept.values()) and kept["admm"] > kept["magnitude"] + 0.1
    repaired = copy.deepcopy(module)
    prune_module(repaired, calibration, sparsity=0.85, method="magnitude", repair=True)
    assert accuracy(repaired, x[1000:], y[1000:]) > kept["magnitude"] + 0.1


def test_damage_is_predicted_and_told(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    """The predicted KL of the layers together is of the size of that which comes about."""
    module, x, _ = copy.deepcopy(trained)
    with torch.no_grad():
        before = module(x[1000:]).log_softmax(-1)
        found = prune_module(module, list(x[:1000].split(250)), sparsity=0.3)
        after = module(x[1000:]).log_softmax(-1)
    kl = float((before.exp() * (before - after)).sum(1).mean())
    told = sum(p.damage or 0 for p in found)
    assert kl / 8 < told < kl * 8
    assert all(p.error is not None and 0 <= p.error < 0.5 for p in found)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "mixtral", "llama", "branches"])
def test_every_kind_of_module(kind: str) -> None:
    module = Branches() if kind == "branches" else language(kind)
    data: Any = list(torch.randn(3, 20, 8)) if kind == "branches" else IDS
    before = state(module)
    found = prune_module(module, data, sparsity=0.5)
    chosen = prunable(module)
    assert [p.name for p in found] == list(chosen)
    assert zeros(module, found) == pytest.approx(0.5, abs=0.01)
    assert all(p.damage is not None and math.isfinite(p.damage) for p in found)
    changed = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    names = {id(p): n for n, p in module.named_parameters()}
    weights = {names[id(x.stored)] for x in chosen.values()}
    biases = {names[id(x.bias)] for x in chosen.values() if x.bias is not None}
    # Attention is blind to what all keys have in common; every other bias makes up for something.
    assert weights <= changed <= weights | biases
    assert len(changed & biases) >= 0.7 * len(biases)


def test_the_bias_keeps_the_mean(
    trained: tuple[nn.Module, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x, _ = copy.deepcopy(trained)
    # no products in bfloat16, whatever the processor
    monkeypatch.setattr(stream, "coarse", contextlib.nullcontext)
    with torch.no_grad():
        before = module(x).mean(0)
        prune_module(module, [x], sparsity=0.8, method="magnitude", repair=True)
        torch.testing.assert_close(module(x).mean(0), before, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("method", ["admm", "sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("pattern", ["2:4", "row", "block:4x4"])
def test_patterns_hold_in_every_layer(method: Any, pattern: str) -> None:
    module = mlp(inputs=16)
    share = None if pattern == "2:4" else 0.5
    data = list(torch.randn(2, 64, 16))
    found = prune_module(module, data, sparsity=share, pattern=pattern, method=method)
    kind = parse_pattern(pattern)
    for p in found:
        stays = linears_of(module)[p.name].matrix != 0
        if pattern.startswith("block"):
            stays |= ~stays.any(0)  # sparsegpt: an input that is never there has no weights
        kept = int(stays.sum())
        assert torch.equal(kind.mask(stays.float(), kept), stays)
    assert zeros(module, found) == pytest.approx(0.5, abs=0.03)


# -- scores and shares -------------------------------------------------------------------


def test_magnitude_is_one_threshold_for_all() -> None:
    module = language("llama")
    weights = torch.cat([x.matrix.abs().flatten() for x in prunable(module).values()])
    limit = weights.sort().values[int(0.6 * len(weights))]
    before = state(module)
    found = prune_module(module, None, sparsity=0.6, method="magnitude")
    assert zeros(module, found) == pytest.approx(0.6, abs=1e-3)
    for layer in prunable(module).values():
        gone = layer.matrix == 0
        name = next(n for n, p in module.named_parameters() if p is layer.stored)
        assert torch.equal(layer.matrix[~gone], before[name][~gone])
        assert float((gone != (before[name].abs() < limit)).float().mean()) < 0.02
    uniform = prune_module(
        language("llama"), None, sparsity=0.6, method="magnitude", allocation="uniform"
    )
    assert all(p.sparsity == pytest.approx(0.6, abs=2e-3) for p in uniform)


def test_wanda_as_its_authors_have_it() -> None:
    """Within a row, the block's inputs with all its layers dense, blocks before it pruned."""
    module = mlp()
    x = torch.randn(50, 12)
    want = copy.deepcopy(module)
    prune_module(module, [x], sparsity=0.5, method="wanda")
    with torch.no_grad():
        h = x
        for part in want:
            if isinstance(part, nn.Linear):
                score = part.weight.abs() * h.square().mean(0).sqrt()
                part.weight *= parse_pattern("row").mask(score, part.weight.numel() // 2)
            h = part(h)
    for a, b in zip(module.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_scores() -> None:
    """taylor and fisher against gradients of the whole module, a batch a time."""
    module = mlp()
    x, y = torch.randn(4, 30, 12), torch.randint(0, 4, (4, 30))

    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            found: Tensor = self.inner(x)
            return found

    batches = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    sums: dict[str, list[Tensor]] = {}
    for a, b in zip(x, y, strict=True):
        module.zero_grad()
        nn.functional.cross_entropy(module(a), b, reduction="sum").backward()
        for name, p in module.named_parameters():
            assert p.grad is not None
            sums.setdefault(name, []).append(p.grad.clone())
    module.zero_grad()
    for method in ("taylor", "fisher"):
        found = copy.deepcopy(Told())
        prune_module(found, batches, sparsity=0.5, method=method, allocation="uniform")
        for name in ("0", "2", "4"):
            w = module.get_parameter(f"{name}.weight").detach()
            g = torch.stack(sums[f"{name}.weight"])
            score = (w * g.mean(0)).abs() if method == "taylor" else w**2 * g.square().mean(0)
            want = parse_pattern("unstructured").mask(score, w.numel() // 2)
            stays = found.get_parameter(f"inner.{name}.weight") != 0
            assert float((stays != want).float().mean()) < 0.02


def test_movement_keeps_what_moved_away() -> None:
    module = mlp()
    before = {n: x.matrix.clone() for n, x in linears_of(module).items()}
    with torch.no_grad():
        for layer in linears_of(module).values():
            factor = torch.where(torch.rand(layer.shape) < 0.5, 0.7, 1.3)
            layer.write(layer.matrix * factor)
    grown = {n: x.matrix.abs() > before[n].abs() for n, x in linears_of(module).items()}
    share = 1 - float(torch.cat([g.flatten() for g in grown.values()]).float().mean())
    prune_module(module, None, sparsity=share, method="movement", before=before)
    for name, layer in linears_of(module).items():
        assert float(((layer.matrix != 0) == grown[name]).float().mean()) > 0.98


def test_a_threshold() -> None:
    module = mlp()
    before = state(module)
    found = prune_module(module, None, threshold=0.1, method="magnitude")
    for p in found:
        w = before[f"{p.name}.weight"]
        assert torch.equal(linears_of(module)[p.name].matrix, w * (w.abs() >= 0.1))
    tiles = prune_module(mlp(16), None, threshold=0.1, method="magnitude", pattern="block:4x4")
    assert 0 < max(p.sparsity for p in tiles) < 1


def test_shares_beyond_the_usual_bounds() -> None:
    module = mlp(seed=1)
    found = prune_module(module, list(torch.randn(2, 64, 12)), sparsity=0.97)
    assert zeros(module, found) == pytest.approx(0.97, abs=0.005)


def test_only_chosen_layers() -> None:
    module = language("llama")
    before = state(module)
    found = prune_module(module, IDS, sparsity=0.5, layers=("*.mlp.*", "*1*q_proj"))
    assert len(found) == 7
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name]) != any(f"{x.name}.weight" == name for x in found)


def test_twice_the_same_and_deeper_afterwards() -> None:
    a, b = language("llama"), language("llama")
    for module in (a, b):
        prune_module(module, IDS, sparsity=0.4, seed=3)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert zeros(a, prune_module(a, IDS, sparsity=0.6)) == pytest.approx(0.6, abs=0.01)


def test_experts_that_nothing_reaches() -> None:
    module = language("mixtral")
    with torch.no_grad():
        for layer in range(2):
            gate = module.get_parameter(f"model.layers.{layer}.mlp.gate.weight")
            gate[2] = -100 * gate[:2].sum(0)  # by far the least or the most, a token at a time
    for method in METHODS[:6]:
        other = copy.deepcopy(module)
        found = prune_module(other, IDS[:2, :3], sparsity=0.5, method=method)  # type: ignore[arg-type]
        assert zeros(other, found) == pytest.approx(0.5, abs=0.02)


# -- refused -----------------------------------------------------------------------------


def with_weight(value: float) -> nn.Module:
    module = mlp()
    with torch.no_grad():
        module[2].weight[3, 3] = value
    return module


def pruned() -> nn.Module:
    module = mlp()
    prune_module(module, None, sparsity=0.8, method="magnitude")
    return module


class Unreached(nn.Module):
    """The second block's layer is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.first(x)
        return found


X = [torch.randn(20, 12)]
NAN = [torch.full((20, 12), math.nan)]
BAD: list[tuple[str, Callable[[], nn.Module], Any, dict[str, Any]]] = [
    ("above 0 and below 1, not 1.5", mlp, X, {"sparsity": 1.5}),
    ("above 0 and below 1, not 0", mlp, X, {"sparsity": 0.0}),
    ("above 0 and below 1, not nan", mlp, X, {"sparsity": math.nan}),
    ("say how much shall go", mlp, X, {}),
    ("not both", mlp, X, {"sparsity": 0.5, "threshold": 0.1, "method": "magnitude"}),
    ("no scores to hold against", mlp, X, {"threshold": 0.1}),
    ("above 0 and finite, not -1", mlp, X, {"threshold": -1.0, "method": "magnitude"}),
    ("above 0 and finite, not inf", mlp, X, {"threshold": math.inf, "method": "magnitude"}),
    ("leave allocation uniform out", mlp, X,
     {"threshold": 0.1, "method": "magnitude", "allocation": "uniform"}),
    ("leave the sparsity out", mlp, X, {"sparsity": 0.3, "pattern": "2:4"}),
    ("leave allocation damage out", mlp, X, {"pattern": "2:4", "allocation": "damage"}),
    ("groups of 5", mlp, X, {"pattern": "2:5"}),
    ("tiles of 5 x 4", mlp, X, {"sparsity": 0.5, "pattern": "block:5x4"}),
    ("unknown pattern", mlp, X, {"sparsity": 0.5, "pattern": "2of4"}),
    ("unknown method", mlp, X, {"sparsity": 0.5, "method": "x"}),
    ("unknown allocation", mlp, X, {"sparsity": 0.5, "allocation": "x"}),
    ("no scores to compare", mlp, X, {"sparsity": 0.5, "allocation": "threshold"}),
    ("leave repair out", mlp, X, {"sparsity": 0.5, "repair": True}),
    ("no linear layer is called", mlp, X, {"sparsity": 0.5, "layers": ("absent",)}),
    ("no linear layers to prune", nn.Tanh, X, {"sparsity": 0.5}),
    ("needs calibration data", mlp, None, {"sparsity": 0.5}),
    ("needs calibration data", mlp, None, {"sparsity": 0.5, "method": "wanda"}),
    ("needs calibration data", mlp, None, {"sparsity": 0.5, "method": "magnitude", "repair": True}),
    ("no calibration data", mlp, [], {"sparsity": 0.5}),
    ("give them", mlp, None, {"sparsity": 0.5, "method": "movement"}),
    ("leave them out", mlp, X, {"sparsity": 0.5, "before": {}}),
    ("have no 0 of that shape", mlp, None, {"sparsity": 0.5, "method": "update", "before": {}}),
    ("2 holds NaN", lambda: with_weight(math.nan), X, {"sparsity": 0.5}),
    ("2 holds NaN", lambda: with_weight(math.inf), None, {"sparsity": 0.5, "method": "magnitude"}),
    ("pruned already: 79.9%", pruned, X, {"sparsity": 0.5}),
    ("pruned already", pruned, X, {"pattern": "2:4", "method": "sparsegpt"}),
    ("the layer last", Unreached, X, {"sparsity": 0.5}),
    ("the layer last", Unreached, X, {"sparsity": 0.5, "method": "sparsegpt"}),
    ("the layer last", Unreached, X,
     {"sparsity": 0.5, "method": "taylor", "labels": "drawn", "allocation": "uniform"}),
    ("not finite", mlp, NAN, {"sparsity": 0.5}),
    ("not finite", mlp, NAN, {"sparsity": 0.5, "method": "sparsegpt"}),
    ("not finite", mlp, NAN, {"sparsity": 0.5, "method": "taylor", "labels": "drawn"}),
    ("not finite", mlp, [X[0] * 3e38], {"sparsity": 0.5, "method": "wanda"}),
    ("cannot run the calibration data", mlp, [torch.randn(4, 5)], {"sparsity": 0.5}),
    ("no labels", mlp, X, {"sparsity": 0.5, "method": "taylor"}),
]  # fmt: skip


@pytest.mark.parametrize(("match", "make", "data", "settings"), BAD)
def test_refused_and_unchanged(
    match: str, make: Callable[[], nn.Module], data: Any, settings: dict[str, Any]
) -> None:
    module = make().train()
    before = state(module)
    with pytest.raises(JoulesmithError, match=match) as e:
        prune_module(module, data, **settings)
    assert "\n" not in str(e.value)
    for name, p in module.named_parameters():
        assert torch.equal(p.isnan(), before[name].isnan()), name
        assert torch.equal(p.nan_to_num(), before[name].nan_to_num()), name
        assert p.requires_grad
    assert module.training and torch.is_grad_enabled()


@pytest.mark.parametrize("method", ["admm", "sparsegpt", "wanda"])
def test_an_error_half_way_undoes_what_was_done(
    method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = language("gpt2")
    before = state(module)
    calls = itertools.count()

    def fails(*args: object) -> float:
        if next(calls) == 5:
            raise JoulesmithError("half way")
        return 0.0

    monkeypatch.setattr(walk, "_error", fails)
    with pytest.raises(JoulesmithError, match="half way"):
        prune_module(module, IDS, sparsity=0.5, method=method, scratch=tmp_path)
    assert next(calls) == 6
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    assert not list(tmp_path.iterdir())
