"""Joules: counters, the power model, windows, carbon and price. Knows no language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from joulesmith.energy.reading import Part, Reading

if TYPE_CHECKING:
    from joulesmith.energy.carbon import GridRow, PriceRow, cost, emission, grid, price
    from joulesmith.energy.cpu_power import CpuPower
    from joulesmith.energy.meter import EnergyMeter
    from joulesmith.energy.window import Window

__all__ = [
    "CpuPower",
    "EnergyMeter",
    "GridRow",
    "Part",
    "PriceRow",
    "Reading",
    "Window",
    "cost",
    "emission",
    "grid",
    "price",
]

_HOMES = {
    "CpuPower": "cpu_power",
    "EnergyMeter": "meter",
    "Window": "window",
    "GridRow": "carbon",
    "PriceRow": "carbon",
    "grid": "carbon",
    "price": "carbon",
    "emission": "carbon",
    "cost": "carbon",
}


def __getattr__(name: str) -> Any:
    """Import on first use: those who only want a `Reading` pay for nothing else."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
