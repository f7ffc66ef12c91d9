"""States of live weights only, beside torch's optimizers on dense modules with masked gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from joulesmith.train.live import Live
from joulesmith.train.optimizers import state_bytes

MAKERS: dict[str, Any] = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
    "momentum": lambda ps: torch.optim.SGD(
        ps, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
}


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 5))


def weights(module: nn.Sequential) -> list[nn.Parameter]:
    return [m.weight for m in module if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("name", MAKERS)
def test_it_is_the_dense_optimizer_with_masked_gradients(name: str) -> None:
    sparse, dense = net(), net()
    g = torch.Generator().manual_seed(1)

    def draw() -> list[torch.Tensor]:
        return [torch.rand(p.shape, generator=g) < 0.3 for p in weights(dense)]

    now = draw()
    live = Live(MAKERS[name](sparse.parameters()), dict(zip(weights(sparse), now, strict=True)))
    peer = MAKERS[name](dense.parameters())
    for p, mask in zip(weights(dense), now, strict=True):
        p.data *= mask
    for step in range(120):
        if step % 25 == 24:  # masks move: known states stay, others begin at zero
            after = draw()
            for p, q, a, b in zip(weights(sparse), weights(dense), now, after, strict=True):
                live.move(p, b)
                q.data *= b
                for key, value in peer.state[q].items():
                    if key != "step":
                        value *= a & b
            now = after
        x = torch.randn(16, 12, generator=g)
        for module in (sparse, dense):
            module.zero_grad()
            module(x).square().sub(1).square().mean().backward()
        for q, mask in zip(weights(dense), now, strict=True):
            assert q.grad is not None
            q.grad *= mask
        live.step()
        peer.step()
        for p, q in zip(sparse.parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        for p, mask in zip(weights(sparse), now, strict=True):
            assert p.shape == mask.shape and not p.data[~mask].any()
            for key, value in live.state[p].items():
                assert value.shape == (() if key == "step" else (int(mask.sum()),))


def test_gradients_are_left_as_they_were() -> None:
    module = net()
    masks = {p: torch.rand(p.shape) < 0.5 for p in weights(module)}
    live = Live(MAKERS["adamw"](module.parameters()), masks)
    module(torch.randn(3, 12)).sum().backward()
    before = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    live.step()
    for p, grad in zip(module.parameters(), before, strict=True):
        assert p.grad is not None and torch.equal(p.grad, grad)
    live.mask_gradients()
    for p, mask in masks.items():
        assert p.grad is not None and not p.grad[~mask].any() and p.grad[mask].any()


def test_a_parameter_without_a_gradient_stays() -> None:
    module = net()
    live = Live(
        MAKERS["adamw"](module.parameters()),
        {p: torch.rand(p.shape) < 0.5 for p in weights(module)},
    )
    before = [p.data.clone() for p in module.parameters()]
    live.step()
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert not live.scores(weights(module)[0]).any()


def test_movement_scores_are_the_sum_of_the_paper() -> None:
    module = net()
    p = weights(module)[0]
    mask = torch.rand(p.shape) < 0.5
    live = Live(torch.optim.SGD(module.parameters(), lr=0.1), {p: mask}, movement=True)
    want = torch.zeros_like(p)
    for _ in range(5):
        module.zero_grad()
        module(torch.randn(8, 12)).square().mean().backward()
        assert p.grad is not None
        want -= (p.detach() * p.grad) * mask
        live.step()
    torch.testing.assert_close(live.scores(p), want.detach())


@pytest.mark.parametrize(("name", "dense_share"), [("adamw", 0.22), ("momentum", 0.235)])
def test_bytes_at_80_percent_zeros(name: str, dense_share: float) -> None:
    def used(sparse: bool, movement: bool = False) -> int:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Linear(512, 64, bias=False))
        optimizer = MAKERS[name](module.parameters())
        if sparse:
            masks = {}
            for p in module.parameters():
                masks[p] = (torch.randperm(p.numel()) < p.numel() // 5).view_as(p)
            optimizer = Live(optimizer, masks, movement)
        module(torch.randn(2, 256)).sum().backward()
        optimizer.step()
        return state_bytes(optimizer)

    share = used(True) / used(False)
    assert 0.2 < share < dense_share, share
    if name == "adamw":
        assert used(True, movement=True) / used(False) < 0.32
