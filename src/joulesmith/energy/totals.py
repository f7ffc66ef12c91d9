"""What a training has cost so far: joules per step, token, sample and parameter.

Adds up the readings of windows; knows no meters, no clocks and no files. What is not
known of one window is unknown in the sum, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from joulesmith.energy.reading import Pedigree, Reading, worst

POINT_COLUMNS = (
    "time",
    "step",
    "tokens",
    "samples",
    "seconds",
    "joules",
    "low",
    "high",
    "marginal",
    "pedigree",
    "spent",
    "window_steps",
    "window_seconds",
    "window_joules",
    "peak_memory_bytes",
    "device_memory_bytes",
    "joules_per_step",
    "joules_per_token",
    "joules_per_sample",
    "loss",
    "metrics",
    "notes",
)
"""A point of the curve: figures are cumulative over the training, save those named after
the window, those per step, token or sample, and the window's peaks of memory."""
_STATE_VERSION = 1
_MAX_NOTES = 100


class Totals:
    """Sums over the windows of a training. parameters: how many its model has.

    steps, seconds: of the closed windows of training; notes: what is to be said of them.
    """

    def __init__(self, parameters: int | None = None) -> None:
        self.parameters = parameters
        self.notes: list[str] = []
        self.steps = 0
        self.seconds = 0.0
        self._tokens: float | None = 0.0
        self._samples: float | None = 0.0
        self._joules = self._low = self._high = 0.0
        self._marginal: float | None = 0.0
        self._aside = 0.0
        self._windows = self._unknown = 0
        self._pedigree: Pedigree | None = None

    def add(
        self, reading: Reading, steps: int, tokens: float | None, samples: float | None
    ) -> None:
        """One window of training with so many steps, and their tokens and samples."""
        self.steps += steps
        self.seconds += reading.seconds
        if steps:
            self._tokens = plus(self._tokens, tokens)
            self._samples = plus(self._samples, samples)
        self._windows += 1
        if reading.joules is None:
            self._unknown += 1
        else:
            self._joules += reading.joules
            self._low += reading.joules if reading.low is None else reading.low
            self._high += reading.joules if reading.high is None else reading.high
            self._pedigree = worst((self._pedigree, reading.pedigree))
        self._marginal = plus(self._marginal, reading.marginal)

    def add_aside(self, reading: Reading) -> None:
        """One window of something else, such as evaluation."""
        if reading.joules is not None:
            self._aside += reading.joules

    def note(self, text: str) -> None:
        """Adds to `notes`, once."""
        if text not in self.notes and len(self.notes) < _MAX_NOTES:
            self.notes.append(text)

    # ---- figures

    @property
    def joules(self) -> float | None:
        """Of training, closed windows only; None where any window's energy is unknown."""
        return self._joules if self._windows and not self._unknown else None

    @property
    def low(self) -> float | None:
        """Lower end of the interval of `joules`: the windows' ends add up (one model)."""
        return self._low if self.joules is not None else None

    @property
    def high(self) -> float | None:
        """Upper end of the interval of `joules`."""
        return self._high if self.joules is not None else None

    @property
    def pedigree(self) -> Pedigree | None:
        """The least sure of the windows'."""
        return self._pedigree if self.joules is not None else None

    @property
    def aside(self) -> float:
        """Joules of `pause`, as far as known."""
        return self._aside

    @property
    def spent(self) -> float:
        """Joules of training and of `pause` as far as known: the least that was spent."""
        return self._joules + self._aside

    @property
    def tokens(self) -> float | None:
        """Trained on so far; None where a step did not say."""
        return self._tokens if self._windows else None

    @property
    def samples(self) -> float | None:
        """Trained on so far; None where a step did not say."""
        return self._samples if self._windows else None

    @property
    def joules_per_step(self) -> float | None:
        """Mean over the training so far."""
        return per(self.joules, self.steps)

    @property
    def joules_per_token(self) -> float | None:
        """Mean over the training so far."""
        return per(self.joules, self.tokens)

    @property
    def joules_per_sample(self) -> float | None:
        """Mean over the training so far."""
        return per(self.joules, self.samples)

    @property
    def joules_per_parameter(self) -> float | None:
        """All joules of the training so far, over the model's parameters."""
        return per(self.joules, self.parameters)

    # ---- resume

    def totals(self) -> dict[str, Any]:
        """All sums, for JSON."""
        return {
            "version": _STATE_VERSION,
            "steps": self.steps,
            "seconds": self.seconds,
            "tokens": self._tokens,
            "samples": self._samples,
            "joules": self._joules,
            "low": self._low,
            "high": self._high,
            "marginal": self._marginal,
            "aside": self._aside,
            "windows": self._windows,
            "unknown_windows": self._unknown,
            "pedigree": self._pedigree,
        }

    def load_totals(self, state: Mapping[str, Any]) -> None:
        """Goes on from `totals`; raises ValueError where ``state`` is none."""
        try:
            if state["version"] != _STATE_VERSION:
                raise ValueError
            numbers = {k: float(state[k]) for k in ("seconds", "joules", "low", "high", "aside")}
            counts = {k: int(state[k]) for k in ("steps", "windows", "unknown_windows")}
            maybe = {
                k: None if state[k] is None else float(state[k])
                for k in ("tokens", "samples", "marginal")
            }
            every = [*numbers.values(), *counts.values(), *(v for v in maybe.values() if v)]
            if not all(math.isfinite(v) and v >= 0 for v in every):
                raise ValueError
            pedigree = state["pedigree"]
            if pedigree not in (None, "measured", "modelled", "assumed"):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise ValueError("not a state of LoopMeter") from None
        self.steps, self.seconds = counts["steps"], numbers["seconds"]
        self._tokens, self._samples = maybe["tokens"], maybe["samples"]
        self._joules, self._low, self._high = numbers["joules"], numbers["low"], numbers["high"]
        self._marginal, self._aside = maybe["marginal"], numbers["aside"]
        self._windows, self._unknown = counts["windows"], counts["unknown_windows"]
        self._pedigree = pedigree

    # ---- points

    def row(
        self, reading: Reading | None, loss: float | None, metrics: Mapping[str, float | None]
    ) -> dict[str, Any]:
        """A point of the curve, by `POINT_COLUMNS`; reading: of the window that ends here."""
        row: dict[str, Any] = dict.fromkeys(POINT_COLUMNS)
        row |= {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "step": self.steps,
            "tokens": self.tokens,
            "samples": self.samples,
            "seconds": self.seconds,
            "joules": self.joules,
            "low": self.low,
            "high": self.high,
            "marginal": self._marginal if self.joules is not None else None,
            "pedigree": self.pedigree,
            "spent": self.spent if self._windows > self._unknown else None,
            "loss": loss,
            "metrics": dict(metrics),
            "notes": list(reading.notes) if reading is not None else [],
        }
        if reading is not None:
            row["window_seconds"] = reading.seconds
            row["window_joules"] = reading.joules
            row["peak_memory_bytes"] = reading.peak_memory_bytes
            row["device_memory_bytes"] = reading.device_memory_bytes
        return row


def per(joules: float | None, count: float | None) -> float | None:
    """Joules for each; None where either is unknown or there are none."""
    return None if joules is None or not count else joules / count


def plus(a: float | None, b: float | None) -> float | None:
    """The sum; None where either is unknown."""
    return None if a is None or b is None else a + b
