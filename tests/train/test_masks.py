"""How many weights live and which, against formulas and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.compress.prune.patterns import Pattern
from joulesmith.errors import JoulesmithError
from joulesmith.train import masks

SHAPES = st.lists(st.tuples(st.integers(2, 40), st.integers(2, 40)), min_size=1, max_size=6).map(
    lambda xs: {f"l{i}": x for i, x in enumerate(xs)}
)


@given(SHAPES, st.floats(0.05, 0.6))
def test_counts_sum_to_what_is_wanted(shapes: dict[str, tuple[int, int]], sparsity: float) -> None:
    size = sum(a * b for a, b in shapes.values())
    for found in (masks.erk(shapes, sparsity), masks.uniform(shapes, sparsity)):
        assert sum(found.values()) == round((1 - sparsity) * size)
        assert all(1 <= found[n] <= a * b for n, (a, b) in shapes.items())


@given(SHAPES, st.floats(0.05, 0.95))
def test_erk_shares_go_with_the_sum_over_the_product(
    shapes: dict[str, tuple[int, int]], sparsity: float
) -> None:
    if round((1 - sparsity) * sum(a * b for a, b in shapes.values())) < len(shapes):
        with pytest.raises(JoulesmithError, match="leaves"):
            masks.erk(shapes, sparsity)
        return
    found = masks.erk(shapes, sparsity)
    # Independently: the one e that makes sum min(size, e (a + b)) the total, by bisection.
    low, high = 0.0, 1e4
    for _ in range(200):
        e = (low + high) / 2
        live = sum(min(a * b, e * (a + b)) for a, b in shapes.values())
        low, high = (e, high) if live < masks.total(shapes, sparsity) else (low, e)
    lifted = sum(max(0.0, 1 - e * (a + b)) for a, b in shapes.values())
    for n, (a, b) in shapes.items():
        assert abs(found[n] - min(a * b, e * (a + b))) <= 1 + 1e-6 + lifted


def test_erk_of_the_paper() -> None:
    # LeNet-300-100 of Mocanu et al. (2018) and Evci et al. (2020): the small last layer is dense.
    shapes = {"a": (300, 784), "b": (100, 300), "c": (10, 100)}
    found = masks.erk(shapes, 0.9)
    assert found["c"] == 1000 and sum(found.values()) == 26620
    assert math.isclose(found["a"] / found["b"], 1084 / 400, rel_tol=1e-4)


def test_cubic_schedule_is_equation_1() -> None:
    final, begin, every, times = 0.8, 10, 5, 12
    for t in range(begin, begin + every * times + 1, every):
        paper = final + (0.0 - final) * (1 - (t - begin) / (times * every)) ** 3
        assert math.isclose(final * masks.cubic(t, begin, begin + every * times), paper)
    assert masks.cubic(3, 10, 70) == 0 and masks.cubic(99, 10, 70) == 1


def test_cosine_falls_from_the_first_to_nothing() -> None:
    assert masks.cosine(0, 100, 0.3) == 0.3
    assert math.isclose(masks.cosine(50, 100, 0.3), 0.15)
    assert math.isclose(masks.cosine(100, 100, 0.3), 0, abs_tol=1e-15)


@given(st.integers(0, 10_000), st.floats(0.01, 0.99), st.sampled_from([0, 4]))
def test_rigl_by_brute_force(seed: int, share: float, of: int) -> None:
    g = torch.Generator().manual_seed(seed)
    pattern = Pattern(2, 4) if of else Pattern()
    weight, grad = torch.randn(5, 8, generator=g), torch.randn(5, 8, generator=g)
    mask = pattern.mask(torch.rand(5, 8, generator=g), 17)
    weight[~mask] = 0
    dropped = masks.smallest(weight, mask, share)
    found = masks.exchanged(mask, dropped, grad.abs(), pattern)

    places = [(r, c) for r in range(5) for c in range(8)]
    live = [p for p in places if mask[p]]
    go = sorted(live, key=lambda p: abs(float(weight[p])))[: int(share * len(live))]
    assert {p for p in places if dropped[p]} == set(go)
    want = set(live) - set(go)
    others = sorted((p for p in places if p not in want), key=lambda p: -abs(float(grad[p])))
    for p in others:
        if of:
            group = {q for q in want if q[0] == p[0] and q[1] // 4 == p[1] // 4}
            if len(group) < 2:
                want.add(p)
        elif len(want) < len(live):
            want.add(p)
    assert {p for p in places if found[p]} == want
    assert int(found.sum()) == len(live)


@given(st.integers(0, 10_000), st.floats(0.01, 0.99))
def test_set_drops_a_share_of_each_sign(seed: int, share: float) -> None:
    g = torch.Generator().manual_seed(seed)
    weight, mask = torch.randn(6, 7, generator=g), torch.rand(6, 7, generator=g) < 0.5
    dropped = masks.smallest_by_sign(weight, mask, share)
    for one in (mask & (weight > 0), mask & (weight < 0)):
        assert int((dropped & one).sum()) == int(share * int(one.sum()))
        if (dropped & one).any() and (one & ~dropped).any():
            assert weight[dropped & one].abs().max() < weight[one & ~dropped].abs().min()
    assert not (dropped & ~mask).any()


@given(st.integers(0, 10_000), st.integers(0, 20), st.integers(0, 20))
def test_thinning_keeps_the_largest_live_ones(seed: int, live: int, fewer: int) -> None:
    g = torch.Generator().manual_seed(seed)
    score = torch.randn(4, 5, generator=g)  # movement scores may be negative
    mask = Pattern().mask(torch.rand(4, 5, generator=g), max(live, fewer))
    found = masks.thinned(score, mask, Pattern(), min(live, fewer))
    assert not (found & ~mask).any() and int(found.sum()) == min(live, fewer)
    if found.any() and (mask & ~found).any():
        assert score[found].min() > score[mask & ~found].max()


@given(st.sampled_from([(1, 4), (2, 4), (4, 8), (1, 16)]), st.floats(0, 1))
def test_groups_thin_out_to_the_pattern(nm: tuple[int, int], share: float) -> None:
    keep, of = nm
    found = masks.at_share(Pattern(keep, of), share)
    assert found.of == of and keep <= found.keep <= of
    assert (of - found.keep) <= (of - keep) * share + 1e-6 < of - found.keep + 1 + 1e-6
    assert masks.at_share(Pattern(keep, of), 1.0) == Pattern(keep, of)


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_bits(flags: list[bool]) -> None:
    mask = torch.tensor(flags)
    bits = masks.pack(mask)
    assert bits.dtype == torch.uint8 and len(bits) == math.ceil(len(flags) / 8)
    assert torch.equal(masks.unpack(bits, mask.shape), mask)
    assert [bool(bits[i // 8] >> i % 8 & 1) for i in range(len(flags))] == flags
