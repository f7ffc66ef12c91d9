"""Moments of both streams against hooks on the whole module."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from joulesmith.compress import stream
from joulesmith.compress.layers import linears_of
from joulesmith.compress.stream import Streams, as_batches
from joulesmith.compress.taps import experts_one_by_one, tapped
from joulesmith.errors import JoulesmithError
from small_modules import Branches, language, mlp, tokens


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """No products in bfloat16, whatever the processor."""
    monkeypatch.setattr(stream, "coarse", contextlib.nullcontext)


def inputs_of(module: nn.Module, batches: list[object]) -> dict[str, Tensor]:
    """Name -> all vectors that reach a layer, of one pass through the whole module."""
    found: dict[str, list[Tensor]] = {}

    def note(name: str, x: Tensor) -> None:
        found.setdefault(name, []).append(x.flatten(0, -2).clone())

    with torch.no_grad(), experts_one_by_one(module), tapped(linears_of(module), before=note):
        for batch in batches:
            module(**batch) if isinstance(batch, dict) else module(batch)
    return {n: torch.cat(x) for n, x in found.items()}


def halved(name: str, weight: Tensor) -> Tensor:
    return weight * torch.rand(weight.shape, generator=torch.Generator().manual_seed(len(name)))


def case(kind: str) -> tuple[nn.Module, list[object], bool]:
    if kind == "mlp":
        return mlp(), list(torch.randn(3, 8, 12)), True
    if kind == "branches":
        return Branches(), list(torch.randn(3, 5, 8)), False
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[:, 7:] = 0
    batches: list[object] = [{"input_ids": tokens(4, seed=i)} for i in range(3)]
    if kind == "bert":
        batches = [{**b, "attention_mask": mask} for b in batches]  # type: ignore[dict-item]
    return language(kind), batches, True


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "mixtral", "mlp", "branches"])
def test_moments_of_both_streams(kind: str, exact: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream.Block, "_passes", lambda _, order: [[g] for g in order])
    module, batches, chained = case(kind)
    dense = copy.deepcopy(module)
    was = inputs_of(dense, batches)
    stats, order = {}, []
    with Streams(module, batches) as streams:
        assert ("" not in streams.names) == chained
        for block in streams.blocks():
            for group in block.groups():
                for name, layer in group.layers.items():
                    order.append(name)
                    stats[name] = group.stats
                    layer.write(halved(name, layer.matrix))
        seen = set(order)
    assert not list(streams.folder.parent.glob(streams.folder.name))
    inside = {n for n in linears_of(module) if n in seen}
    assert len(inside) >= (2 if kind == "branches" else 3)
    now = inputs_of(module, batches)  # what reaches a layer hangs on those before it alone
    for name in inside:
        s, x, y = stats[name], now[name], was[name]
        torch.testing.assert_close(s.gram, x.T @ x / len(x), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(s.mean, x.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(s.squares, x.square().mean(0), atol=1e-5, rtol=1e-4)
        assert s.count == len(x)
        if "experts" in name:
            assert s.cross is None
        else:
            assert s.cross is not None
            torch.testing.assert_close(s.cross, y.T @ x / len(x), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(s.dense_mean, y.mean(0), atol=1e-5, rtol=1e-4)


def test_layers_of_one_input_are_a_group() -> None:
    with Streams(language("llama"), as_batches(tokens().int().numpy())) as streams:
        groups = [
            [n.rpartition(".")[2] for n in g.layers] for b in streams.blocks() for g in b.groups()
        ]
    attention = [["q_proj", "k_proj", "v_proj"], ["o_proj"]]
    assert groups == [*attention, ["gate_proj", "up_proj"], ["down_proj"]] * 2


def test_what_only_adds_to_the_stream_shares_the_next_pass() -> None:
    with Streams(language("llama"), as_batches(tokens().int().numpy())) as streams:
        block = next(streams.blocks())
        passes = block._passes(block._order(block.layers))
    assert [[next(iter(g)).rpartition(".")[2] for g in p] for p in passes] == [
        ["q_proj"], ["o_proj", "gate_proj"], ["down_proj"],
    ]  # fmt: skip


def test_at_once_sees_the_block_as_it_was(exact: None) -> None:
    module, batches, _ = case("llama")
    was = inputs_of(copy.deepcopy(module), batches)
    with Streams(module, batches, targets=False) as streams:
        block = next(streams.blocks())
        for group in block.groups(at_once=True):
            for name, layer in group.layers.items():
                x = was[name]
                torch.testing.assert_close(group.stats.gram, x.T @ x / len(x))
                assert group.stats.cross is None
                layer.write(torch.zeros(layer.shape))


def test_the_module_is_left_as_it_was() -> None:
    module, batches, _ = case("mixtral")
    module.train()
    implementation = module.config._experts_implementation
    with pytest.raises(KeyError), Streams(module, batches) as streams:
        assert not module.training and not torch.is_grad_enabled()
        next(next(streams.blocks()).groups())
        raise KeyError
    assert module.training and torch.is_grad_enabled()
    assert module.config._experts_implementation == implementation
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_bfloat16() -> None:
    module, batches, _ = case("llama")
    with Streams(module.bfloat16(), batches) as streams:
        assert "" not in streams.names
        grams = [g.stats.gram for b in streams.blocks() for g in b.groups()]
    assert all(g.dtype == torch.float32 and bool(torch.isfinite(g).all()) for g in grams)


class Unheard(nn.Module):
    """Experts that are multiplied all at once."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nc,eoc->no", x, self.experts.up)


class Twice(nn.Module):
    """A list whose second block nothing calls, and a layer that is called with a wrong width."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.blocks[0](x)
        return found


def test_what_cannot_be_walked_is_told() -> None:
    with pytest.raises(JoulesmithError, match=r"experts\.up are not multiplied one by one"):
        walk(Unheard(), [torch.randn(5, 4)])
    with pytest.raises(JoulesmithError, match=r"never reached the layer blocks\.1\.0"):
        walk(Twice(), [torch.randn(5, 4)])
    with pytest.raises(JoulesmithError, match="Sequential cannot run the calibration data"):
        walk(mlp(), [torch.randn(5, 3)])
    with pytest.raises(JoulesmithError, match="Twice cannot run the calibration data"):
        walk(Twice(), [torch.randn(5, 3)])
    with pytest.raises(JoulesmithError, match="LlamaForCausalLM cannot run"):
        walk(language("llama"), [{"input_ids": torch.tensor([[51]])}])
    large = mlp()
    with torch.no_grad():
        large[0].weight *= 1e30
    with pytest.raises(JoulesmithError, match="inputs of 2 are not finite"):
        walk(large, [torch.randn(5, 12)])
    for nothing in ([], np.zeros((0, 8), np.int32)):
        with pytest.raises(JoulesmithError, match="no calibration data"):
            as_batches(nothing)


def walk(module: nn.Module, batches: list[object]) -> None:
    with Streams(module, as_batches(batches)) as streams:
        for block in streams.blocks():
            for _ in block.groups():
                pass


def test_no_place_for_activations(tmp_path: Path) -> None:
    with Streams(mlp(), [torch.randn(5, 12)], scratch=tmp_path) as streams:
        streams.folder = tmp_path / "absent"
        with pytest.raises(JoulesmithError, match=r"cannot keep activations in .* free some space"):
            streams.put(0, 0, torch.zeros(1))
