"""The joule table: what is measured, what is kept, what a damaged cache does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from joulesmith.engines.matmul import MatmulCell, MatmulCost
from joulesmith.errors import JoulesmithError
from joulesmith.plan.table import JouleTable
from joulesmith.report.result import TableCell

pytest.importorskip("gguf")

SHAPES = [(64, 96), (32, 256)]


class FakeEngine:
    """Costs that follow from the cell, and a record of what was asked."""

    name = "fake"
    threads = 2

    def __init__(self, version: str = "1", joules: bool = True) -> None:
        self.version = version
        self.joules = joules
        self.asked: list[tuple[list[MatmulCell], tuple[int, ...]]] = []

    def matmul_table(
        self, cells: Sequence[MatmulCell], *, batches: Sequence[int], **_: Any
    ) -> list[MatmulCost]:
        self.asked.append((list(cells), tuple(batches)))
        out = []
        for cell in cells:
            for batch in batches:
                s = 1e-9 * cell.rows * cell.columns * batch
                j = 3 * s if self.joules else None
                low, high = (None, None) if j is None else (j / 2, j * 2)
                out.append(MatmulCost(cell, batch, s, j, low, high, j and "modelled"))
        return out


def measure(
    engine: FakeEngine, folder: Path, types: Sequence[str] = ("Q4_0", "F16"), **more: Any
) -> JouleTable:
    return JouleTable.measure(engine, SHAPES, types, 16, cache_dir=folder, **more)


def test_costs_per_token(tmp_path: Path) -> None:
    engine = FakeEngine()
    shares: list[float] = []
    table = measure(engine, tmp_path, progress=shares.append)
    assert engine.asked[0][1] == (1, 16) and len(engine.asked[0][0]) == 4
    one = 64 * 96 * 1e-9
    assert table.decode(64, 96, "Q4_0").seconds == pytest.approx(one)
    assert table.prefill(64, 96, "Q4_0").seconds == pytest.approx(16 * one)
    assert table.price(64, 96, "Q4_0") == pytest.approx((3 * one, 3 * one))
    cells = [TableCell(**c) for c in table.cells()]
    assert len(cells) == 4 and cells[0].pedigree == "modelled"
    assert cells[0].prefill_seconds == pytest.approx(one)
    assert shares[-1] == 1.0
    with pytest.raises(KeyError):
        table.price(1, 1, "Q4_0")


def test_types_that_do_not_fit_a_shape_are_left_out(tmp_path: Path) -> None:
    table = measure(FakeEngine(), tmp_path, ["Q4_K", "F16"])
    assert table.decode(32, 256, "Q4_K").seconds > 0
    with pytest.raises(KeyError):
        table.decode(64, 96, "Q4_K")
    with pytest.raises(JoulesmithError, match="unknown ggml type"):
        measure(FakeEngine(), tmp_path, ["Q9_9"])


def test_cache_round_trip_and_only_missing_cells(tmp_path: Path) -> None:
    first = measure(FakeEngine(), tmp_path)
    engine = FakeEngine()
    again = measure(engine, tmp_path)
    assert engine.asked == [] and again.cells() == first.cells()
    more = measure(engine, tmp_path, ["Q4_0", "Q8_0", "F16"])
    assert [{c.type for c in cells} for cells, _ in engine.asked] == [{"Q8_0"}]
    assert len(more.cells()) == 6
    # another batch is another measurement, and both stay
    JouleTable.measure(engine, SHAPES, ["Q4_0"], 32, cache_dir=tmp_path)
    assert len(engine.asked) == 2
    measure(engine, tmp_path)
    assert len(engine.asked) == 2


@pytest.mark.parametrize("change", [{"threads": 1}, {"stream_weights": 5}, {"repeats": 9}])
def test_other_conditions_are_other_tables(tmp_path: Path, change: dict[str, int]) -> None:
    measure(FakeEngine(), tmp_path)
    engine = FakeEngine()
    measure(engine, tmp_path, **change)
    assert len(engine.asked) == 1
    other = FakeEngine(version="2")
    measure(other, tmp_path)
    assert len(other.asked) == 1


def damaged(good: bytes) -> list[bytes]:
    stored = json.loads(good)
    negative = {**stored, "costs": [{**c, "seconds": -1.0} for c in stored["costs"]]}
    wordy = {**stored, "costs": [{**c, "joules": "many"} for c in stored["costs"]]}
    foreign = {**stored, "key": {**stored["key"], "cpu": "another"}}
    odd = [b"", b"{", b"null", b"[]", b"\xff\xfe", b"{}", good[: len(good) // 2], b"[" * 100000]
    return odd + [json.dumps(x).encode() for x in (negative, wordy, foreign)]


def test_a_damaged_cache_is_measured_anew(tmp_path: Path) -> None:
    want = measure(FakeEngine(), tmp_path).cells()
    (file,) = tmp_path.glob("matmul-*.json")
    good = file.read_bytes()
    for data in damaged(good):
        file.write_bytes(data)
        engine = FakeEngine()
        assert measure(engine, tmp_path).cells() == want
        assert len(engine.asked) == 1
        assert file.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert len(measure(FakeEngine(), tmp_path / "file" / "folder").cells()) == 4


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    JouleTable.measure(FakeEngine(), SHAPES, ["F16"], 4)
    assert len(list((tmp_path / "joulesmith").glob("matmul-*.json"))) == 1


def test_unknown_joules_are_seconds_never_zero(tmp_path: Path) -> None:
    table = measure(FakeEngine(joules=False), tmp_path)
    assert not table.in_joules and table.cells() == []
    assert table.price(64, 96, "F16") == pytest.approx((64 * 96e-9, 64 * 96e-9))


def test_an_engine_without_the_means(tmp_path: Path) -> None:
    class Plain:
        name = "plain"

    with pytest.raises(JoulesmithError, match="plain cannot measure"):
        JouleTable.measure(Plain(), SHAPES, ["F16"], cache_dir=tmp_path)


def test_batch_limits(tmp_path: Path) -> None:
    engine = FakeEngine()
    JouleTable.measure(engine, SHAPES, ["F16"], 4096, cache_dir=tmp_path)
    JouleTable.measure(engine, SHAPES, ["F16"], 1, cache_dir=tmp_path)
    assert [b for _, b in engine.asked] == [(1, 512), (1, 2)]
