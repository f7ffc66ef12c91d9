"""One multiplication by a weight matrix and what it costs. Knows no engine."""

from __future__ import annotations

from dataclasses import dataclass

from joulesmith.energy.reading import Pedigree


@dataclass(frozen=True, order=True)
class MatmulCell:
    """``y = W x`` for W of (rows, columns) stored as a GGML type, e.g. ``"Q4_0"``."""

    rows: int
    columns: int
    type: str


@dataclass(frozen=True)
class MatmulCost:
    """What one multiplication of ``cell`` by ``batch`` columns takes (not divided by batch).

    seconds, joules, low, high: medians over repeats; joules, low, high are ``None`` when
    energy is unknown here. ``low``/``high``: 90 % interval of joules as the meter states it.
    """

    cell: MatmulCell
    batch: int
    seconds: float
    joules: float | None
    low: float | None
    high: float | None
    pedigree: Pedigree | None
