"""SparseGPT against the loop that it is a faster form of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from joulesmith.compress.prune.patterns import Pattern
from joulesmith.compress.prune.sparsegpt import inverse_factor, sparsegpt
from joulesmith.errors import JoulesmithError


def problem(seed: int, rows: int = 6, n: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * n, n, generator=g) @ torch.randn(n, n, generator=g)
    return torch.randn(rows, n, generator=g), x.T @ x / len(x)


def error(new: torch.Tensor, old: torch.Tensor, gram: torch.Tensor) -> float:
    d = (new - old).double()
    return float(((d @ gram.double()) * d).sum())


def by_hand(w: torch.Tensor, gram: torch.Tensor, pattern: Pattern, share: float) -> np.ndarray:
    """Optimal brain surgeon, column by column, the inverse taken anew of what is to the right."""
    w = w.double().numpy().copy()
    h = gram.double().numpy()
    h = h + 0.01 * np.diag(h).mean() * np.eye(len(h))
    n = w.shape[1]
    # the inverse of the block from j on: of column j, 1 / U[j, j]^2 of the Cholesky factor
    inverses = [np.linalg.inv(h[j:, j:]) for j in range(n)]
    d = np.array([a[0, 0] for a in inverses])

    def mask(start: int, stop: int) -> np.ndarray:
        score = torch.from_numpy(w[:, start:stop] ** 2 / d[start:stop])
        return pattern.mask(score, round((1 - share) * score.numel())).numpy()

    span = pattern.of or n
    for j in range(n):
        if j % span == 0:
            stays = mask(j, j + span)
        gone = ~stays[:, j % span]
        inverse = inverses[j]
        step = np.where(gone, w[:, j], 0) / inverse[0, 0]
        w[:, j:] -= step[:, None] * inverse[0]
        w[gone, j] = 0
    return w


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "pattern", [Pattern(), Pattern(by_row=True), Pattern(2, 4), Pattern(1, 4), Pattern(tile=(2, 4))]
)
def test_against_a_loop(seed: int, pattern: Pattern) -> None:
    w, gram = problem(seed)
    found = sparsegpt(w, gram, pattern, 0.5)
    want = by_hand(w, gram, pattern, 0.5)
    assert np.array_equal(found.numpy() == 0, want == 0)
    np.testing.assert_allclose(found.numpy(), want, atol=2e-3)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 2)])
def test_blocks_of_columns_change_nothing_for_n_of_m(pattern: Pattern) -> None:
    w, gram = problem(3, n=24)
    whole = sparsegpt(w, gram, pattern, 0.5)
    for block in (4, 7, 16):
        torch.testing.assert_close(
            sparsegpt(w, gram, pattern, 0.5, block=block), whole, atol=1e-3, rtol=1e-3
        )


@given(
    st.integers(0, 1000),
    st.sampled_from([0.25, 0.5, 0.75]),
    st.sampled_from([Pattern(), Pattern(by_row=True), Pattern(2, 4), Pattern(tile=(2, 2))]),
)
@settings(max_examples=40)
def test_exactly_so_many_zeros_in_each_block(seed: int, share: float, pattern: Pattern) -> None:
    w, gram = problem(seed)
    found = sparsegpt(w, gram, pattern, share, block=8)
    share = pattern.sparsity or share
    for part in (found[:, :8], found[:, 8:]):
        assert int((part == 0).sum()) == round(share * 48)
        kept = part.numel() - round(share * 48)
        assert torch.equal(pattern.mask((part != 0).float(), kept), part != 0)


@pytest.mark.parametrize("pattern", [Pattern(), Pattern(by_row=True), Pattern(2, 4)])
def test_far_less_error_than_magnitude(pattern: Pattern) -> None:
    """Where inputs are many; a single ill-conditioned problem may go the other way."""
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(512, 64, generator=g) @ (
            torch.eye(64) + 0.15 * torch.randn(64, 64, generator=g)
        )
        w, gram = torch.randn(16, 64, generator=g), x.T @ x / len(x)
        plain = w * pattern.mask(w.abs(), w.numel() // 2)
        found = sparsegpt(w, gram, pattern, 0.5, block=32)
        assert error(found, w, gram) < 0.9 * error(plain, w, gram)


def test_inputs_that_are_never_there() -> None:
    w, gram = problem(0)
    gram[3], gram[:, 3] = 0, 0
    kept = gram.double().clone()
    wide = kept.clone()
    found = sparsegpt(w, wide, Pattern(), 0.5)
    assert not found[:, 3].any() and bool(torch.isfinite(found).all())
    assert torch.equal(wide, kept), "what it is given stays as it is"
    assert not sparsegpt(w, torch.zeros(16, 16), Pattern(), 0.5).any()


def test_the_factor() -> None:
    _, gram = problem(1)
    u = inverse_factor(gram, 0.01).double()
    damped = gram.double() + 0.01 * gram.diagonal().double().mean() * torch.eye(16)
    torch.testing.assert_close(u.T @ u @ damped, torch.eye(16).double(), atol=1e-3, rtol=0)
    assert not u.tril(-1).any()
    with pytest.raises(JoulesmithError, match="far from positive semidefinite"):
        inverse_factor(torch.eye(4) - 2e9 * torch.ones(4, 4).fill_diagonal_(0), 0.01)
