"""Heads that stay form groups of one size; neurons by plain scores; layers in order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.compress.prune import drop, heads, neurons
from joulesmith.compress.prune.columns import damp
from joulesmith.compress.prune.heads import Layout
from joulesmith.errors import JoulesmithError


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.data())
def test_groups_stay_valid(kv: int, queries: int, dim: int, data: st.DataObject) -> None:
    layout = Layout(kv, queries, dim)
    k, q = data.draw(st.integers(1, kv)), data.draw(st.integers(1, queries))
    n = layout.heads * dim
    g = torch.Generator().manual_seed(kv + 10 * queries)
    x, o = torch.randn(40, n, generator=g), torch.randn(5, n, generator=g)
    for found in (
        heads.by_damage(o, damp(x.T @ x / 40), layout, k, q),
        heads.by_columns(o.norm(dim=0), layout, k, q),
    ):
        groups = (found.query // queries).tolist()
        assert groups == [g for g in found.kv.tolist() for _ in range(q)]
        assert len(found.kv) == k and len(set(found.query.tolist())) == k * q
        assert len(found.gone) == len(found.costs) == (kv - k) + k * (queries - q)


@pytest.mark.parametrize("rule", ["damage", "columns"])
def test_heads_that_write_nothing_go(rule: str) -> None:
    layout = Layout(3, 2, 4)
    o = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    o[:, 8:16] = 0  # key-value head 1
    o[:, 4:8] = 0  # head 1
    o[:, 16:20] = 0  # head 4
    x = torch.randn(99, 24, generator=torch.Generator().manual_seed(1))
    if rule == "damage":
        found = heads.by_damage(o, damp(x.T @ x / 99), layout, 2, 1)
    else:
        found = heads.by_columns(o.norm(dim=0), layout, 2, 1)
    assert found.gone == ("kv 1", "head 1", "head 4") or found.gone == ("kv 1", "head 4", "head 1")
    assert found.query.tolist() == [0, 5]
    assert float(found.costs.sum()) == pytest.approx(0, abs=1e-9)


def test_shares_of_heads() -> None:
    assert heads.of_share(Layout(4, 2, 8), 0.75) == (3, 2)
    assert heads.of_share(Layout(3, 3, 8), 2 / 3) == (2, 3)
    assert heads.of_share(Layout(1, 8, 8), 0.5) == (1, 4)
    with pytest.raises(JoulesmithError, match=r"0\.6667"):
        heads.of_share(Layout(3, 3, 8), 0.75)
    with pytest.raises(JoulesmithError, match="cannot be kept"):
        heads.check_counts(Layout(3, 3, 8), 4, 1)


def test_plain_scores_of_neurons() -> None:
    gate, up = torch.tensor([[3.0], [0.0], [1.0]]), torch.zeros(3, 1)
    down = torch.tensor([[4.0, 2.0, 0.0]])
    assert neurons.magnitude(gate, up, down).tolist() == [5.0, 2.0, 1.0]
    found = neurons.by_score(torch.tensor([5.0, 2.0, 1.0, 2.0]), 2)
    assert found.kept.tolist() == [0, 1] and found.gone.tolist() == [2, 3]
    # the sum over a column of w g, token by token, is x (g W)
    x, g, w = torch.randn(7, 3).double(), torch.randn(7, 2).double(), torch.randn(2, 3).double()
    each = torch.stack([(w * torch.outer(g[t], x[t])).sum(dim=0) for t in range(7)])
    assert torch.allclose(neurons.taylor(x, g, w), each.square().sum(dim=0).sqrt())
    with pytest.raises(JoulesmithError):
        neurons.by_score(torch.tensor([1.0, float("nan")]), 1)
    with pytest.raises(JoulesmithError):
        neurons.by_score(torch.tensor([1.0]), 2)


def test_block_influence() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert drop.block_influence(x, 3 * x) == pytest.approx(0)
    assert drop.block_influence(x, x.flip(0)) == pytest.approx(1)
    assert drop.block_influence(x, torch.tensor([[1.0, 1.0], [0.0, 1.0]])) == pytest.approx(
        1 - (0.5**0.5 + 1) / 2
    )
    with pytest.raises(JoulesmithError, match="direction"):
        drop.block_influence(x, 0 * x)


@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=9, unique=True), st.data())
def test_greedy_drops(costs: list[float], data: st.DataObject) -> None:
    """Where damages add up, the cheapest go, and few are measured twice."""
    count = data.draw(st.integers(0, len(costs) - 1))
    asked = []

    def damages(gone: frozenset[int], tried: list[int]) -> list[float]:
        asked.extend(tried)
        assert list(tried) == sorted(tried)
        return [sum(costs[i] for i in {*gone, t}) for t in tried]

    found = drop.by_damage(len(costs), count, damages)
    assert list(found.order) == sorted(range(len(costs)), key=lambda i: costs[i])[:count]
    assert len(asked) <= len(costs) + 6 * count
    assert drop.by_score(costs, count).order == found.order


def test_not_all_layers_can_go() -> None:
    with pytest.raises(JoulesmithError, match="one must be left"):
        drop.by_score([1.0, 2.0], 2)


def test_a_rounded_share_is_understood() -> None:
    assert heads.of_share(Layout(3, 3, 8), 0.67) == (2, 3)
