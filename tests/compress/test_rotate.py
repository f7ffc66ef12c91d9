"""Rotations: orthogonal to the last digit, and a model that says the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard as sylvester

from joulesmith import models
from joulesmith.compress.quantize import hadamard as h
from joulesmith.compress.quantize.rotate import rotate_residual, rotate_values
from joulesmith.errors import JoulesmithError
from tiny import write_tiny

REACHED = {1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 64, 96, 128, 144, 160, 192, 256}


@given(st.integers(1, 300) | st.sampled_from(sorted(REACHED)))
def test_hadamard_is_orthogonal_and_flat(n: int) -> None:
    found = h.hadamard(n)
    if n in REACHED:
        assert found is not None
    if found is not None:
        assert torch.allclose(found @ found.T, torch.eye(n, dtype=found.dtype), atol=1e-12)
        assert torch.allclose(found.abs(), torch.full_like(found, n**-0.5))


def test_powers_of_two_are_sylvesters() -> None:
    found = h.hadamard(64)
    assert found is not None
    assert torch.allclose(found * 8, torch.from_numpy(sylvester(64)).double())


@given(st.integers(1, 90), st.integers(0, 5))
def test_a_rotation_is_orthogonal_and_of_its_seed(n: int, seed: int) -> None:
    r = h.rotation(n, seed)
    assert torch.allclose(r @ r.T, torch.eye(n, dtype=r.dtype), atol=1e-11)
    assert torch.equal(r, h.rotation(n, seed))


def test_no_rows_is_an_error() -> None:
    with pytest.raises(JoulesmithError, match="1 row or more"):
        h.hadamard(0)


def logits(model: models.Model) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.module(torch.arange(1, 60)[None]).logits
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def test_values_rotate_exactly(folder: Path) -> None:
    model = models.load(folder, dtype=torch.float64)
    before, old = logits(model), models.gguf_weight(model, "blk.0.attn_v.weight")
    rotate_values(model, seed=1)
    assert torch.allclose(logits(model), before, atol=2e-5)
    assert not torch.allclose(models.gguf_weight(model, "blk.0.attn_v.weight"), old, atol=1e-2)
    assert model.tied


def test_the_residual_stream_rotates_exactly_and_is_saved(folder: Path, tmp_path: Path) -> None:
    model = models.load(folder, dtype=torch.float64)
    with torch.no_grad():  # norms whose weights matter
        for name, p in model.module.named_parameters():
            if "norm" in name:
                p.mul_(torch.rand(p.shape, dtype=p.dtype) + 0.5)
    before = logits(model)
    rotate_residual(model, seed=2)
    assert torch.allclose(logits(model), before, atol=2e-5)
    assert not model.tied
    assert "output.weight" in model.tensors
    models.save(model, tmp_path / "out")
    again = models.load(tmp_path / "out", dtype=torch.float64)
    assert torch.allclose(logits(again), before, atol=2e-5)
    assert not again.tied


def test_outliers_are_spread(folder: Path) -> None:
    model = models.load(folder)
    with torch.no_grad():
        model.module.model.embed_tokens.weight[:, 3] *= 30
    rotate_residual(model)
    w = models.gguf_weight(model, "token_embd.weight")
    assert float(w.abs().max() / w.square().mean().sqrt()) < 12
