"""Positions alone: each coding gives back every mask, in the size it promises, or refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from joulesmith.compress.sparse import bits, layouts
from joulesmith.compress.sparse.gaps import Gaps
from joulesmith.compress.sparse.nm import NM
from joulesmith.compress.sparse.tensor import information_bytes
from joulesmith.errors import JoulesmithError

NAMES = ("dense", "bitmask", "gaps", "2:4", "1:4", "4:8", "8:16", "blocks-4x4", "blocks-16x1")
masks = hnp.arrays(np.bool_, st.tuples(st.integers(0, 40), st.sampled_from([16, 48, 80])))


@given(st.lists(st.integers(0, (1 << 62) - 1), max_size=40), st.integers(0, 62))
def test_numbers_of_any_width_round_trip(values: list[int], width: int) -> None:
    given = np.array([v & ((1 << width) - 1) for v in values], np.int64)
    raw = bits.pack_bits(given, width)
    assert len(raw) == bits.packed_size(len(given), width)
    assert np.array_equal(bits.unpack_bits(raw, width, len(given)), given)


def test_numbers_are_little_end_first() -> None:
    assert bits.pack_bits(np.array([1, 2, 7]), 3).tolist() == [0b11_010_001, 0b1]
    with pytest.raises(JoulesmithError, match="behind"):
        bits.unpack_bits(np.array([0b11_010_001, 0b11], np.uint8), 3, 3)
    with pytest.raises(JoulesmithError, match="3 bytes"):
        bits.unpack_bits(np.zeros(3, np.uint8), 3, 3)


def thinned(mask: np.ndarray, name: str) -> np.ndarray:
    """The mask with no group of N:M too full."""
    form = layouts.layout(name)
    if not isinstance(form, NM):
        return mask
    groups = mask.reshape(-1, form.m)
    return (groups & (np.cumsum(groups, 1) <= form.n)).reshape(mask.shape)


@settings(max_examples=25)
@given(masks)
@pytest.mark.parametrize("name", NAMES)
def test_masks_round_trip(name: str, mask: np.ndarray) -> None:
    form, mask = layouts.layout(name), thinned(mask, name)
    before = mask.copy()
    kept = form.keep(mask)
    assert kept.shape == mask.shape and not (mask & ~kept).any()
    assert not form.exact or np.array_equal(kept, mask)
    raw = form.encode(kept)
    assert np.array_equal(form.decode(raw, *mask.shape), kept)
    assert np.array_equal(mask, before)


@settings(max_examples=60)
@given(st.binary(max_size=40), st.integers(0, 20), st.sampled_from([16, 48]))
@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_are_a_mask_or_one_line(name: str, raw: bytes, rows: int, columns: int) -> None:
    form = layouts.layout(name)
    given = np.frombuffer(raw, np.uint8)
    try:
        kept = form.decode(given, rows, columns)
    except JoulesmithError as e:
        assert "\n" not in str(e)
        return
    assert kept.shape == (rows, columns)
    assert np.array_equal(form.decode(form.encode(kept), rows, columns), kept)


def test_a_bitmask_by_hand() -> None:
    mask = np.array([[1, 0, 0, 1, 0, 0, 0, 0, 1]], np.bool_)
    assert layouts.layout("bitmask").encode(mask).tolist() == [0b1001, 1]


def test_gaps_by_hand() -> None:
    """Runs 3, 0, 11, k = 2: low bits 3, 0, 3; unary 0 -> 1, 0 -> 1, 2 -> 001."""
    mask = np.zeros((1, 17), np.bool_)
    mask[0, [3, 4, 16]] = True
    raw = Gaps().encode(mask)
    k = int(raw[0])
    assert raw[1:5].tolist() == [3, 0, 0, 0]
    if k == 2:
        assert raw[5:].tolist() == [0b11_00_11, 0b10011]
    assert np.array_equal(Gaps().decode(raw, 1, 17), mask)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.25, 0.3, 0.382, 0.45, 0.5, 0.62, 0.75, 0.9])
def test_gaps_are_within_five_percent_of_the_entropy(share: float) -> None:
    """Of the positions alone, log2 C(n, k) bits, at every share; a bitmask is not."""
    mask = np.random.default_rng(0).random((256, 1024)) < share
    found, least = len(Gaps().encode(mask)), information_bytes(mask.size, int(mask.sum()), 0)
    assert least <= found <= 1.05 * least


@pytest.mark.parametrize(("n", "m"), [*layouts.GROUPED, (2, 16), (3, 5), (1, 2)])
def test_groups_are_within_two_percent_of_all_patterns(n: int, m: int) -> None:
    columns = m * 60
    rank = np.random.default_rng(0).random((200, 60, m)).argsort(-1)
    mask = (rank < n).reshape(200, columns)
    found = len(NM(n, m).encode(mask))
    least = 200 * 60 * math.log2(math.comb(m, n)) / 8
    assert least <= found <= 1.02 * least + 8


def test_information_is_a_count() -> None:
    assert information_bytes(4, 2, 0) * 8 == pytest.approx(math.log2(6))
    assert information_bytes(10, 3, 4) * 8 == pytest.approx(math.log2(120) + 12)


@pytest.mark.parametrize("name", ["", "5:4", "0:4", "2:32", "blocks-3x4", "csr", "2:4 "])
def test_unknown_layouts_are_refused(name: str) -> None:
    with pytest.raises(JoulesmithError):
        layouts.layout(name)


def test_groups_too_full_are_refused() -> None:
    mask = np.zeros((2, 8), np.bool_)
    mask[1, 4:7] = True
    with pytest.raises(JoulesmithError, match="2:4"):
        NM(2, 4).keep(mask)
    with pytest.raises(JoulesmithError, match="2:4"):
        NM(2, 4).keep(np.zeros((2, 6), np.bool_))
    with pytest.raises(JoulesmithError, match="not 2 of 4"):
        NM(2, 4).encode(mask)


def test_the_smallest_layout_is_chosen() -> None:
    rng = np.random.default_rng(0)
    free = rng.random((128, 512))
    assert layouts.choose(free >= 0.5, 16) == "bitmask"
    assert layouts.choose(free >= 0.9, 16) == "gaps"
    assert layouts.choose(free >= 0.0, 16) == "dense"
    half = (rng.random((128, 128, 4)).argsort(-1) < 2).reshape(128, 512)
    assert layouts.choose(half, 16) == "2:4"
    square = (rng.random((8, 32)) < 0.3).repeat(16, 0).repeat(16, 1)
    assert layouts.choose(square, 16) == "blocks-16x16"
    assert layouts.choose(np.zeros((0, 8), np.bool_), 16) == "dense"
