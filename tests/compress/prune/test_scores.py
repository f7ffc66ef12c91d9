"""magnitude, wanda, taylor and movement against what they stand for."""

from __future__ import annotations

import torch

from joulesmith.compress.prune.magnitude import magnitude
from joulesmith.compress.prune.movement import movement, update_size
from joulesmith.compress.prune.taylor import fisher, taylor
from joulesmith.compress.prune.wanda import wanda


def test_wanda_is_the_error_of_one_weight() -> None:
    """Squared: the mean squared change of the output when that weight alone goes."""
    torch.manual_seed(0)
    w, x = torch.randn(3, 5), torch.randn(40, 5)
    score = wanda(w, x.square().mean(0))
    for i in range(3):
        for j in range(5):
            less = w.clone()
            less[i, j] = 0
            change = ((x @ (w - less).T)[:, i]).square().mean()
            torch.testing.assert_close(score[i, j].square(), change)
    assert torch.equal(magnitude(w), w.abs())
    assert not wanda(w, torch.full((5,), -1e-9)).isnan().any()


def test_taylor_is_the_change_of_a_linear_loss() -> None:
    torch.manual_seed(0)
    w, slope = torch.randn(3, 5).requires_grad_(), torch.randn(3, 5)
    (w * slope).sum().backward()
    assert w.grad is not None
    score = taylor(w.detach(), w.grad)
    for i in range(3):
        for j in range(5):
            torch.testing.assert_close(score[i, j], (w[i, j] * slope[i, j]).abs().detach())


def test_fisher_is_the_divergence_of_a_softmax() -> None:
    """To second order, where one logit is one weight: F = p (1 - p)."""
    w = torch.tensor([[0.02, -0.01, 0.03]], dtype=torch.float64)
    p = w.softmax(-1)
    score = fisher(w, p * (1 - p))
    for j in range(3):
        less = w.clone()
        less[0, j] = 0
        kl = (p * (p.log() - less.log_softmax(-1))).sum()
        torch.testing.assert_close(score[0, j], kl, rtol=0.02, atol=1e-9)


def test_movement_is_the_papers_sum_over_steps() -> None:
    """-sum of lr w dL/dw over small steps of descent."""
    torch.manual_seed(0)
    w0, target, lr = torch.randn(4, 4), torch.randn(4, 4), 1e-3
    w, total = w0.clone(), torch.zeros(4, 4)
    for _ in range(2000):
        g = w - target
        total -= lr * w * g
        w -= lr * g
    torch.testing.assert_close(movement(w, w0), total, atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(update_size(w, w0), (w - w0).abs())
    assert bool((movement(w, w0)[w.abs() < w0.abs()] < 0).all())
