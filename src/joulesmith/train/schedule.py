"""The learning rate, and which windows a step sees: functions of the step alone, so that a training
that is resumed goes on as if nothing had been."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from joulesmith.train.settings import TrainSettings


def rate(settings: TrainSettings, done: float) -> float:
    """Learning rate after a share ``done`` of the training, 0 to 1."""
    s = settings
    if done < s.warmup:
        return s.rate * done / s.warmup
    if s.schedule == "constant":
        return s.rate
    x = (done - s.warmup) / max(1e-12, 1 - s.warmup)
    fall = (1 + math.cos(math.pi * x)) / 2 if s.schedule == "cosine" else 1 - x
    return s.rate * (s.final + (1 - s.final) * fall)


def windows_of(step: int, batch: int, count: int, seed: int) -> NDArray[np.int64]:
    """The places of a step's windows, (batch,): each epoch is a permutation of its own, and a batch
    may reach over its end."""
    at = np.arange(step * batch, (step + 1) * batch)
    found = np.empty(batch, np.int64)
    for epoch in np.unique(at // count):
        order = np.random.default_rng((seed, int(epoch))).permutation(count)
        mine = at // count == epoch
        found[mine] = order[at[mine] % count]
    return found
