"""Folders of thin layers: round trip, refusals, and nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from joulesmith import models
from joulesmith.compress.lowrank.factors import pivot, plain
from joulesmith.compress.lowrank.thin import ThinLinear, place
from joulesmith.compress.lowrank.weighted import decompose
from joulesmith.errors import JoulesmithError
from joulesmith.export.thin import WEIGHTS, load_thin, write_thin
from tiny import write_tiny

IDS = torch.arange(40).reshape(2, 20)
PIVOTED, PLAIN, DENSE = (f"model.layers.0.mlp.{n}_proj" for n in ("up", "gate", "down"))


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory) -> models.Model:
    model = models.load(write_tiny(tmp_path_factory.mktemp("thin") / "model", steps=1))
    for name, form in ((PIVOTED, pivot), (PLAIN, plain)):
        cut = decompose(model.module.get_submodule(name).weight).cut(20)
        place(model.module, name, form(*cut), keep=True)
    model.parameters = sum(p.numel() for p in model.module.parameters())
    return model


@pytest.fixture
def written(thin: models.Model, tmp_path: Path) -> Path:
    write_thin(thin, tmp_path / "out")
    return tmp_path / "out"


def test_round_trip(thin: models.Model, written: Path) -> None:
    back = load_thin(written)
    assert isinstance(back.module.get_submodule(PIVOTED), ThinLinear)
    assert isinstance(back.module.get_submodule(DENSE), torch.nn.Linear)
    with torch.no_grad():
        assert torch.equal(back.module(IDS).logits, thin.module(IDS).logits)
    assert back.parameters == thin.parameters
    assert back.tokenizer.encode("a word") == thin.tokenizer.encode("a word")
    size = (written / WEIGHTS).stat().st_size
    assert size < 4 * back.parameters + 50_000


def test_no_engine_takes_it_for_a_dense_model(written: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    with pytest.raises(ValueError, match="joulesmith_lowrank"):
        AutoModelForCausalLM.from_pretrained(written)
    with pytest.raises(OSError):
        LlamaForCausalLM.from_pretrained(written)
    with pytest.raises(JoulesmithError, match="unsupported architecture"):
        models.load(written)


def test_a_failed_write_leaves_nothing(
    thin: models.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(models, "write_tokenizer_of", fail)
    with pytest.raises(JoulesmithError, match="disk full"):
        write_thin(thin, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("keep")
    with pytest.raises(JoulesmithError, match="not empty"):
        write_thin(thin, tmp_path / "used")
    assert (tmp_path / "used" / "mine").read_text() == "keep"


@pytest.mark.parametrize("damage", ["outer", "order", "nan", "strange", "missing"])
def test_damaged_weights_are_one_line(written: Path, damage: str) -> None:
    tensors = load_file(written / WEIGHTS)
    if damage == "outer":
        tensors[f"{PLAIN}.outer"] = tensors[f"{PLAIN}.outer"][:, :-1].contiguous()
    elif damage == "order":
        tensors[f"{PIVOTED}.order"][0] = tensors[f"{PIVOTED}.order"][1]
    elif damage == "nan":
        tensors[f"{PIVOTED}.inner"][0, 0] = np.nan
    elif damage == "strange":
        tensors["extra"] = torch.zeros(2)
    else:
        del tensors[f"{PLAIN}.inner"]
    save_file(tensors, written / WEIGHTS)
    with pytest.raises(JoulesmithError) as e:
        load_thin(written)
    assert "\n" not in str(e.value)


def test_truncated_and_foreign_folders(written: Path, tmp_path: Path) -> None:
    raw = (written / WEIGHTS).read_bytes()
    (written / WEIGHTS).write_bytes(raw[: len(raw) // 2])
    with pytest.raises(JoulesmithError, match="damaged"):
        load_thin(written)
    config = json.loads((written / "config.json").read_text())
    for layers in ([], {PLAIN: {"rank": "8", "pivoted": False}}, {PLAIN: 3}):
        config["joulesmith"]["layers"] = layers
        (written / "config.json").write_text(json.dumps(config))
        with pytest.raises(JoulesmithError):
            load_thin(written)
    (written / "config.json").write_text("{}")
    with pytest.raises(JoulesmithError, match="not a low-rank model"):
        load_thin(written)
