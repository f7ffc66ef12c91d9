"""What a user asks of a training in one go: the estimate, and what more devices would make of it.

Calls `training` and `parallel`; adds no physics. Knows no files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from joulesmith.errors import JoulesmithError
from joulesmith.estimate.answer import Constant
from joulesmith.estimate.devices import Device
from joulesmith.estimate.model.shape import Shape
from joulesmith.estimate.training.run import TrainingEstimate, estimate_training

FEWER, MORE = (16, 8, 4, 2), (2, 4)
"""Parts of the estimate's devices and times as many, for the curve: far beyond what is usual, the
fit of utilisation has seen nothing."""


@dataclass(frozen=True)
class Wider:
    """The same training on so many devices, as an estimate of its own says. speedup: over the
    fewest; ideal: with nothing lost. waits: share of a step that is not compute. kwh None if
    unknown."""

    devices: int
    hours: float
    kwh: float | None
    speedup: float
    ideal: float
    waits: float


@dataclass(frozen=True)
class TrainAnswer:
    """scaling: on fewer and on more devices, in rising order, the estimate among them; empty where
    utilisation was given, which is that of one number of devices."""

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
    return TrainAnswer(shape, found, _scaling(shape, tokens, device, found, given))


def _scaling(
    shape: Shape, tokens: float, device: Device, t: TrainingEstimate, given: dict[str, Any]
) -> tuple[Wider, ...]:
    """As few devices as hold the model, up to as many as there is work for. A given plan keeps its
    ranks but for the data ranks; otherwise each number has its usual plan."""
    if given.get("utilisation") is not None:
        return ()
    found = {t.devices: t}
    plan = given.get("plan")
    for devices in (*(t.devices // k for k in FEWER), *(t.devices * k for k in MORE)):
        own = dict(given)
        if plan is not None:
            data = devices * plan.data // t.devices
            if data < 1 or data * t.devices != devices * plan.data:
                continue
            own["plan"] = replace(plan, data=data, expert=min(plan.expert, data))
        try:
            if devices >= 1 and devices not in found:
                one = estimate_training(shape, tokens, device, devices, **own)
                if one.batch_tokens >= one.plan.data * one.sequence:  # a sequence for each
                    found[devices] = one
        except JoulesmithError:
            continue  # does not fit, or makes no plan
    first = found[min(found)]
    return tuple(
        Wider(
            n, x.hours.value, None if x.kwh is None else x.kwh.value,
            first.hours.value / x.hours.value, n / first.devices, 1 - x.step.efficiency,
        )
        for n, x in sorted(found.items())
    )  # fmt: skip
