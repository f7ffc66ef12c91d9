"""Scores of windows against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from joulesmith.errors import JoulesmithError
from joulesmith.train import scores as module_of
from joulesmith.train.scores import HeldOut, scores
from small_modules import language

WINDOWS = np.random.default_rng(0).integers(0, 50, (6, 9)).astype(np.int32)


@pytest.mark.parametrize("rows", [1 << 22, 120])
def test_losses_and_gradients(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_of, "ROWS", rows)  # in one piece, and in several
    module = language("llama").train()
    tokens = torch.from_numpy(WINDOWS.astype(np.int64))
    with torch.no_grad():
        logits = module(input_ids=tokens[:, :-1]).logits.double()
    labels = tokens[:, 1:]
    loss = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)
    assert np.allclose(scores(module, WINDOWS), loss.numpy(), atol=1e-5)
    error = logits.softmax(-1) - nn.functional.one_hot(labels, 50)
    assert np.allclose(
        scores(module, WINDOWS, "gradient"), error.norm(dim=-1).mean(1).numpy(), atol=1e-5
    )
    assert module.training, "as it was"
    assert HeldOut(WINDOWS)(module) == pytest.approx(float(loss.mean()), abs=1e-5)


def test_the_gradient_is_that_of_autograd() -> None:
    module = language("llama")
    tokens = torch.from_numpy(WINDOWS[:1].astype(np.int64))
    logits = module(input_ids=tokens[:, :-1]).logits
    logits.retain_grad()
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens[0, 1:], reduction="sum").backward()
    wanted = logits.grad.norm(dim=-1).mean()
    assert scores(module, WINDOWS[:1], "gradient")[0] == pytest.approx(float(wanted), rel=1e-5)


def test_what_cannot_be_scored() -> None:
    module = language("llama")
    with pytest.raises(JoulesmithError, match="no windows"):
        scores(module, WINDOWS[:0])
    with torch.no_grad():
        next(module.parameters()).fill_(float("nan"))
    with pytest.raises(JoulesmithError, match="not finite"):
        scores(module, WINDOWS)
