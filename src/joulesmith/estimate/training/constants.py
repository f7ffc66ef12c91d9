"""The constants that estimates of training rest on, from two tables beside this file.

fitted.csv is written by ``benchmarks/estimate_training.py --write``; the other one
restates published figures and names what is assumed. Knows no models and no devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from joulesmith.estimate import rows
from joulesmith.estimate.answer import Constant

FITTED, ASSUMED = "fitted.csv", "assumed.csv"
GENERATION = "utilisation of "
"""Before an architecture's name: its factor on the utilisation that all devices share."""


@lru_cache(maxsize=1)
def shipped() -> Mapping[str, Constant]:
    """Both tables, by name."""
    return {c.name: c for file in (FITTED, ASSUMED) for c in _read(file)}


def value(name: str) -> float:
    return shipped()[name].value


def _read(file: str) -> tuple[Constant, ...]:
    parsed = rows.parse(
        rows.shipped(f"training/{file}"), file, Constant, ("name", "value", "basis", "source")
    )
    return tuple(Constant(**{"unit": "", **cells}) for _, cells in parsed)
