"""The held-out damage against a direct sum; repaired blocks against blocks as they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from joulesmith import models
from joulesmith.compress.prune.aligned import Fit, Hints, draw
from joulesmith.compress.prune.damage import Judge, split
from joulesmith.compress.prune.shrink import block_of, config_for, shape_of
from joulesmith.errors import JoulesmithError
from tiny import write_tiny

WINDOWS = np.random.default_rng(1).integers(0, 400, (20, 24)).astype(np.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> models.Model:
    return models.load(write_tiny(tmp_path_factory.mktemp("damage") / "tiny", steps=30))


def test_damage_is_the_mean_kl(model: models.Model, tmp_path: Path) -> None:
    judge = Judge(model.module, WINDOWS[:6], tmp_path)
    layers = model.module.model.layers
    assert judge.of(layers) == pytest.approx(0, abs=1e-4)  # the dense model's are kept as float16
    tokens = torch.from_numpy(WINDOWS[:6]).long()
    with torch.no_grad():
        p = model.module(tokens).logits.double().log_softmax(-1)
        hidden = model.module.model.norm(judge.run(layers[1:], judge.start)[0])
        q = model.module.lm_head(hidden).double().log_softmax(-1)
    p = p[:4]  # a batch
    wanted = float((p.exp() * (p - q)).sum(-1).mean())
    alone = Judge(model.module, WINDOWS[:4], tmp_path)
    assert alone.of(layers[1:]) == pytest.approx(wanted, rel=2e-3)
    assert alone.of([], alone.run(layers[1:], alone.start)) == alone.of(layers[1:])


def test_each_cut_is_repaired(model: models.Model, tmp_path: Path) -> None:
    (tmp_path / "judge").mkdir()
    fitted, held = split(WINDOWS)
    judge = Judge(model.module, held, tmp_path / "judge")
    before = [p.clone() for p in model.module.parameters()]
    now = shape_of(model)
    cuts = (
        (replace(now, neurons=48), (0, 1)),
        (replace(now, queries=1), (0, 1)),
        (replace(now, kv=1), (0, 1)),
        (replace(now, layers=1), (0,)),
        (replace(now, layers=1), (1,)),
    )
    for at, (shape, kept) in enumerate(cuts):
        found = []
        for fit in (None, Fit()):
            folder = tmp_path / f"{at}-{fit is None}"
            folder.mkdir()
            drawing = draw(model, shape, kept, fitted, folder, Hints({}), fit)
            config = config_for(model, shape, kept)
            like = model.module.model.layers[0]
            blocks = [block_of(drawing.state(i), like, config, i) for i in range(len(kept))]
            found.append(judge.of(blocks))
            assert [d.layer for d in drawing.blocks] == list(kept)
            assert all(0 <= d.error < 1 for d in drawing.blocks) or fit is None
        assert found[1] < found[0]
    after = model.module.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_windows_are_split() -> None:
    for n, held in ((2, 1), (10, 1), (64, 8), (128, 8)):
        windows = np.arange(n * 3, dtype=np.int32).reshape(n, 3)
        fitted, judged = split(windows)
        assert (len(judged), len(fitted)) == (held, n - held)
        assert not set(fitted[:, 0]) & set(judged[:, 0])
    with pytest.raises(JoulesmithError, match="2 calibration windows"):
        split(np.zeros((1, 8), np.int32))
