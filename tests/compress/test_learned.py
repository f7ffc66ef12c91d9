"""Learned rounding: block outputs nearer to the float model's, on every kind of grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from joulesmith import models, text
from joulesmith.compress.quantize import learned
from joulesmith.compress.quantize.grids import Bytes, grid
from joulesmith.errors import JoulesmithError
from tiny import write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def windows(folder: Path) -> NDArray[np.int32]:
    return text.windows(models.load(folder), text.english(), 64, {"a": 32}, 0)["a"].tokens


def rounded(model: models.Model, kind: str) -> dict[str, tuple[str, Bytes]]:
    g = grid(kind)
    inside = [r for r in model.matrices() if r.layer is not None]
    return {r.name: (kind, g.pack(models.gguf_weight(model, r.name))) for r in inside}


def divergence(model: models.Model, other: models.Model, windows: NDArray[np.int32]) -> float:
    tokens = torch.from_numpy(windows).long()
    with torch.no_grad():
        a, b = (m.module(tokens).logits.log_softmax(-1) for m in (other, model))
    return float((a.exp() * (a - b)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["INT3-G32", "INT2-G32-ZP", "IQ4_NL", "NF4-G32", "TERNARY-G32"])
def test_better_blocks_and_a_better_model_on_unseen_text(
    folder: Path, windows: NDArray[np.int32], kind: str
) -> None:
    exact, model = models.load(folder), models.load(folder)
    packed = rounded(model, kind)
    for name, (k, raw) in packed.items():
        back = grid(k).unpack(raw, model.ref(name).shape[1])
        models.set_gguf_weight(model, name, torch.as_tensor(back))
    before = divergence(model, exact, windows[24:])
    model = models.load(folder)
    shares: list[float] = []
    found = learned.learn(model, packed, windows[:24], steps=60, progress=shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert set(found.errors) == {0, 1}
    assert all(after < 0.97 * start for start, after in found.errors.values())
    assert divergence(model, exact, windows[24:]) < before
    for name, (k, raw) in found.packed.items():
        back = grid(k).unpack(raw, model.ref(name).shape[1])
        assert np.array_equal(models.gguf_weight(model, name).numpy(), back)
    assert type(model.module.model.layers[1].self_attn.q_proj) is torch.nn.Linear
    assert all(p.requires_grad for p in model.module.parameters())


def test_no_steps_give_back_what_came(folder: Path, windows: NDArray[np.int32]) -> None:
    model = models.load(folder)
    packed = rounded(model, "INT4-G32")
    found = learned.learn(model, packed, windows[:4], steps=0)
    for name, (_, raw) in found.packed.items():
        assert np.array_equal(raw, packed[name][1])
    assert all(a == b for a, b in found.errors.values())


def test_the_same_seed_gives_the_same_bytes(folder: Path, windows: NDArray[np.int32]) -> None:
    found = []
    for _ in range(2):
        model = models.load(folder)
        packed = rounded(model, "INT3-G32")
        found.append(learned.learn(model, packed, windows[:8], steps=10, batch=3, seed=5))
    for name, (_, raw) in found[0].packed.items():
        assert np.array_equal(raw, found[1].packed[name][1])


def test_no_text_is_refused(folder: Path) -> None:
    with pytest.raises(JoulesmithError, match="calibration text"):
        learned.learn(models.load(folder), {}, np.zeros((0, 8), np.int32))
