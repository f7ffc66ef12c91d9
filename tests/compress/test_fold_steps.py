"""Steps of a recipe that prepare for low bits, and the ones that follow rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from joulesmith import models, text
from joulesmith.compress.quantize.grids import grid
from joulesmith.compress.recipe import Recipe, read_recipe
from joulesmith.compress.step import find
from joulesmith.errors import JoulesmithError
from tiny import write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def windows(folder: Path) -> NDArray[np.int32]:
    return text.windows(models.load(folder), text.english(), 64, {"a": 16}, 0)["a"].tokens


def logits(model: models.Model) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.module(torch.arange(1, 60)[None]).logits
    return out


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("rotate", {"what": "both"}),
        ("rotate", {"what": "values"}),
        ("awq", {"type": "INT3-G32"}),
    ],
)
def test_the_float_model_says_the_same(
    folder: Path, windows: NDArray[np.int32], name: str, settings: dict[str, str]
) -> None:
    model = models.load(folder)
    before, old = logits(model), models.gguf_weight(model, "blk.0.attn_v.weight")
    record = find(name)(**settings).apply(model, windows)
    assert record.step == name
    assert not torch.equal(models.gguf_weight(model, "blk.0.attn_v.weight"), old)
    assert torch.allclose(logits(model), before, atol=1e-3)
    assert model.tied == (settings.get("what") != "both")


def test_awq_needs_a_grid(folder: Path, windows: NDArray[np.int32]) -> None:
    with pytest.raises(JoulesmithError, match="no scales"):
        find("awq")(type="BF16").apply(models.load(folder), windows)


def test_learning_and_tuning_in_a_recipe(
    folder: Path, windows: NDArray[np.int32], tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    plain = {"types": {}, "default": "INT3-G32"}
    steps = (find("quantize")(**plain, learn_steps=40, tune_epochs=2),)
    Recipe(steps).save(path)
    assert read_recipe(path).steps == steps
    exact = models.load(folder)
    tokens = torch.from_numpy(windows).long()
    damage = []
    for recipe in (Recipe((find("quantize")(**plain),)), read_recipe(path)):
        model = models.load(folder)
        packed = recipe.apply(model, windows)[0].packed
        for name, (kind, raw) in packed.items():
            back = torch.as_tensor(grid(kind).unpack(raw, model.ref(name).shape[1]))
            models.set_gguf_weight(model, name, back)
        with torch.no_grad():
            a, b = (m.module(tokens).logits.log_softmax(-1) for m in (exact, model))
        damage.append(float((a.exp() * (a - b)).sum(-1).mean()))
    assert damage[1] < 0.9 * damage[0]
