"""Linear layers by name, whatever holds them, and the blocks they lie in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from joulesmith.compress.layers import Undo, blocks_of, check_weights, linears_of, select
from joulesmith.errors import JoulesmithError
from small_modules import Branches, language, mlp


def test_names_and_blocks() -> None:
    llama = language("llama")
    assert list(blocks_of(llama)) == ["model.layers.0", "model.layers.1"]
    found = linears_of(llama)
    assert len(found) == 14 and "model.layers.1.mlp.down_proj" in found
    assert "lm_head" not in found, "it is the embedding"
    assert list(blocks_of(language("gpt2"))) == ["transformer.h.0", "transformer.h.1"]
    assert list(blocks_of(language("bert"))) == ["encoder.layer.0", "encoder.layer.1"]
    assert list(blocks_of(mlp())) == ["0", "1", "2", "3", "4"]
    assert list(blocks_of(Branches())) == ["blocks.0", "blocks.1"]
    assert blocks_of(nn.Linear(3, 3)) == {}


def test_a_matrix_is_outputs_by_inputs() -> None:
    found = linears_of(language("gpt2"))
    qkv = found["transformer.h.0.attn.c_attn"]
    assert qkv.transposed and qkv.shape == (48, 16) and qkv.stored.shape == (16, 48)
    new = torch.arange(48.0 * 16).view(48, 16)
    qkv.write(new)
    assert torch.equal(qkv.matrix, new) and torch.equal(qkv.stored.detach(), new.T)
    assert qkv.bias is not None and qkv.bias.shape == (48,)


def test_fused_experts_are_matrices_of_their_own() -> None:
    module = language("mixtral")
    found = linears_of(module)
    names = [n for n in found if "layers.0" in n and "experts" in n]
    assert len(names) == 6
    last = found["model.layers.0.mlp.experts.down_proj.2"]
    assert last.shape == (16, 24) and last.expert == 2 and last.bias is None
    before = last.stored.detach().clone()
    last.write(torch.zeros(16, 24))
    assert not last.stored[2].any() and torch.equal(last.stored[:2], before[:2])


def test_a_shared_matrix_is_given_once() -> None:
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    module["b"].weight = module["a"].weight
    assert list(linears_of(module)) == ["a"]


def test_select() -> None:
    found = linears_of(language("llama"))
    assert select(found, ("*.mlp.*",), "layers") == {n for n in found if ".mlp." in n}
    assert select(found, ("*0*q_proj", "*1*q_proj"), "layers") == {n for n in found if "q_p" in n}
    with pytest.raises(JoulesmithError, match=r"layers: no linear layer is called 'mlp\.\?'"):
        select(found, ("mlp.?",), "layers")


def test_weights_that_are_not_finite() -> None:
    module = language("mixtral")
    check_weights(linears_of(module))
    with torch.no_grad():
        module.get_parameter("model.layers.1.mlp.experts.gate_up_proj")[1, 0, 0] = torch.inf
    with pytest.raises(JoulesmithError, match=r"gate_up_proj\.1 holds NaN or infinity"):
        check_weights(linears_of(module))


def test_undo(tmp_path: Path) -> None:
    module = mlp()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    layers = linears_of(module)

    def change() -> None:
        for layer in layers.values():
            undo.keep(layer)
            layer.write(torch.full(layer.shape, 7.0))
            assert layer.bias is not None
            layer.bias.data.zero_()

    with pytest.raises(KeyError), Undo(tmp_path) as undo:
        change()
        raise KeyError
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    with Undo(tmp_path) as undo:
        change()
    assert all(bool((x.matrix == 7).all()) for x in layers.values())
    assert not list(tmp_path.iterdir())
