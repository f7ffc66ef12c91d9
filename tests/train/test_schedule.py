"""Rates and windows as functions of the step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.train.schedule import rate, windows_of
from joulesmith.train.settings import TrainSettings


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_rates(kind: str) -> None:
    s = TrainSettings(steps=10, rate=2.0, schedule=kind, warmup=0.2, final=0.1)  # type: ignore[arg-type]
    assert rate(s, 0.0) == 0 and rate(s, 0.1) == 1.0 and rate(s, 0.2) == 2.0
    assert rate(s, 0.6) == pytest.approx(2.0 if kind == "constant" else 1.1)
    assert rate(s, 1.0) == pytest.approx(2.0 if kind == "constant" else 0.2)
    assert rate(TrainSettings(steps=1, warmup=1, rate=1.0), 1.0) == 1.0


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
def test_every_epoch_has_every_window_once(batch: int, count: int, seed: int) -> None:
    steps = 3 * count  # so that epochs end at a step
    seen = np.concatenate([windows_of(i, batch, count, seed) for i in range(steps)])
    epochs = seen.reshape(-1, count)
    assert (np.sort(epochs, axis=1) == np.arange(count)).all()
    assert windows_of(2, batch, count, seed).tolist() == seen[2 * batch : 3 * batch].tolist()
