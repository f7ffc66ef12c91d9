"""Tuning of steps and norms: better on text that it never saw, or nothing at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from joulesmith import models, text
from joulesmith.compress.quantize import tune
from joulesmith.compress.quantize.grids import Bytes, Grid, grid
from joulesmith.errors import JoulesmithError
from tiny import write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def windows(folder: Path) -> NDArray[np.int32]:
    model = models.load(folder)
    found = text.windows(model, text.english(), 64, {"a": 48}, 0)["a"]
    return found.tokens


def rounded(model: models.Model, kind: str) -> dict[str, tuple[str, Bytes]]:
    g = grid(kind)
    inside = [r for r in model.matrices() if r.layer is not None]
    return {r.name: (kind, g.pack(models.gguf_weight(model, r.name))) for r in inside}


def divergence(model: models.Model, logits: torch.Tensor, windows: NDArray[np.int32]) -> float:
    with torch.no_grad():
        got = model.module(torch.from_numpy(windows).long()).logits.log_softmax(-1)
    wanted = logits.log_softmax(-1)
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["INT3-G32", "INT2-G32-ZP", "IQ4_NL", "Q4_1"])
def test_less_damage_on_text_never_seen(
    folder: Path, windows: NDArray[np.int32], kind: str
) -> None:
    model = models.load(folder)
    fitted, unseen = windows[:32], windows[32:]
    teacher = tune.last_hidden(model, fitted)
    with torch.no_grad():
        logits = model.module(torch.from_numpy(unseen).long()).logits
    packed = rounded(model, kind)
    for name, (k, raw) in packed.items():
        back = torch.as_tensor(grid(k).unpack(raw, model.ref(name).shape[1]))
        models.set_gguf_weight(model, name, back)
    before = divergence(model, logits, unseen)
    shares: list[float] = []
    found = tune.tune(model, packed, fitted, teacher, epochs=3, progress=shares.append)
    assert found.after < found.before
    assert divergence(model, logits, unseen) < before
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    for name, (k, raw) in found.packed.items():
        g = grid(k)
        assert isinstance(g, Grid)
        columns = model.ref(name).shape[1]
        back = models.gguf_weight(model, name)
        assert np.array_equal(back.numpy(), g.unpack(raw, columns)), "the model has what is packed"
        old, new = g.read(packed[name][1], columns), g.read(raw, columns)
        assert torch.equal(old[0], new[0]), "codes stay"
    assert type(model.module.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert all(p.requires_grad for p in model.module.parameters())


def test_the_same_seed_gives_the_same_bytes(folder: Path, windows: NDArray[np.int32]) -> None:
    found = []
    for _ in range(2):
        model = models.load(folder)
        teacher = tune.last_hidden(model, windows[:16])
        packed = rounded(model, "INT3-G32")
        found.append(tune.tune(model, packed, windows[:16], teacher, epochs=1, seed=3))
    for name, (_, raw) in found[0].packed.items():
        assert np.array_equal(raw, found[1].packed[name][1])


def test_a_gain_that_is_none_changes_nothing(folder: Path, windows: NDArray[np.int32]) -> None:
    model = models.load(folder)
    teacher = tune.last_hidden(model, windows[:8])
    packed = rounded(model, "INT3-G32")
    norm = model.module.model.norm.weight.detach().clone()
    # A rate that breaks the model: the start stays best.
    found = tune.tune(model, packed, windows[:8], teacher, epochs=1, rate=30.0)
    assert found.after == found.before
    assert torch.equal(model.module.model.norm.weight, norm)
    for name, (_, raw) in found.packed.items():
        assert np.array_equal(raw, packed[name][1])


def test_gradients_of_steps_are_those_of_the_dense_product() -> None:
    generator = torch.Generator().manual_seed(0)
    level = torch.randint(-4, 4, (6, 64), generator=generator).to(torch.int8)
    x = torch.randn(5, 64, generator=generator, dtype=torch.float64)
    step = torch.rand(6, 2, generator=generator, dtype=torch.float64).requires_grad_()
    offset = torch.rand(6, 2, generator=generator, dtype=torch.float64).requires_grad_()

    def dense() -> torch.Tensor:
        groups = level.view(6, 2, 32).double() * step[:, :, None] + offset[:, :, None]
        return groups.reshape(6, 64)

    up = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad(x @ dense().T, (step, offset), up)
    got = torch.autograd.grad(
        tune._Product.apply(x, step, offset, dense().detach(), level), (step, offset), up
    )
    for a, b in zip(wanted, got, strict=True):
        assert torch.allclose(a, b)


def test_one_window_is_refused(folder: Path, windows: NDArray[np.int32]) -> None:
    model = models.load(folder)
    with pytest.raises(JoulesmithError, match="two windows"):
        tune.tune(model, {}, windows[:1], tune.last_hidden(model, windows[:1]))
