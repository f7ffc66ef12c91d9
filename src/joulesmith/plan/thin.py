"""Factors kept as two thin layers or merged back: whichever costs fewer joules, as measured.

Knows costs of multiplications; no models and no damage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from joulesmith.engines.thin_matmul import FormCost, ThinCell, ThinCost, measure_thin
from joulesmith.errors import JoulesmithError

STEP = 16
"""Ranks are measured at multiples of it, rounded up: factors cost no less than they will."""


def workload(costs: Sequence[ThinCost], decode: int, prefill: int) -> tuple[float, float, str]:
    """(dense, thin, unit) of one matrix over ``prefill`` prompt and ``decode`` new tokens.

    costs: of one cell, at batch 1 and at one larger batch. unit: "J", or "s" where any of the
    joules is unknown. Raises `JoulesmithError` where a batch that is needed was not measured.
    """
    one = [c for c in costs if c.batch == 1]
    many = [c for c in costs if c.batch > 1]
    if decode < 0 or prefill < 0 or decode + prefill == 0:
        raise JoulesmithError(f"no workload: {prefill} prompt and {decode} new tokens")
    if (decode and not one) or (prefill and not many):
        raise JoulesmithError("the matrix was not measured for both decode and prefill")
    used = [(c, decode / 1) for c in one[:1] if decode]
    used += [(c, prefill / c.batch) for c in many[:1] if prefill]
    joules = all(f.joules is not None for c, _ in used for f in (c.dense, c.thin))

    def price(f: FormCost) -> float:
        return f.joules if joules and f.joules is not None else f.seconds

    dense = sum(price(c.dense) * n for c, n in used)
    thin = sum(price(c.thin) * n for c, n in used)
    return dense, thin, "J" if joules else "s"


class KeepCheaper:
    """Decides per shape and rank, measuring each only once; hand it to `LowRank.apply_with`.

    decode, prefill: tokens of the workload that counts. measure: as `measure_thin`.
    costs: what was measured so far, by cell.
    """

    def __init__(
        self,
        *,
        decode: int = 256,
        prefill: int = 64,
        pivoted: bool = True,
        batch: int = 64,
        measure: Callable[..., list[ThinCost]] = measure_thin,
    ) -> None:
        if batch < 2:
            raise JoulesmithError(f"a prompt of {batch} tokens at once is decode: give 2 or more")
        self.decode, self.prefill, self.pivoted, self.batch = decode, prefill, pivoted, batch
        self._measure = measure
        self.costs: dict[ThinCell, list[ThinCost]] = {}

    def __call__(self, rows: int, columns: int, rank: int) -> bool:
        """Whether two thin layers cost less than one dense, both of this shape."""
        step = min(-(-rank // STEP) * STEP, rows, columns)
        cell = ThinCell(rows, columns, step, self.pivoted)
        if cell not in self.costs:
            self.costs[cell] = self._measure([cell], batches=(1, self.batch))
        dense, thin, _ = workload(self.costs[cell], self.decode, self.prefill)
        return thin < dense
