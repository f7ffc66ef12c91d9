"""Kept quality and its bound against closed forms and simulation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from joulesmith import quality as q
from joulesmith.engines.base import Scores
from joulesmith.errors import JoulesmithError


class Fixed:
    """A session whose logits are a fixed table of the last token."""

    def __init__(self, vocab: int = 11, seed: int = 0) -> None:
        self.table = np.random.default_rng(seed).normal(size=(vocab, vocab)).astype(np.float32)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return self.table[tokens]


def windows(n: int = 6, length: int = 9, vocab: int = 11) -> np.ndarray:
    return np.random.default_rng(1).integers(0, vocab, (n, length)).astype(np.int32)


def scores_of(session: Fixed, reference: q.Reference) -> Scores:
    logp = q.log_softmax(session.logits(reference.windows[:, :-1]))
    ref = np.load(reference.path).astype(np.float32)
    rows, cols = np.indices(reference.nll.shape)
    return Scores(
        nll=-logp[rows, cols, reference.windows[:, 1:]],
        kl=(np.exp(ref) * (ref - logp)).sum(-1),
        agree=logp.argmax(-1) == ref.argmax(-1),
    )


def test_reference_judges_itself_as_perfect(tmp_path: Path) -> None:
    s = Fixed()
    reference = q.write_reference(s, windows(), tmp_path / "r.npy", "t")  # type: ignore[arg-type]
    found = q.judge(scores_of(s, reference), reference)
    assert found.kept == pytest.approx(1, abs=1e-6)
    assert found.kept_low == pytest.approx(1, abs=1e-6)
    assert abs(found.kl) < 2e-4, "float16 log-probabilities cost more than they should"
    assert found.top1 == 1
    assert found.tokens == 48


def test_kl_and_perplexity_equal_a_float64_reference(tmp_path: Path) -> None:
    a, b = Fixed(seed=0), Fixed(seed=1)
    w = windows()
    reference = q.write_reference(a, w, tmp_path / "r.npy", "t")  # type: ignore[arg-type]
    found = q.judge(scores_of(b, reference), reference)

    def logp(table: np.ndarray) -> np.ndarray:
        t = table.astype(np.float64)
        return t - np.log(np.exp(t).sum(-1, keepdims=True))

    pa, pb = logp(a.table)[w[:, :-1]], logp(b.table)[w[:, :-1]]
    assert found.kl == pytest.approx((np.exp(pa) * (pa - pb)).sum(-1).mean(), rel=2e-3)
    rows, cols = np.indices(w[:, 1:].shape)
    ppl_a = math.exp(-pa[rows, cols, w[:, 1:]].mean())
    ppl_b = math.exp(-pb[rows, cols, w[:, 1:]].mean())
    assert found.perplexity == pytest.approx(ppl_b, rel=1e-5)
    assert found.kept == pytest.approx(ppl_a / ppl_b, rel=1e-5)


def test_bound_covers_the_truth_about_as_often_as_it_says() -> None:
    """Correlated windows, known mean loss: the one-sided 95 % bound holds in about 95 %."""
    rng = np.random.default_rng(0)
    truth, held, trials = 0.01, 0, 800
    for _ in range(trials):
        common = rng.normal(0, 0.02, (32, 1))
        diff = truth + common + rng.normal(0, 0.1, (32, 50))
        zero = np.zeros_like(diff, np.float32)
        reference = q.Reference(np.zeros((32, 51), np.int32), zero, Path("x"), "t")
        scores = Scores(diff.astype(np.float32), zero, zero.astype(bool))
        held += q.judge(scores, reference).kept_low <= math.exp(-truth)
    assert 0.92 < held / trials < 0.98


def test_one_window_has_no_bound() -> None:
    zero = np.zeros((1, 4), np.float32)
    reference = q.Reference(np.zeros((1, 5), np.int32), zero, Path("x"), "t")
    found = q.judge(Scores(zero, zero, zero.astype(bool)), reference)
    assert found.kept_low == 0 and not found.passes(0.5)


def test_finished_reference_is_read_back(tmp_path: Path) -> None:
    w = windows()
    first = q.write_reference(Fixed(), w, tmp_path / "r.npy", "t")  # type: ignore[arg-type]
    again = q.write_reference(None, w, tmp_path / "r.npy", "t")  # type: ignore[arg-type]
    assert np.array_equal(first.nll, again.nll)
    with pytest.raises(AttributeError):  # other windows: it has to run
        q.write_reference(None, w[:2], tmp_path / "r.npy", "t")  # type: ignore[arg-type]


def test_interrupted_reference_leaves_nothing(tmp_path: Path) -> None:
    class Dies(Fixed):
        calls = 0

        def logits(self, tokens: np.ndarray) -> np.ndarray:
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().logits(tokens)

    with pytest.raises(KeyboardInterrupt):
        q.write_reference(Dies(), windows(), tmp_path / "r.npy", "t")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(JoulesmithError, match="not enough disk space"):
        q.write_reference(Fixed(), windows(), tmp_path / "r.npy", "t")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_damaged_models_are_named(tmp_path: Path) -> None:
    s = Fixed()
    s.table[3] = np.nan
    with pytest.raises(JoulesmithError, match="not finite"):
        q.write_reference(s, windows(), tmp_path / "r.npy", "t")  # type: ignore[arg-type]
    zero = np.zeros((2, 4), np.float32)
    reference = q.Reference(np.zeros((2, 5), np.int32), zero, Path("x"), "t")
    with pytest.raises(JoulesmithError, match="not finite"):
        q.judge(Scores(zero + np.inf, zero, zero.astype(bool)), reference)


@pytest.mark.parametrize("keep", [0, -1, 1.01, float("nan"), float("inf")])
def test_floor_outside_its_range(keep: float) -> None:
    with pytest.raises(JoulesmithError, match="--keep"):
        q.check_floor(keep)
