"""Energy of training or serving a model of any size, before anything runs.

>>> from joulesmith import estimate
>>> answer = estimate.serve(
...     estimate.of_numbers(8e9), estimate.Setup(estimate.find("h100")), estimate.Traffic(batch=64)
... )
>>> answer.joules_per_token.low < answer.joules_per_token.value
True

Names load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from joulesmith.estimate.answer import Constant, Figure
    from joulesmith.estimate.devices import Device, all_devices, find
    from joulesmith.estimate.model.plain import of_numbers
    from joulesmith.estimate.model.shape import Shape
    from joulesmith.estimate.model.source import read
    from joulesmith.estimate.serving.comparing import Compared, compare
    from joulesmith.estimate.serving.daily import charge, fleet
    from joulesmith.estimate.serving.mixes import Mixed, mix
    from joulesmith.estimate.serving.serve import (
        Served,
        best_batch,
        curve,
        fewest_devices,
        most_sequences,
        serve,
    )
    from joulesmith.estimate.serving.setup import Setup, Traffic
    from joulesmith.estimate.training.parallel import Plan
    from joulesmith.estimate.training.run import TrainingEstimate
    from joulesmith.estimate.training.run import estimate_training as train

_HOME = {
    "Compared": "serving.comparing",
    "Constant": "answer",
    "Device": "devices",
    "Figure": "answer",
    "Mixed": "serving.mixes",
    "Plan": "training.parallel",
    "Served": "serving.serve",
    "Setup": "serving.setup",
    "Shape": "model.shape",
    "Traffic": "serving.setup",
    "TrainingEstimate": "training.run",
    "all_devices": "devices",
    "best_batch": "serving.serve",
    "charge": "serving.daily",
    "compare": "serving.comparing",
    "curve": "serving.serve",
    "fewest_devices": "serving.serve",
    "find": "devices",
    "fleet": "serving.daily",
    "mix": "serving.mixes",
    "most_sequences": "serving.serve",
    "of_numbers": "model.plain",
    "read": "model.source",
    "serve": "serving.serve",
    "train": "training.run",
}
_NAMED = {"train": "estimate_training"}

__all__ = [
    "Compared",
    "Constant",
    "Device",
    "Figure",
    "Mixed",
    "Plan",
    "Served",
    "Setup",
    "Shape",
    "Traffic",
    "TrainingEstimate",
    "all_devices",
    "best_batch",
    "charge",
    "compare",
    "curve",
    "fewest_devices",
    "find",
    "fleet",
    "mix",
    "most_sequences",
    "of_numbers",
    "read",
    "serve",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), _NAMED.get(name, name))


def __dir__() -> list[str]:
    return sorted(__all__)
