"""Two thin layers or one dense: the rule on given costs, and a real measurement."""

from __future__ import annotations

import pytest
import torch

from joulesmith.engines.thin_matmul import FormCost, ThinCell, ThinCost, _forms, measure_thin
from joulesmith.errors import EngineError, JoulesmithError
from joulesmith.plan.thin import KeepCheaper, workload


def cost(
    batch: int, dense: float, thin: float, *, joules: bool = True, cell: ThinCell | None = None
) -> ThinCost:
    def form(x: float) -> FormCost:
        return FormCost(x / 10, x if joules else None, None, None, "modelled" if joules else None)

    return ThinCost(cell or ThinCell(64, 32, 8), batch, form(dense), form(thin))


def test_a_workload_weighs_both_batches() -> None:
    costs = [cost(1, 2.0, 1.0), cost(64, 32.0, 64.0)]
    assert workload(costs, 10, 128) == (10 * 2 + 2 * 32, 10 * 1 + 2 * 64, "J")
    assert workload(costs, 10, 0) == (20, 10, "J")
    assert workload(costs, 0, 64) == (32, 64, "J")


def test_unknown_joules_are_compared_in_seconds() -> None:
    dense, thin, unit = workload([cost(1, 2.0, 1.0, joules=False), cost(64, 1, 1)], 1, 64)
    assert unit == "s"
    assert dense == pytest.approx(0.2 + 0.1) and thin == pytest.approx(0.1 + 0.1)


def test_what_was_not_measured_is_refused() -> None:
    for costs, decode, prefill in (([cost(1, 1, 1)], 1, 1), ([cost(64, 1, 1)], 1, 1), ([], 0, 0)):
        with pytest.raises(JoulesmithError):
            workload(costs, decode, prefill)
    with pytest.raises(JoulesmithError):
        KeepCheaper(batch=1)


def test_each_shape_is_measured_once_at_a_rank_no_smaller() -> None:
    asked: list[ThinCell] = []

    def fake(cells: list[ThinCell], batches: tuple[int, ...]) -> list[ThinCost]:
        asked.extend(cells)
        share = cells[0].rank / 64
        return [cost(b, 1.0, 2 * share, cell=cells[0]) for b in batches]

    keep = KeepCheaper(measure=fake)
    assert keep(128, 64, 17) == keep(128, 64, 31)  # both are measured as 32: a tie is dense
    assert not keep(128, 64, 31)
    assert keep(128, 64, 16)
    assert [c.rank for c in asked] == [32, 16]
    assert not keep(64, 64, 63)


def test_a_measurement_has_time_and_pedigree() -> None:
    cells = [ThinCell(96, 64, 8), ThinCell(96, 64, 64, pivoted=False)]
    found = measure_thin(cells, batches=(1, 4), repeats=2, stream_bytes=1 << 18)
    assert [(c.cell, c.batch) for c in found] == [(c, b) for c in cells for b in (1, 4)]
    for c in found:
        for form in (c.dense, c.thin):
            assert form.seconds > 0
            assert (form.joules is None) == (form.pedigree is None)
            if form.joules is not None and form.low is not None and form.high is not None:
                assert form.low <= form.joules <= form.high


def test_the_measured_forms_are_what_a_thin_layer_does() -> None:
    """Shapes of what is multiplied: the right number of weights in each pass."""
    for pivoted, inside in ((True, 24), (False, 32)):
        forms = _forms(ThinCell(48, 32, 8, pivoted), torch.float32, 1 << 16)
        assert forms["dense"][1] == forms["thin"][1] == (1 << 16) // (4 * 48 * 32)
        for run, _ in forms.values():
            run(torch.randn(3, 32))
        assert 8 * (48 + inside) < 48 * 32


def test_impossible_measurements_are_refused() -> None:
    with pytest.raises(EngineError):
        ThinCell(4, 4, 5)
    cell = ThinCell(4, 4, 2)
    for bad in ({"repeats": 0}, {"batches": ()}, {"batches": (0,)}, {"dtype": "int8"}):
        with pytest.raises(EngineError):
            measure_thin([cell], **bad)  # type: ignore[arg-type]
