"""The low-rank step on a tiny model: what it promises, counted and run."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from joulesmith import models
from joulesmith.calibrate import calibrate
from joulesmith.compress.lowrank.absorb import absorb_model
from joulesmith.compress.lowrank.step import LowRank
from joulesmith.compress.lowrank.thin import ThinLinear, merge
from joulesmith.compress.lowrank.walk import factorable, survey
from joulesmith.compress.quantize.grids import grid
from joulesmith.compress.recipe import Recipe, read_recipe
from joulesmith.errors import JoulesmithError
from joulesmith.moments import Moments
from tiny import write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("lowrank") / "model", steps=30)


@pytest.fixture
def model(folder: Path) -> models.Model:
    return models.load(folder)


WINDOWS = np.random.default_rng(0).integers(0, 400, (12, 32)).astype(np.int32)


def logits(model: models.Model) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.module(torch.from_numpy(WINDOWS).long()).logits.double()
    return out


def kl(a: torch.Tensor, b: torch.Tensor) -> float:
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_share_of_the_numbers_is_left(model: models.Model) -> None:
    before, whole = logits(model), model.parameters
    blocks = sum(r * c for r, c in factorable(model).values())
    record = LowRank(parameters=0.7).apply(model, WINDOWS)
    held = sum(p.numel() for p in model.module.parameters())
    assert model.parameters == held
    assert whole - held >= 0.3 * blocks
    assert whole - held <= 0.32 * blocks
    assert "of their numbers" in record.notes[0]
    assert 0 < kl(before, logits(model)) < 0.5


def test_a_share_of_the_model(model: models.Model) -> None:
    whole = model.parameters
    LowRank(parameters=0.85, of="model").apply(model, WINDOWS)
    assert 0.83 * whole < model.parameters <= 0.85 * whole


def test_each_part_of_the_default_helps(folder: Path) -> None:
    """Our metric, ranks, form and refit against plain SVD and whitening at equal numbers."""
    found = {}
    settings = {
        "plain": {"metric": "none", "uniform": True, "pivoted": False, "refit": False},
        "whitened": {"metric": "inputs", "uniform": True, "pivoted": False, "refit": False},
        "unfitted": {"refit": False},
        "ours": {},
    }
    for name, given in settings.items():
        m = models.load(folder)
        before = logits(m)
        LowRank(parameters=0.6, **given).apply(m, WINDOWS)
        found[name] = kl(before, logits(m))
    assert found["ours"] < found["unfitted"] < found["whitened"] < found["plain"]


def test_merged_is_the_same_function(folder: Path) -> None:
    kept, merged = models.load(folder), models.load(folder)
    LowRank(parameters=0.6).apply(kept, WINDOWS)
    LowRank(parameters=0.6, kept=False).apply(merged, WINDOWS)
    assert merged.parameters == sum(p.numel() for p in merged.module.parameters())
    assert not any(isinstance(m, ThinLinear) for m in merged.module.modules())
    assert torch.allclose(logits(kept), logits(merged), atol=2e-3)
    before = logits(kept)
    assert merge(kept.module) > 0
    assert torch.allclose(logits(kept), before, atol=1e-3)


def test_a_merged_model_is_a_plain_folder(model: models.Model, tmp_path: Path) -> None:
    LowRank(energy=0.9, kept=False).apply(model, WINDOWS)
    models.save(model, tmp_path / "out")
    assert torch.equal(logits(models.load(tmp_path / "out")), logits(model))


def test_kept_factors_are_refused_by_dense_formats(model: models.Model, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    LowRank(ranks={name: 7}).apply(model, WINDOWS)
    with pytest.raises(JoulesmithError, match="low-rank factors"):
        models.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    weight = models.gguf_weight(model, "blk.1.ffn_up.weight")
    assert int(torch.linalg.matrix_rank(weight)) == 7
    with pytest.raises(RuntimeError):  # a write would be lost: it must not pass in silence
        models.set_gguf_weight(model, "blk.1.ffn_up.weight", weight)


def test_given_ranks_and_named_layers(model: models.Model) -> None:
    up, down = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
    LowRank(ranks={up: 5, down: 9}, kept=(up,)).apply(model, WINDOWS)
    thin = {n: m for n, m in model.module.named_modules() if isinstance(m, ThinLinear)}
    assert {n: m.rank for n, m in thin.items()} == {up: 5}
    assert int(torch.linalg.matrix_rank(model.module.get_submodule(down).weight)) == 9


def test_a_callable_decides_what_is_kept(model: models.Model) -> None:
    asked = []

    def keep(rows: int, columns: int, rank: int) -> bool:
        asked.append((rows, columns, rank))
        return rows > columns

    LowRank(parameters=0.7).apply_with(model, WINDOWS, keep)
    thin = [m for m in model.module.modules() if isinstance(m, ThinLinear)]
    assert asked and thin
    assert all(m.out_features > m.in_features for m in thin)
    assert len(thin) == sum(r > c for r, c, _ in asked)


def test_the_survey_predicts_and_changes_nothing(model: models.Model, tmp_path: Path) -> None:
    before = logits(model)
    found = survey(model, WINDOWS, tmp_path)
    assert torch.equal(before, logits(model))
    name = "model.layers.0.self_attn.k_proj"
    s = found.spectrum(name)
    assert torch.allclose(s.left @ s.right, model.module.get_submodule(name).weight, atol=1e-4)
    # half the damage is the KL, to second order: for one layer, cut a little
    rank = 14
    a, b = s.cut(rank)
    with torch.no_grad():
        model.module.get_submodule(name).weight.copy_(a @ b)
    true = kl(before, logits(model))
    assert 0.3 < 0.5 * s.damage(rank) / true < 3


def test_output_moments_are_those_of_the_gradients(
    model: models.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the sums themselves, also where the processor would multiply in bfloat16
    monkeypatch.setattr("joulesmith.calibrate.products", lambda _: nullcontext())
    seen: list[Moments] = []
    calibrate(model.module, WINDOWS, lambda _, m: seen.extend(m.values()), outputs=True)
    for m in seen:
        assert m.outputs is not None and m.sample is not None and m.sample.g is not None
        assert torch.allclose(m.outputs.diagonal(), m.fisher, rtol=1e-4)
        assert torch.equal(m.outputs, m.outputs.T)
        # all windows are in the sample of so small a text
        expected = m.sample.g.flatten(0, -2).double()
        expected = expected.T @ expected / len(expected)
        assert torch.allclose(m.outputs.double(), expected, atol=0.02 * float(expected.max()))


def test_same_settings_same_weights_and_recipes(folder: Path, tmp_path: Path) -> None:
    step = LowRank(parameters=0.8, multiple=4, kept=False)
    Recipe((step,)).save(tmp_path / "r.yaml")
    states = []
    for recipe in (Recipe((step,)), read_recipe(tmp_path / "r.yaml")):
        m = models.load(folder)
        recipe.apply(m, WINDOWS)
        states.append(m.module.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_bad_settings_are_refused_and_change_nothing(model: models.Model) -> None:
    before = logits(model)
    for bad in ({"parameters": 0.9, "energy": 0.5}, {}, {"parameters": 0.0}):
        with pytest.raises(ValueError, match=r"parameters|greater"):
            LowRank(**bad)
    for step in (
        LowRank(ranks={"model.layers.9.mlp.up_proj": 3}),
        LowRank(ranks={"model.layers.0.mlp.up_proj": 65}),
        LowRank(parameters=0.0001),
        LowRank(parameters=0.1, of="model"),
        LowRank(energy=0.5, kept=("lm_head",)),
    ):
        with pytest.raises(JoulesmithError):
            step.apply(model, WINDOWS)
    assert torch.equal(before, logits(model))


def test_factors_absorb_the_error_of_a_quantized_model(folder: Path) -> None:
    """KL of coarse rounding alone against the same with factors of rank 4."""
    found: dict[bool, float] = {}
    model = models.load(folder)
    before = logits(model)
    residuals = absorb_model(model, WINDOWS, lambda _: "INT2-G32", lambda _: 4)
    assert torch.equal(before, logits(model))
    assert set(residuals) == {r.name for r in model.matrices() if r.layer is not None}
    for corrected in (False, True):
        m = models.load(folder)
        for name, r in residuals.items():
            columns = m.ref(name).shape[1]
            w = torch.as_tensor(grid("INT2-G32").unpack(r.packed, columns))
            models.set_gguf_weight(m, name, w + r.outer @ r.inner if corrected else w)
        found[corrected] = kl(before, logits(m))
    assert found[True] < 0.9 * found[False]
    with pytest.raises(JoulesmithError, match="rank"):
        absorb_model(model, WINDOWS, lambda _: "INT2-G32", lambda _: 0)
    with pytest.raises(JoulesmithError, match="blocks"):
        absorb_model(model, WINDOWS, lambda _: "Q2_K", lambda _: 4)
