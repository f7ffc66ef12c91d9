"""Moments summed batch by batch against all vectors at once, in float64."""

from __future__ import annotations

import torch

from joulesmith.compress.calls import coarse
from joulesmith.compress.input_stats import Sums


def test_means_far_from_zero_keep_their_spread() -> None:
    """Coarse products about zero would err by more than the whole variance here."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 6, generator=generator) + 100
    y = x + torch.randn(512, 6, generator=generator)
    sums = Sums()
    with coarse():
        for i in range(0, 512, 64):
            sums.add(x[i : i + 64], y[i : i + 64])
    found, a, b = sums.done(), x.double(), y.double()
    assert found.count == 512 and found.cross is not None
    torch.testing.assert_close(found.mean.double(), a.mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.dense_mean.double(), b.mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.gram.double(), a.T @ a / 512, rtol=2e-6, atol=0)
    torch.testing.assert_close(found.cross.double(), b.T @ a / 512, rtol=2e-6, atol=0)


def test_without_a_pair_there_is_no_cross() -> None:
    sums = Sums()
    sums.add(torch.ones(3, 2), None)
    found = sums.done()
    assert found.cross is None and torch.equal(found.dense_mean, found.mean)
    assert torch.equal(found.squares, torch.ones(2))
