"""The reference check of benchmarks/nvml_reference.py, on a board whose energy is known."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import pytest
from fake_counters import FakeBoard, FakeNvml

HERE = Path(__file__).resolve().parents[2] / "benchmarks" / "nvml_reference.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("nvml_reference", HERE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_counter_and_power_of_a_known_board_agree(script: Any) -> None:
    begin = time.perf_counter()
    board = FakeBoard(energy=lambda: 2e5 * (time.perf_counter() - begin), power=2e5)
    counted, integrated, samples = script.both(FakeNvml(board), board, 0, time.sleep, 0.3)
    assert counted > 0 and samples >= 2
    assert integrated == pytest.approx(counted, rel=0.05)


def test_a_sensor_that_reads_low_shows(script: Any) -> None:
    begin = time.perf_counter()
    board = FakeBoard(energy=lambda: 2e5 * (time.perf_counter() - begin), power=1e5)
    counted, integrated, _ = script.both(FakeNvml(board), board, 0, time.sleep, 0.3)
    assert integrated == pytest.approx(counted / 2, rel=0.1)


def test_a_board_without_a_counter_is_refused(script: Any) -> None:
    board = FakeBoard(power=1e5)
    with pytest.raises(SystemExit, match="no energy counter"):
        script.both(FakeNvml(board), board, 0, time.sleep, 0.1)
