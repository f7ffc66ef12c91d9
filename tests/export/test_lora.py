"""Adapters: what is read back is what was written, and adds up to the same model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from joulesmith import models
from joulesmith.errors import JoulesmithError
from joulesmith.export.lora import Pair, write_gguf_lora, write_peft
from joulesmith.gguf_file import read_gguf
from tiny import write_tiny

Q, UP = "blk.0.attn_q.weight", "blk.1.ffn_up.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> models.Model:
    return models.load(write_tiny(tmp_path_factory.mktemp("lora") / "model", steps=1))


def pairs(model: models.Model, ranks: dict[str, int], seed: int = 0) -> dict[str, Pair]:
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, rank in ranks.items():
        rows, columns = model.ref(name).shape
        outer = torch.randn(rows, rank, generator=g).half().float()
        out[name] = (outer, torch.randn(rank, columns, generator=g).half().float())
    return out


@settings(max_examples=8)
@given(st.integers(1, 12), st.integers(1, 12))
def test_peft_round_trip(
    model: models.Model, tmp_path_factory: pytest.TempPathFactory, one: int, other: int
) -> None:
    given_pairs = pairs(model, {Q: one, UP: other})
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    size = write_peft(model, given_pairs, folder, base="base")
    back = load_file(folder / "adapter_model.safetensors")
    assert len(back) == 4

    def pair(module: str) -> Pair:
        outer, inner = (back[f"base_model.model.{module}.lora_{x}.weight"].float() for x in "BA")
        return outer, inner

    outer, inner = pair("model.layers.0.self_attn.q_proj")
    # torch's row order: adding it to the torch weight adds the pair to GGUF's weight
    ref = model.ref(Q)
    assert ref.rows is not None
    assert torch.equal((outer @ inner)[torch.from_numpy(ref.rows)], torch.mm(*given_pairs[Q]))
    assert torch.equal(torch.mm(*pair("model.layers.1.mlp.up_proj")), torch.mm(*given_pairs[UP]))
    assert size == 2 * sum(a.numel() + b.numel() for a, b in given_pairs.values())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert config["rank_pattern"] == config["alpha_pattern"]


def test_short_names_where_all_layers_are_meant(model: models.Model, tmp_path: Path) -> None:
    every = {r.name: 4 for r in model.matrices() if r.role in ("ffn_up", "ffn_down")}
    write_peft(model, pairs(model, every), tmp_path / "all")
    config = json.loads((tmp_path / "all" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "up_proj"]
    assert config["rank_pattern"] == {}


def test_peft_itself_loads_it(model: models.Model, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    given_pairs = pairs(model, {Q: 3, UP: 5})
    models.save(model, tmp_path / "base")
    write_peft(model, given_pairs, tmp_path / "adapter", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    ours = models.load(tmp_path / "base")
    for name, (outer, inner) in given_pairs.items():
        models.set_gguf_weight(ours, name, models.gguf_weight(ours, name) + outer @ inner)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, ours.module(ids).logits, atol=1e-4)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_gguf_adapter(model: models.Model, tmp_path: Path, kind: str) -> None:
    given_pairs = pairs(model, {Q: 32, UP: 32})
    path = tmp_path / "a.gguf"
    size = write_gguf_lora(model, given_pairs, path, type=kind)
    file = read_gguf(path)
    assert path.stat().st_size == size
    assert file.value("general.type") == "adapter"
    assert file.value("adapter.type") == "lora"
    assert file.value("adapter.lora.alpha") == 0.0
    for name, (outer, inner) in given_pairs.items():
        for part, t in (("lora_a", inner), ("lora_b", outer)):
            stored = file.dequantize(f"{name}.{part}")
            assert stored.shape == tuple(t.shape)
            tolerance = 0.02 if kind == "Q8_0" else 0
            assert np.abs(stored - t.numpy()).max() <= tolerance


def test_refusals_write_nothing(model: models.Model, tmp_path: Path) -> None:
    good = pairs(model, {UP: 4})
    outer, inner = good[UP]
    for bad, match in (
        ({}, "at least one"),
        ({"blk.9.ffn_up.weight": good[UP]}, "no tensor"),
        ({UP: (outer[:-1], inner)}, "do not belong"),
        ({UP: (outer[:, :-1], inner)}, "do not belong"),
        ({UP: (outer * torch.nan, inner)}, "NaN"),
    ):
        with pytest.raises(JoulesmithError, match=match):
            write_peft(model, bad, tmp_path / "p")
        with pytest.raises(JoulesmithError, match=match):
            write_gguf_lora(model, bad, tmp_path / "g")
    with pytest.raises(JoulesmithError, match="float16"):
        write_peft(model, {UP: (outer * 1e6, inner)}, tmp_path / "p")
    with pytest.raises(JoulesmithError):  # rank 4 is no block of 32
        write_gguf_lora(model, good, tmp_path / "g", type="Q8_0")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing(
    model: models.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr("joulesmith.export.lora.json.dumps", fail)
    with pytest.raises(JoulesmithError, match="disk full"):
        write_peft(model, pairs(model, {UP: 4}), tmp_path / "p")
    assert list(tmp_path.iterdir()) == []
