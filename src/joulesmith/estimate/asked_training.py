"""What a user asks of a training in one go: the estimate, and what more devices would make of it.

Calls `training` and `parallel`; adds no physics. Knows no files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from joulesmith.estimate import parallel, training_fit
from joulesmith.estimate.answer import Constant
from joulesmith.estimate.devices import Device, precision_name
from joulesmith.estimate.shape import Shape
from joulesmith.estimate.training import BITS, TrainingEstimate, estimate_training

TIMES = (2, 4, 8, 16)
"""More or fewer data ranks than the estimate's, for the curve."""


@dataclass(frozen=True)
class Wider:
    """The same training on so many devices. speedup: over the fewest; ideal: with nothing lost.
    hours, kwh: at the value of the estimate, which is one of the points; kwh None if unknown."""

    devices: int
    hours: float
    kwh: float | None
    speedup: float
    ideal: float
    efficiency: float


@dataclass(frozen=True)
class TrainAnswer:
    """scaling: on fewer and on more devices, in rising order."""

    shape: Shape
    training: TrainingEstimate
    scaling: tuple[Wider, ...]

    @property
    def constants(self) -> tuple[Constant, ...]:
        return self.training.constants

    @property
    def notes(self) -> tuple[str, ...]:
        return self.training.notes


def answer_train(
    shape: Shape, tokens: float, device: Device, devices: int | None = None, **given: Any
) -> TrainAnswer:
    """A training, and what more devices would make of it. given: as `estimate_training` takes."""
    found = estimate_training(shape, tokens, device, devices, **given)
    return TrainAnswer(shape, found, _scaling(shape, device, found, given))


def _scaling(
    shape: Shape, device: Device, t: TrainingEstimate, given: dict[str, Any]
) -> tuple[Wider, ...]:
    """On as few data ranks as hold the model, up to as many as get a sequence each. The batch
    stays; what a plan waits for changes."""
    settings = training_fit.Settings(
        sequence=t.sequence, bits=BITS.get(precision_name(given.get("precision", "bf16")), 16),
        recompute=given.get("recompute"), optimizer=given.get("optimizer", "adamw"),
        lora_rank=given.get("lora_rank", 16) if t.mode == "lora" else None,
        teacher=given.get("teacher") if t.mode == "distil" else None,
    )  # fmt: skip
    own = t.plan.data
    ranks = {own, *(own * k for k in TIMES), *(own // k for k in TIMES if own % k == 0)}
    ranks = {
        d for d in ranks
        if d == own or (
            d % t.plan.expert == 0
            and d * t.sequence <= t.batch_tokens
            and training_fit.fitting(shape, replace(t.plan, data=d), device, settings) is not None
        )
    }  # fmt: skip
    # of the products alone: what is waited for is what the curve is about
    share = min(0.9, t.utilisation.value / t.step.efficiency)
    points = parallel.curve(
        shape, t.plan, device, sorted(ranks), t.batch_tokens,
        t.step.compute * t.plan.devices * share, utilisation=share, peak=1.0,
        links=given.get("links"), sequence=t.sequence,
    )  # fmt: skip
    one = next(x for x in points if x.devices == t.plan.devices)
    return tuple(
        Wider(
            x.devices, t.hours.value * one.speedup / x.speedup,
            None if t.kwh is None or x.joules_ratio is None or not one.joules_ratio
            else t.kwh.value * x.joules_ratio / one.joules_ratio,
            x.speedup, x.ideal, x.efficiency,
        )
        for x in points
    )  # fmt: skip
