"""Losses against float64 sums written out, and their gradients against differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from joulesmith.errors import JoulesmithError
from joulesmith.train import losses

ROWS, VOCAB = 5, 9


def logits(seed: int, *shape: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*(shape or (2, ROWS, VOCAB)), generator=g, dtype=torch.float64)


def shares(row: np.ndarray, temperature: float) -> list[float]:
    e = [math.exp(x / temperature) if x > -math.inf else 0.0 for x in row]
    return [x / math.fsum(e) for x in e]


def divergence(p: Tensor, q: Tensor, temperature: float) -> float:
    rows = []
    for a, b in zip(p.flatten(0, -2).numpy(), q.flatten(0, -2).numpy(), strict=True):
        x, y = shares(a, temperature), shares(b, temperature)
        rows.append(
            math.fsum(u * (math.log(u) - math.log(v)) for u, v in zip(x, y, strict=True) if u)
        )
    return temperature**2 * math.fsum(rows) / len(rows)


def test_hard() -> None:
    x = logits(0)
    labels = torch.randint(0, VOCAB, (2, ROWS), generator=torch.Generator().manual_seed(1))
    wanted = -np.mean(
        [
            math.log(shares(r, 1)[int(i)])
            for r, i in zip(x.flatten(0, 1).numpy(), labels.flatten(), strict=True)
        ]
    )
    assert float(losses.hard(x, labels)) == pytest.approx(wanted, rel=1e-12)
    assert float(losses.hard(x.half(), labels)) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_and_reverse(temperature: float) -> None:
    s, t = logits(0), logits(1)
    found = losses.soft(s, t, temperature)
    assert float(found) == pytest.approx(divergence(t, s, temperature), rel=1e-12)
    assert float(losses.soft(s.float(), t.float(), temperature)) == pytest.approx(
        float(found), rel=1e-5
    )
    back = losses.reverse(s, t, temperature)
    assert float(back) == pytest.approx(divergence(s, t, temperature), rel=1e-12)
    assert float(losses.soft(t, t, temperature)) == pytest.approx(0, abs=1e-15)


def test_soft_at_a_high_temperature_matches_logits() -> None:
    """Hinton et al. 2015, equation 4: then gradients are those of squared differences of centred
    logits, over the vocabulary."""
    s, t = logits(0).requires_grad_(True), logits(1)
    losses.soft(s, t, 1e4).backward()
    centred = (s - s.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))
    torch.testing.assert_close(s.grad, centred.detach() / VOCAB / 10, rtol=1e-2, atol=1e-5)


def test_tokens_of_no_probability_count_nothing() -> None:
    s, t = logits(0), logits(1)
    cut = t.clone()
    cut[..., 3] = -torch.inf
    s.requires_grad_(True)
    found = losses.soft(s, cut)
    assert float(found.detach()) == pytest.approx(divergence(cut, s.detach(), 1), rel=1e-12)
    found.backward()
    assert s.grad is not None and torch.isfinite(s.grad).all()
    both = s.detach().clone()
    both[..., 3] = -torch.inf
    both.requires_grad_(True)
    for f in (losses.soft, losses.reverse):
        value = f(both, cut)
        rest = [i for i in range(VOCAB) if i != 3]
        alone = f(both.detach()[..., rest], cut[..., rest])
        assert float(value.detach()) == pytest.approx(float(alone), rel=1e-12)
        (gradient,) = torch.autograd.grad(value, both)
        assert torch.isfinite(gradient).all()
    ids, values = losses.top_of(cut, VOCAB)
    again = losses.soft_top(s.detach(), ids, values)
    assert float(again) == pytest.approx(float(found.detach()), rel=1e-12)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_soft_top_of_all_is_soft(temperature: float) -> None:
    s, t = logits(0), logits(1)
    ids, values = losses.top_of(t, VOCAB)
    assert ids.dtype == torch.int32
    found = losses.soft_top(s, ids, values, temperature)
    assert float(found) == pytest.approx(float(losses.soft(s, t, temperature)), rel=1e-12)
    a, b = s.clone().requires_grad_(True), s.clone().requires_grad_(True)
    losses.soft(a, t, temperature).backward()
    losses.soft_top(b, ids, values, temperature).backward()
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("k", range(1, VOCAB))
@pytest.mark.parametrize("seed", range(4))
def test_soft_top_is_soft_of_merged_outcomes(k: int, seed: int) -> None:
    s, t = logits(seed), logits(seed + 100)
    ids, values = losses.top_of(t, k)
    found = float(losses.soft_top(s, ids, values))
    rows = []
    for a, b, chosen in zip(
        t.flatten(0, 1).numpy(), s.flatten(0, 1).numpy(), ids.flatten(0, 1), strict=True
    ):
        x, y = shares(a, 1), shares(b, 1)
        top = [int(i) for i in chosen]
        assert sorted(top) == sorted(np.argsort(-a)[:k].tolist())
        pairs = [(x[i], y[i]) for i in top]
        pairs.append((1 - sum(u for u, _ in pairs), 1 - sum(v for _, v in pairs)))
        rows.append(math.fsum(u * math.log(u / v) for u, v in pairs))
    assert found == pytest.approx(float(np.mean(rows)), rel=1e-6)
    assert found <= float(losses.soft(s, t)) + 1e-9, "merging outcomes loses divergence"
    more = losses.soft_top(s, *losses.top_of(t, k + 1))
    assert found <= float(more) + 1e-6


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_soft_top_leaves_logits_alone(kind: torch.dtype) -> None:
    s = logits(0).to(kind).requires_grad_()
    before = s.detach().clone()
    losses.soft_top(s, *losses.top_of(logits(1), 3)).backward()  # type: ignore[no-untyped-call]
    assert torch.equal(s.detach(), before)


@pytest.mark.parametrize("k", [1, 4, VOCAB])
def test_soft_top_with_labels_is_both_losses(k: int) -> None:
    a, b = (logits(0).requires_grad_(True) for _ in range(2))
    labels = torch.randint(0, VOCAB, (2, ROWS), generator=torch.Generator().manual_seed(1))
    ids, values = losses.top_of(logits(1), k)
    wanted = losses.soft_top(a, ids, values) + 0.3 * losses.hard(a, labels)
    found = losses.soft_top(b, ids, values, labels=labels, share=0.3)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-12)
    for loss in (wanted, found):
        (2 * loss).backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-14)


def test_labels_are_learnt_at_temperature_one() -> None:
    labels = torch.zeros(2, ROWS, dtype=torch.int64)
    with pytest.raises(JoulesmithError, match="temperature of 2"):
        losses.soft_top(logits(0), *losses.top_of(logits(1), 2), 2.0, labels=labels, share=1)


def test_soft_top_where_the_student_is_sure() -> None:
    """What the student leaves for other tokens is far below float32's step at 1."""
    s = torch.tensor([[40.0, 0, 0, 0]], requires_grad=True)
    t = torch.tensor([[1.0, 0, 0, 0]])
    found = losses.soft_top(s, *losses.top_of(t, 1))
    p = shares(t[0].numpy(), 1)
    wanted = p[0] * math.log(p[0]) + (1 - p[0]) * (math.log(1 - p[0]) + 40 - math.log(3))
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-5)
    found.backward()
    assert s.grad is not None and float(s.grad[0, 0]) == pytest.approx(1 - p[0], rel=1e-4)


@pytest.mark.parametrize("far", [40.0, 200.0, 1000.0])
def test_gradients_of_a_student_that_is_sure(far: float) -> None:
    s = torch.tensor([[far, 0, 1, 0]], requires_grad=True)
    t = torch.tensor([[1.0, 0, 0, 0]])
    p = shares(t[0].numpy(), 1)
    for f in (
        lambda: losses.soft(s, t),
        lambda: losses.soft_top(s, *losses.top_of(t, 1)),
    ):
        (found,) = torch.autograd.grad(f(), s)
        assert float(found[0, 0]) == pytest.approx(1 - p[0], rel=1e-4)
        assert float(found.sum()) == pytest.approx(0, abs=1e-4)  # float32 steps at 1000
    (found,) = torch.autograd.grad(losses.reverse(s, t), s)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("piece", [1, VOCAB, 3 * VOCAB])
def test_some_rows_at_a_time(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    s, t = logits(0).float().requires_grad_(True), logits(1).float()
    ids, values = losses.top_of(t, 3)
    for f in (
        lambda: losses.soft(s, t, 2.0),
        lambda: losses.reverse(s, t, 2.0),
        lambda: losses.soft_top(s, ids, values, 2.0),
    ):
        found = []
        for size in (1 << 22, piece):
            monkeypatch.setattr(losses, "PIECE", size)
            value = 0.5 * f()
            found.append((value.detach(), *torch.autograd.grad(value, s)))
        torch.testing.assert_close(found[0], found[1])


def test_logits_in_bfloat16_have_gradients_in_it() -> None:
    s, t = logits(0).bfloat16().requires_grad_(True), logits(1).bfloat16()
    value = losses.soft(s, t)
    assert value.dtype == torch.float32
    value.backward()
    wide = s.detach().double().requires_grad_(True)
    losses.soft(wide, t.double()).backward()
    assert s.grad is not None and wide.grad is not None and s.grad.dtype == torch.bfloat16
    torch.testing.assert_close(s.grad.double(), wide.grad, rtol=1e-2, atol=1e-4)


def test_soft_top_at_a_temperature_takes_the_tail_for_flat() -> None:
    s = logits(0)
    t = logits(1)
    ids, values = losses.top_of(t, 3)
    flat = torch.log(((1 - values.exp().sum(-1, keepdim=True)) / (VOCAB - 3)).clamp_min(1e-30))
    spread = flat.expand(*t.shape).scatter(-1, ids.long(), values)
    # the student's tail flat too: then merging its tokens loses nothing
    level = s.scatter(-1, ids.long(), -torch.inf).logsumexp(-1, keepdim=True) - math.log(VOCAB - 3)
    even = level.expand(*s.shape).scatter(-1, ids.long(), s.gather(-1, ids.long()))
    found = losses.soft_top(even, ids, values, 2.5)
    assert float(found) == pytest.approx(float(losses.soft(even, spread, 2.5)), rel=1e-6)


def test_gradients() -> None:
    t = logits(1, 2, 3, 6)
    ids, values = losses.top_of(t, 2)
    labels = torch.zeros(2, 3, dtype=torch.int64)
    s = logits(0, 2, 3, 6).requires_grad_(True)
    weights = logits(2, 1, 2, 3, 3).softmax(-1)
    for f in (
        lambda x: losses.hard(x, labels),
        lambda x: losses.soft(x, t, 2.0),
        lambda x: losses.reverse(x, t, 2.0),
        lambda x: losses.soft_top(x, ids, values, 1.5),
        lambda x: losses.hidden(x, t),
    ):
        assert torch.autograd.gradcheck(f, (s,))
    x = logits(3, 1, 2, 3, 3).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: losses.attention(x.softmax(-1), weights), (x,))


def test_hidden() -> None:
    s, t = logits(0), logits(1)
    wanted = np.sum((s.numpy() - t.numpy()) ** 2) / np.sum(t.numpy() ** 2)
    assert float(losses.hidden(s, t)) == pytest.approx(wanted, rel=1e-12)
    assert float(losses.hidden(t, t)) == 0
    assert float(losses.hidden(torch.zeros_like(t), t)) == pytest.approx(1)
    with pytest.raises(JoulesmithError, match="of 9 and 8 channels do not match"):
        losses.hidden(s, t[..., :8])


def test_attention() -> None:
    mask = torch.ones(4, 4).tril() == 0
    s, t = (logits(i, 2, 3, 4, 4).masked_fill(mask, -torch.inf).softmax(-1) for i in range(2))
    total = 0.0
    for a, b in zip(t.flatten(0, 2).tolist(), s.flatten(0, 2).tolist(), strict=True):
        total += math.fsum(u * math.log(u / v) for u, v in zip(a, b, strict=True) if u)
    assert float(losses.attention(s, t)) == pytest.approx(total / 24, rel=1e-9)
    fewer = losses.attention(s[:, :2], t)
    merged = losses.attention(s[:, :2].mean(1, keepdim=True), t.mean(1, keepdim=True))
    assert float(fewer) == pytest.approx(float(merged), rel=1e-12)
    with pytest.raises(JoulesmithError, match="different lengths"):
        losses.attention(s[..., :3], t)


def test_numbers_out_of_range() -> None:
    s = logits(0)
    for bad in (0.0, -1.0, math.inf, math.nan):
        for f in (losses.soft, losses.reverse):
            with pytest.raises(JoulesmithError, match="a temperature of"):
                f(s, s, bad)
        with pytest.raises(JoulesmithError, match="a temperature of"):
            losses.soft_top(s, *losses.top_of(s, 2), temperature=bad)
    for k in (0, VOCAB + 1):
        with pytest.raises(JoulesmithError, match=f"a cache of {k} of 9"):
            losses.top_of(s, k)
