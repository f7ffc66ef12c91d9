"""The step and its settings, as a recipe has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from joulesmith import models
from joulesmith.compress.layers import linears_of
from joulesmith.compress.prune.step import Prune
from joulesmith.compress.recipe import Recipe, read_recipe
from joulesmith.errors import JoulesmithError
from tiny import write_tiny

WINDOWS = np.random.default_rng(0).integers(0, 400, (8, 32)).astype(np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("step") / "model", steps=1)


def test_settings() -> None:
    for bad in (
        {}, {"sparsity": 0.5, "parameters": 10}, {"sparsity": 0.5, "pattern": "2:4"},
        {"pattern": "block:4x4"}, {"sparsity": 1.0}, {"sparsity": 0.5, "pattern": "x"},
        {"sparsity": 0.5, "method": "x"}, {"parameters": 0}, {"sparsity": 0.5, "wrong": 1},
    ):  # fmt: skip
        with pytest.raises(ValidationError):
            Prune(**bad)
    assert Prune(pattern="2:4").sparsity is None


def test_a_recipe_is_read_back(tmp_path: Path) -> None:
    step = Prune(parameters=90_000, method="wanda", layers=("*.mlp.*",), allocation="uniform")
    Recipe((step,)).save(tmp_path / "recipe.yaml")
    assert read_recipe(tmp_path / "recipe.yaml").steps == (step,)


def test_parameters_that_are_left(folder: Path) -> None:
    model = models.load(folder)
    embedding = 400 * 64
    whole = model.parameters
    size = sum(x.matrix.numel() for x in linears_of(model.module).values())
    step = Prune(parameters=60_000)
    assert step.share(model) == pytest.approx((whole - 60_000) / size)
    record = step.apply(model, WINDOWS)
    left = sum(int((p != 0).sum()) for p in model.module.parameters())
    assert left == pytest.approx(60_000, abs=20)
    assert bool((model.module.get_input_embeddings().weight != 0).all()), "tied ends are left alone"
    assert len(record.pruned) == 14 and "14 layers are zero" in record.notes[0]
    for wanted, match in ((whole, "ask for fewer"), (embedding, "ask for more")):
        with pytest.raises(JoulesmithError, match=match):
            Prune(parameters=wanted).share(model)


def test_movement_reads_the_model_before(folder: Path) -> None:
    model = models.load(folder)
    step = Prune(sparsity=0.5, method="update", before=str(folder))
    with torch.no_grad():
        for layer in linears_of(model.module).values():
            layer.write(layer.matrix + (torch.rand(layer.shape) < 0.5))
    record = step.apply(model, WINDOWS)
    assert sum(p.sparsity for p in record.pruned) / 14 == pytest.approx(0.5, abs=0.05)
    with pytest.raises(JoulesmithError):
        Prune(sparsity=0.5, method="update", before="absent").apply(model, WINDOWS)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"pattern": "2:3"}, "groups of 3"),
        ({"sparsity": 0.5, "pattern": "block:5x5"}, "tiles of 5 x 5"),
        ({"sparsity": 0.5, "layers": ("x",)}, "no linear layer is called 'x'"),
        ({"sparsity": 0.5, "method": "movement"}, "give before"),
        ({"sparsity": 0.5, "before": "x"}, "leave before out"),
        ({"sparsity": 0.5, "allocation": "threshold"}, "no scores to compare"),
        ({"threshold": 0.1}, "no scores to hold"),
        ({"sparsity": 0.5, "repair": True}, "repairs by itself"),
        ({"parameters": 10}, "ask for more"),
    ],
)
def test_what_shapes_tell_is_told_before_work(
    folder: Path, settings: dict[str, object], match: str
) -> None:
    with pytest.raises(JoulesmithError, match=match):
        Prune(**settings).check(models.load(folder))  # type: ignore[arg-type]
