"""What a matrix costs as one product and as two thin ones, on torch's own kernels.

Each timed pass multiplies by many different matrices of one shape, so that weights stream
through the caches as they do while a model decodes; passes of both forms take turns.
Knows no models and no damage.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from joulesmith.energy.reading import Pedigree, Reading, worst
from joulesmith.errors import EngineError

if TYPE_CHECKING:
    import torch

    from joulesmith.energy import EnergyMeter

STREAM_BYTES = 192 * 2**20
"""Weights of one pass: beyond caches, and no more memory than need be."""
_PASS_SECONDS = 0.05  # a shorter pass is repeated within its window


@dataclass(frozen=True, order=True)
class ThinCell:
    """``y = W x`` for W (rows, columns), against its factors of ``rank``.

    pivoted: whether an identity stands for ``rank`` of the inner factor's columns.
    """

    rows: int
    columns: int
    rank: int
    pivoted: bool = True

    def __post_init__(self) -> None:
        if min(self.rows, self.columns) < 1 or not 1 <= self.rank <= min(self.rows, self.columns):
            raise EngineError(f"no factors of rank {self.rank} for {self.rows} x {self.columns}")


@dataclass(frozen=True)
class FormCost:
    """One multiplication of one form: medians over repeats.

    joules, low, high (90 % interval): ``None`` when energy is unknown here.
    """

    seconds: float
    joules: float | None
    low: float | None
    high: float | None
    pedigree: Pedigree | None


@dataclass(frozen=True)
class ThinCost:
    """Both forms of ``cell`` on ``batch`` tokens at once (not divided by batch)."""

    cell: ThinCell
    batch: int
    dense: FormCost
    thin: FormCost


def measure_thin(
    cells: Sequence[ThinCell],
    *,
    batches: Sequence[int] = (1, 64),
    dtype: str = "float32",
    repeats: int = 5,
    stream_bytes: int = STREAM_BYTES,
    meter: EnergyMeter | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[ThinCost]:
    """Measure each cell at each batch, on the CPU, with the threads that torch now has.

    dtype: of weights and inputs. repeats: interleaved passes of each form. stream_bytes:
    of the weights that one pass goes through, at least one matrix. meter: default a new one.
    Raises `EngineError` for settings that cannot be.
    """
    import torch

    if repeats < 1 or not batches or min(batches) < 1:
        raise EngineError(f"cannot measure {repeats} repeats of batches {list(batches)}")
    kind = getattr(torch, dtype, None)
    if kind not in (torch.float32, torch.bfloat16, torch.float16):
        raise EngineError(f"cannot multiply in {dtype!r}: use float32, bfloat16 or float16")
    own = None
    if meter is None:
        from joulesmith.energy import EnergyMeter

        meter = own = EnergyMeter()
    out = []
    try:
        with torch.inference_mode():
            for i, cell in enumerate(cells):
                forms = _forms(cell, kind, stream_bytes)
                for j, batch in enumerate(batches):
                    x = torch.randn(batch, cell.columns, dtype=torch.float32).to(kind)
                    out.append(_measure(cell, batch, x, forms, repeats, meter))
                    if progress is not None:
                        progress((i + (j + 1) / len(batches)) / len(cells))
    finally:
        if own is not None:
            own.close()
    return out


Pass = Callable[["torch.Tensor"], None]


def _forms(cell: ThinCell, kind: torch.dtype, stream_bytes: int) -> dict[str, tuple[Pass, int]]:
    """Form -> a pass over its matrices, and how many there are."""
    import torch

    rows, columns, rank = cell.rows, cell.columns, cell.rank
    size = torch.empty((), dtype=kind).element_size()
    inside = columns - rank if cell.pivoted else columns
    numbers = {"dense": rows * columns, "thin": rank * (rows + inside)}
    count = {n: max(1, min(4096, stream_bytes // max(1, k * size))) for n, k in numbers.items()}
    # as many of each: equal work, whatever the bytes
    n = min(count.values())
    dense = torch.randn(n, rows, columns).to(kind)
    outer, inner = torch.randn(n, rows, rank).to(kind), torch.randn(n, rank, inside).to(kind)
    order = torch.randperm(columns)
    linear = torch.nn.functional.linear

    def one(x: torch.Tensor) -> None:
        for w in dense:
            linear(x, w)

    def two(x: torch.Tensor) -> None:
        for a, b in zip(outer, inner, strict=True):
            if cell.pivoted:
                y = x.index_select(-1, order)
                linear(y[..., :rank] + linear(y[..., rank:], b), a)
            else:
                linear(linear(x, b), a)

    return {"dense": (one, n), "thin": (two, n)}


def _measure(
    cell: ThinCell,
    batch: int,
    x: torch.Tensor,
    forms: dict[str, tuple[Pass, int]],
    repeats: int,
    meter: EnergyMeter,
) -> ThinCost:
    loops: dict[str, int] = {}
    for name, (run, _) in forms.items():
        run(x)
        start = time.perf_counter()
        run(x)
        took = time.perf_counter() - start
        loops[name] = max(1, min(1000, math.ceil(_PASS_SECONDS / max(took, 1e-7))))
    found: dict[str, list[Reading]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, (run, n) in forms.items():
            with meter.window(f"{name} {batch}") as window:
                for _ in range(loops[name]):
                    run(x)
            found[name].append(window.reading.per(loops[name] * n))
    cost = {name: _median(readings) for name, readings in found.items()}
    return ThinCost(cell, batch, cost["dense"], cost["thin"])


def _median(readings: Sequence[Reading]) -> FormCost:
    def middle(values: Sequence[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return statistics.median(known) if len(known) == len(values) else None

    return FormCost(
        statistics.median(r.seconds for r in readings),
        middle([r.joules for r in readings]),
        middle([r.low for r in readings]),
        middle([r.high for r in readings]),
        worst([r.pedigree for r in readings]),
    )
