"""joulesmith makes language models spend fewer joules.

Names load on first use: importing the package costs no torch.

>>> import joulesmith
>>> result = joulesmith.optimize("smollm2", keep=0.99)  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from joulesmith._version import __version__

if TYPE_CHECKING:
    from joulesmith import estimate
    from joulesmith.compress.recipe import Recipe, read_recipe
    from joulesmith.energy.meter import EnergyMeter
    from joulesmith.energy.reading import Reading
    from joulesmith.errors import EngineError, FloorNotMetError, JoulesmithError
    from joulesmith.job.run import optimize
    from joulesmith.measure import measure_model
    from joulesmith.models import Model, load
    from joulesmith.quality import Quality
    from joulesmith.report.result import Result

_HOME = {
    "EnergyMeter": "energy.meter",
    "EngineError": "errors",
    "FloorNotMetError": "errors",
    "JoulesmithError": "errors",
    "Model": "models",
    "Quality": "quality",
    "Reading": "energy.reading",
    "Recipe": "compress.recipe",
    "Result": "report.result",
    "load": "models",
    "measure_model": "measure",
    "optimize": "job.run",
    "read_recipe": "compress.recipe",
}

__all__ = [
    "EnergyMeter",
    "EngineError",
    "FloorNotMetError",
    "JoulesmithError",
    "Model",
    "Quality",
    "Reading",
    "Recipe",
    "Result",
    "__version__",
    "estimate",
    "load",
    "measure_model",
    "optimize",
    "read_recipe",
]


def __getattr__(name: str) -> Any:
    if name == "estimate":
        return import_module(f"{__name__}.estimate")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
