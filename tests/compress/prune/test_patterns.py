"""Masks: exact counts, ties, NaN, and what does not divide."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.compress.prune.patterns import Pattern, parse_pattern
from joulesmith.errors import JoulesmithError

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 6))


@st.composite
def scores(draw: st.DrawFn) -> torch.Tensor:
    """Rows and columns that 2 and 4 divide; many ties, NaN and infinity among them."""
    rows, columns = (4 * n for n in draw(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 20)))
    found = torch.from_numpy(rng.integers(-2, 3, (rows, columns)).astype(np.float32))
    for odd in (math.nan, math.inf):
        found[torch.from_numpy(rng.random((rows, columns)) < draw(st.sampled_from([0, 0.2])))] = odd
    return found


def least(score: torch.Tensor) -> torch.Tensor:
    return torch.where(score.isnan(), torch.tensor(-math.inf), score)


@given(scores(), st.floats(0, 1))
def test_any_place(score: torch.Tensor, share: float) -> None:
    kept = round(share * score.numel())
    mask = Pattern().mask(score, kept)
    assert mask.shape == score.shape and int(mask.sum()) == kept
    # the first ones of those that are equal: a stable sort
    order = np.argsort(-least(score).flatten().numpy(), kind="stable")
    assert set(mask.flatten().nonzero().flatten().tolist()) == set(order[:kept].tolist())


@given(scores(), st.floats(0, 1))
def test_by_row(score: torch.Tensor, share: float) -> None:
    kept = round(share * score.numel())
    mask = Pattern(by_row=True).mask(score, kept)
    counts = mask.sum(1)
    assert int(counts.sum()) == kept and int(counts.max() - counts.min()) <= 1
    for row, stays, n in zip(least(score), mask, counts, strict=True):
        order = np.argsort(-row.numpy(), kind="stable")
        assert set(stays.nonzero().flatten().tolist()) == set(order[: int(n)].tolist())


@given(scores(), st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4)]))
def test_n_of_m(score: torch.Tensor, nm: tuple[int, int]) -> None:
    keep, of = nm
    mask = Pattern(keep, of).mask(score, 0)
    groups, stays = least(score).view(-1, of), mask.view(-1, of)
    assert bool((stays.sum(1) == keep).all())
    for group, chosen in zip(groups, stays, strict=True):
        order = np.argsort(-group.numpy(), kind="stable")
        assert set(chosen.nonzero().flatten().tolist()) == set(order[:keep].tolist())


@given(scores(), st.sampled_from([(4, 4), (2, 4), (1, 2), (4, 1)]), st.floats(0, 1))
def test_tiles(score: torch.Tensor, tile: tuple[int, int], share: float) -> None:
    a, b = tile
    mask = Pattern(tile=tile).mask(score, round(share * score.numel()))
    rows, columns = score.shape
    tiles = mask.view(rows // a, a, columns // b, b)
    whole = tiles.all(3).all(1)
    assert torch.equal(whole, tiles.any(3).any(1))
    assert int(whole.sum()) == round(round(share * score.numel()) / (a * b))
    if bool(torch.isfinite(score).all()):
        sums = score.reshape(tiles.shape).sum((1, 3))
        if bool(whole.any()) and not bool(whole.all()):
            assert float(sums[whole].min()) >= float(sums[~whole].max())


def test_a_tile_with_nan_goes_first() -> None:
    score = torch.ones(4, 8)
    score[0, 0], score[1, 1] = math.nan, math.inf
    assert not Pattern(tile=(4, 4)).mask(score, 16)[:, :4].any()


def test_names_are_read_back() -> None:
    for text in ("unstructured", "row", "2:4", "1:16", "block:4x8"):
        assert parse_pattern(text).name == text
    assert parse_pattern("2:4").sparsity == 0.5 and parse_pattern("row").sparsity is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4:2",
        "4:4",
        "0:4",
        "-1:4",
        "2:4:8",
        "block:0x4",
        "block:1x1",
        "block:4",
        "ROW",
        "2:99999",
    ],
)
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(JoulesmithError, match="unknown pattern") as e:
        parse_pattern(text)
    assert "\n" not in str(e.value)


def test_shapes_that_do_not_divide() -> None:
    with pytest.raises(JoulesmithError, match="q has rows of 64 weights, which groups of 3"):
        parse_pattern("2:3").check("q", (8, 64))
    with pytest.raises(JoulesmithError, match="q is 10 x 64, which tiles of 4 x 4"):
        parse_pattern("block:4x4").check("q", (10, 64))
    parse_pattern("block:4x16").check("q", (8, 64))
