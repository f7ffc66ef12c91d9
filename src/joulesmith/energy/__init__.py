"""Joules: counters, the power model, windows, carbon and price. Knows no language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from joulesmith.energy.reading import Part, Reading

if TYPE_CHECKING:
    from joulesmith.energy.carbon import (
        Amount,
        GridRow,
        PriceRow,
        bill,
        cost,
        emission,
        footprint,
        grid,
        price,
    )
    from joulesmith.energy.cpu_power import CpuPower
    from joulesmith.energy.meter import EnergyMeter
    from joulesmith.energy.series import read_series
    from joulesmith.energy.training import LoopMeter
    from joulesmith.energy.window import Window

__all__ = [
    "Amount",
    "CpuPower",
    "EnergyMeter",
    "GridRow",
    "LoopMeter",
    "Part",
    "PriceRow",
    "Reading",
    "Window",
    "bill",
    "cost",
    "emission",
    "footprint",
    "grid",
    "price",
    "read_series",
]

_HOMES = {
    "CpuPower": "cpu_power",
    "EnergyMeter": "meter",
    "Window": "window",
    "LoopMeter": "training",
    "Amount": "carbon",
    "footprint": "carbon",
    "bill": "carbon",
    "read_series": "series",
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
