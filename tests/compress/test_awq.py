"""AWQ's factors: never worse than none, and better where inputs have outliers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.compress.quantize import awq
from joulesmith.compress.quantize.grids import Grid, grid
from joulesmith.errors import JoulesmithError


def case(seed: int, outlier: float) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 64, generator=g)
    x[:, ::16] *= outlier
    return x, x.T @ x / len(x), [torch.randn(24, 64, generator=g) for _ in range(2)]


def int3() -> Grid:
    found = grid("INT3-G32")
    assert isinstance(found, Grid)
    return found


def test_outliers_are_protected_and_the_error_is_the_tokens_own() -> None:
    x, h, weights = case(0, 20.0)
    found = awq.protect(h, weights, int3())
    assert found.alpha > 0
    # the scales of `Grid.fit` already favour columns that matter: less is left to gain
    assert found.error < 0.9 * found.before
    # the same error, from the tokens and by the definition
    brute = 0.0
    importance = h.diagonal() / found.scale.square()
    for w in weights:
        moved = w * found.scale
        back = torch.as_tensor(int3().unpack(int3().pack(moved, importance), 64))
        brute += float(((back / found.scale - w).double() @ x.double().T).square().sum() / len(x))
    assert found.error == pytest.approx(brute, rel=1e-3)


@given(st.integers(0, 50), st.floats(1, 30))
def test_never_worse_than_no_factors(seed: int, outlier: float) -> None:
    _, h, weights = case(seed, outlier)
    found = awq.protect(h, weights, int3(), alphas=(0.25, 0.5, 0.75))
    assert found.error <= found.before
    assert (found.alpha == 0) == bool((found.scale == 1).all())


def test_scales_have_mean_one_and_dead_channels_keep_one() -> None:
    size = torch.tensor([0.0, 1.0, 4.0, 16.0])
    scale = awq.protecting_scale(size, 0.5)
    assert scale[0] == 1
    assert torch.allclose(scale[1:], torch.tensor([0.5, 1.0, 2.0]))
    assert bool((awq.protecting_scale(torch.zeros(3), 0.5) == 1).all())


def test_shared_channels_get_one_factor() -> None:
    _, h, weights = case(1, 10.0)
    source = torch.arange(64) % 32

    def channels(peak: torch.Tensor) -> torch.Tensor:
        return peak.new_zeros(32).scatter_reduce_(0, source, peak, "amax")

    found = awq.protect(h, weights, int3(), channels=channels, columns=lambda s: s[source])
    assert found.scale.shape == (32,)
    assert found.error <= found.before


def test_bad_moments_are_one_line() -> None:
    _, h, weights = case(0, 1.0)
    with pytest.raises(JoulesmithError, match="NaN"):
        awq.protect(h * torch.nan, weights, int3())
    with pytest.raises(JoulesmithError, match="does not belong"):
        awq.protect(h[:32, :32], weights, int3())
    with pytest.raises(JoulesmithError, match="alpha"):
        awq.protecting_scale(h.diagonal(), 1.5)
