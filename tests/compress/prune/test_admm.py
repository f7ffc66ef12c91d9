"""ADMM's problem, support and repair against least squares in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from joulesmith.compress.prune import admm
from joulesmith.compress.prune.patterns import Pattern
from joulesmith.compress.prune.sparsegpt import sparsegpt
from joulesmith.errors import JoulesmithError

PATTERNS = st.sampled_from([Pattern(), Pattern(by_row=True), Pattern(2, 4), Pattern(tile=(2, 4))])


def drawn(seed: int, rows: int = 6, n: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, inputs as they are and as they were."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(5 * n, n, generator=g) @ torch.randn(n, n, generator=g)
    return torch.randn(rows, n, generator=g), y + 0.3 * torch.randn(y.shape, generator=g), y


def moments(x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    return (x if y is None else y).T @ x / len(x)


def damped(gram: np.ndarray, damping: float) -> np.ndarray:
    """What `problem` adds, in the layer's own coordinates."""
    d = np.diag(gram)
    return damping * np.diag(d + 1e-4 * d.mean())


def test_the_best_weights_are_those_of_the_normal_equations() -> None:
    w, x, y = drawn(0)
    gram, cross = moments(x), moments(x, y)
    p = admm.problem(w, gram, cross, damping=0.01)
    more = damped(gram.double().numpy(), 0.01)
    a, b = gram.double().numpy() + more, w.double().numpy() @ (cross.double().numpy() + more)
    np.testing.assert_allclose((p.best / p.scale).numpy(), np.linalg.solve(a, b.T).T, atol=2e-3)
    np.testing.assert_allclose((p.a * p.scale[:, None] * p.scale).numpy(), a, rtol=1e-4, atol=1e-3)
    same = admm.problem(w, gram)
    torch.testing.assert_close(same.best / same.scale, w)
    torch.testing.assert_close(admm.problem(w, gram, gram).best, same.best, atol=1e-3, rtol=1e-3)


def test_loss_is_the_error_of_the_outputs() -> None:
    w, x, _ = drawn(1)
    p, new = admm.problem(w, moments(x), damping=1e-6), w * (w.abs() > 0.5)
    want = (x @ (new - w).T).square().mean(0)
    torch.testing.assert_close(admm.loss(p, new), want, rtol=2e-3, atol=1e-4)


@given(st.integers(0, 1000), PATTERNS, st.booleans())
@settings(max_examples=30)
def test_refit_is_least_squares_on_the_support(seed: int, pattern: Pattern, paired: bool) -> None:
    w, x, y = drawn(seed)
    gram, cross = moments(x), moments(x, y) if paired else None
    p = admm.problem(w, gram, cross, damping=0.05)
    mask = pattern.mask(w.abs(), w.numel() // 2)
    found = (admm.refitted(p, mask, 80) / p.scale).numpy()
    more = damped(gram.double().numpy(), 0.05)
    a = gram.double().numpy() + more
    b = w.double().numpy() @ ((gram if cross is None else cross).double().numpy() + more)
    want = np.zeros(w.shape)
    root = np.linalg.cholesky(a).T  # |root w - root^-T b|^2
    for i, row in enumerate(mask.numpy()):
        target = np.linalg.solve(root.T, b[i])
        want[i, row] = np.linalg.lstsq(root[:, row], target, rcond=None)[0]
    np.testing.assert_allclose(found, want, atol=3e-3)
    assert not found[~mask.numpy()].any()


@given(st.integers(0, 1000), PATTERNS, st.sampled_from([0.25, 0.5, 0.75]), st.booleans())
@settings(max_examples=60)
def test_never_worse_than_scaled_magnitude(
    seed: int, pattern: Pattern, share: float, paired: bool
) -> None:
    w, x, y = drawn(seed)
    p = admm.problem(w, moments(x), moments(x, y) if paired else None, damping=0.05)
    kept = round((1 - share) * w.numel())
    plain = pattern.mask(p.best.square(), kept)
    new = admm.prune(p, pattern, kept)
    mask = new != 0
    assert torch.equal(mask.sum(), plain.sum())
    assert torch.equal(pattern.mask(mask.float(), kept), mask), "a mask of the pattern"
    least = admm.loss(p, admm.refitted(p, plain) / p.scale).sum()
    # products of the comparison are coarse where the processor is faster at them
    assert float(admm.loss(p, new).sum()) <= float(least) * 1.01
    found = admm.support(p, pattern, kept)
    assert torch.equal(pattern.mask(found.float(), kept), found)


def test_half_the_error_of_sparsegpt_is_not_unusual() -> None:
    ratios = []
    for seed in range(10):
        w, x, _ = drawn(seed, 16, 32)
        gram = moments(x)
        p = admm.problem(w, gram, damping=0.01)
        new, other = admm.prune(p, Pattern(), 256), sparsegpt(w, gram, Pattern(), 0.5)
        ratios.append(float(admm.loss(p, new).sum() / admm.loss(p, other).sum()))
    assert max(ratios) < 1 and np.mean(ratios) < 0.7


def test_dear_rows_keep_more() -> None:
    w, x, _ = drawn(2)
    p = admm.problem(w, moments(x))
    rows = torch.tensor([100.0, 1, 1, 1, 1, 1])
    even, dear = (
        (admm.prune(p, Pattern(), 48, rows=r) != 0).sum(1) for r in (None, rows)
    )  # fmt: skip
    assert dear[0] > even[0] and dear.sum() == even.sum() == 48
    assert (admm.prune(p, Pattern(), 48, rows=torch.zeros(6)) != 0).sum() == 48


def test_moments_that_rounding_spoilt() -> None:
    """A large constant beside a small signal, subtracted in float32."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 16, generator=g)
    x[:, :4] = 3000 + 0.01 * x[:, :4]
    gram = moments(x) - torch.outer(x.mean(0), x.mean(0))
    w = torch.randn(6, 16, generator=g)
    for cross in (None, gram):
        p = admm.problem(w, gram, cross, damping=0.01)
        new = admm.prune(p, Pattern(), 48)
        assert bool(torch.isfinite(new).all()) and int((new != 0).sum()) == 48


def test_bad_moments() -> None:
    w, gram = torch.ones(2, 4), torch.eye(4)
    p = admm.problem(w, torch.zeros(4, 4))
    assert int((admm.prune(p, Pattern(), 4) != 0).sum()) == 4, "inputs that were never there"
    gram[1, 1] = torch.nan
    with pytest.raises(JoulesmithError, match="hold NaN or infinity"):
        admm.problem(w, gram)
    with pytest.raises(JoulesmithError, match="far from positive semidefinite"):
        admm.problem(w, torch.eye(4) - 1e9 * torch.ones(4, 4).fill_diagonal_(0))
