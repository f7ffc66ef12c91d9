"""Data-efficient training: against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from joulesmith.errors import JoulesmithError
from joulesmith.train import data

WINDOWS = arrays(
    np.int32, st.tuples(st.integers(1, 6), st.integers(4, 9)), elements=st.integers(0, 2)
)


@given(WINDOWS, st.integers(1, 4), st.none() | WINDOWS)
def test_repeats_by_brute_force(
    windows: NDArray[np.int32], size: int, known: NDArray[np.int32] | None
) -> None:
    seen: set[tuple[int, ...]] = set()

    def runs(row: NDArray[np.int32]) -> list[tuple[int, ...]]:
        return [tuple(row[i : i + size]) for i in range(len(row) - size + 1)]

    for row in () if known is None else known:
        seen |= set(runs(row))
    expected = []
    for row in windows:
        expected.append(sum(r in seen for r in runs(row)) / len(runs(row)))
        seen |= set(runs(row))
    assert data.repeats(windows, size, known).tolist() == pytest.approx(expected)


def test_a_copied_window_goes() -> None:
    w = np.random.default_rng(0).integers(0, 50_000, (5, 64)).astype(np.int32)
    w[3] = w[1]
    w[4, :40] = w[0, :40]
    assert data.without_repeats(w).tolist() == [0, 1, 2]
    assert data.without_repeats(w, most=0.6).tolist() == [0, 1, 2, 4]
    assert data.without_repeats(w, known=w[2:3]).tolist() == [0, 1]
    for bad in (-0.1, 1.1):
        with pytest.raises(JoulesmithError):
            data.without_repeats(w, most=bad)
    with pytest.raises(JoulesmithError):
        data.grams(w, 65)


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=30), st.floats(0.01, 1))
def test_parts_by_score(scores: list[float], share: float) -> None:
    s = np.array(scores)
    count = max(1, round(share * len(s)))
    for keep in ("low", "middle", "high"):
        found = data.by_score(s, share, keep)  # type: ignore[arg-type]
        assert len(found) == count and (np.diff(found) > 0).all()
    rest = np.setdiff1d(np.arange(len(s)), data.by_score(s, share, "high"))
    if len(rest):
        assert s[rest].max() <= s[data.by_score(s, share, "high")].min()
    middle = data.by_score(s, share)
    below = (s < s[middle].min()).sum()
    above = (s > s[middle].max()).sum()
    assert max(below, above) <= (len(s) - count + 1) // 2


def test_what_is_judged_on_is_found_wherever_it_is_cut() -> None:
    text = np.random.default_rng(0).integers(0, 9, 6400).astype(np.int32)
    windows = text[:6144].reshape(-1, 256)
    judged = text[1000 : 1000 + 5 * 128].reshape(-1, 128)  # cut elsewhere
    share = data.overlap(windows, judged)
    assert np.flatnonzero(share).tolist() == [4, 5, 6]
    assert data.overlap(windows[:, :8], judged[:, :8]).shape == (24,)


def test_scores_that_say_nothing() -> None:
    with pytest.raises(JoulesmithError, match="not finite"):
        data.by_score(np.array([1.0, np.nan]), 0.5)
    for share in (0.0, 1.1):
        with pytest.raises(JoulesmithError, match="share"):
            data.by_score(np.array([1.0]), share)
    with pytest.raises(JoulesmithError, match="same windows"):
        data.learnable(np.zeros(2), np.zeros(3))
    assert data.learnable(np.array([3.0]), np.array([1.0])) == [2.0]


def test_windows_grow() -> None:
    lengths = [data.length_at(x / 100, 256, 32, 0.5) for x in range(101)]
    assert lengths[0] == 32 and lengths[50:] == [256] * 51
    assert sorted(lengths) == lengths and all(256 % n == 0 for n in lengths)
    assert data.length_at(0.0, 256, 256, 0.5) == 256
    for bad in (0, 1, 3, 512):
        with pytest.raises(JoulesmithError, match="divisor of 256"):
            data.length_at(0.1, 256, bad, 0.5)
    w = np.arange(24, dtype=np.int32).reshape(2, 12)
    assert data.cut(w, 4).tolist() == np.arange(24).reshape(6, 4).tolist()


@given(st.lists(arrays(np.int32, st.integers(0, 20), elements=st.integers(1, 9)), max_size=8))
def test_packing_keeps_every_token(documents: list[NDArray[np.int32]]) -> None:
    found = data.packed(documents, 8, 0)
    tokens = np.sort(np.concatenate([np.zeros(0, np.int32), *documents]))
    assert np.sort(found[found != 0]).tolist() == tokens.tolist()
    total = sum(len(d) + 1 for d in documents)
    assert len(found) * 8 >= total and len(found) <= 2 * -(-total // 8) + 1
    for d in documents:
        if 0 < len(d) < 8:
            text = np.array([*d, 0])
            assert any(
                (row[i : i + len(text)] == text).all()
                for row in found for i in range(8 - len(text) + 1)
            ), "short documents are whole"  # fmt: skip


def test_packing_refuses() -> None:
    with pytest.raises(JoulesmithError):
        data.packed([], 1, 0)
