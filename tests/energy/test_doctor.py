from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_counters import FakeBoard, FakeNvml, zone
from rich.console import Console

from joulesmith.energy import doctor, rapl
from joulesmith.energy.doctor import Finding, examine, render


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("CUDA_VISIBLE_DEVICES", "JOULESMITH_METER")
    for name in (*names, "JOULESMITH_IDLE_WATTS", "JOULESMITH_MAX_WATTS"):
        monkeypatch.delenv(name, raising=False)


def look(tmp_path: Path, **k: Any) -> dict[str, Finding]:
    none = tmp_path / "none"
    given = {"rapl_root": none, "supply_root": none, "nvml": FakeNvml(), **k}
    return {f.source.split(" (")[0]: f for f in examine(**given)}


def test_a_bare_machine(tmp_path: Path) -> None:
    found = look(tmp_path)
    assert list(found) == ["RAPL", "NVML", "Zeus", "battery", "external meter", "power model"]
    states = {k: f.state for k, f in found.items() if k != "Zeus"}
    assert states.pop("power model") == "present"
    assert set(states.values()) == {"absent"}
    assert all(f.found and f.accuracy for f in found.values())
    assert "JOULESMITH_METER" in found["external meter"].open


def test_all_present(tmp_path: Path) -> None:
    zone(tmp_path / "rapl" / "intel-rapl:0", "package-0", 1)
    battery = tmp_path / "supply" / "BAT0"
    battery.mkdir(parents=True)
    for name, text in {"type": "Battery", "status": "Discharging", "power_now": "9000000"}.items():
        (battery / name).write_text(text)
    (tmp_path / "watts").write_text("41.5 W\n")
    soc = SimpleNamespace(get_total_energy_consumption=lambda: SimpleNamespace(cpu_total_mj=1))
    modules = {
        "zeus.device.soc": SimpleNamespace(get_soc=lambda: soc),
        "zeus.device.gpu": SimpleNamespace(),
    }
    board = FakeBoard(energy=1, mig=[1, 1])
    found = look(
        tmp_path,
        rapl_root=tmp_path / "rapl",
        supply_root=tmp_path / "supply",
        nvml=FakeNvml(board, FakeBoard(power=1)),
        zeus=modules.__getitem__,
        external=f"file:{tmp_path / 'watts'}",
    )
    assert {f.state for f in found.values()} == {"present"}
    assert not any(f.open for f in found.values())
    assert "package-0" in found["RAPL"].found and "41.5 W" in found["external meter"].found
    assert "energy counter, split: MIG" in found["NVML"].found
    assert "power samples" in found["NVML"].found and "cpu" in found["Zeus"].found


def test_closed_counters_name_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path / "intel-rapl:0", "package-0", 1)

    def refuse(path: Path) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(rapl, "_number", refuse)
    f = look(tmp_path, rapl_root=tmp_path)["RAPL"]
    assert f.state == "blocked" and "sudo chmod a+r" in f.open and str(tmp_path) in f.open


def test_a_hung_driver_and_hidden_boards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PATIENCE", 0.01)
    f = look(tmp_path, nvml=FakeNvml(FakeBoard(energy=1), init=lambda: time.sleep(0.5)))["NVML"]
    assert f.state == "blocked" and "does not answer" in f.found
    monkeypatch.setattr(doctor, "_PATIENCE", 5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    f = look(tmp_path, nvml=FakeNvml(FakeBoard(energy=1)))["NVML"]
    assert f.state == "blocked" and "CUDA_VISIBLE_DEVICES" in f.open


def test_on_mains(tmp_path: Path) -> None:
    battery = tmp_path / "BAT0"
    battery.mkdir()
    for name, text in {"type": "Battery", "status": "Full", "energy_now": "9000000"}.items():
        (battery / name).write_text(text)
    f = look(tmp_path, supply_root=tmp_path)["battery"]
    assert f.state == "blocked" and "unplug" in f.open


@pytest.mark.parametrize(
    ("spec", "said"), [("x", "give file:PATH"), ("file:/nonexistent", "cannot")]
)
def test_a_bad_external_meter(tmp_path: Path, spec: str, said: str) -> None:
    f = look(tmp_path, external=spec)["external meter"]
    assert f.state == "blocked" and said in f.found and f.open


def test_bad_watts_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOULESMITH_IDLE_WATTS", "lots")
    f = look(tmp_path)["power model"]
    assert f.state == "blocked" and "JOULESMITH_IDLE_WATTS" in f.found


def test_the_table_says_it_all() -> None:
    findings = [
        Finding("RAPL", "blocked", "closed [here]", "run  chmod [x]", "measured"),
        Finding("power model", "present", "a model", "", "modelled"),
    ]
    out = io.StringIO()
    render(findings, Console(file=out, width=100))
    text = out.getvalue()
    for word in ("RAPL", "blocked", "closed [here]", "run  chmod [x]", "present", "modelled"):
        assert word in text
    assert findings[0].to_dict()["state"] == "blocked"


def test_it_looks_fast_and_pulls_in_nothing_heavy() -> None:
    code = (
        "import sys; from joulesmith.energy.doctor import examine; examine()\n"
        "print(sorted({'torch', 'numpy', 'scipy', 'pydantic', 'zeus'} & set(sys.modules)))"
    )
    env = {**os.environ, "JOULESMITH_METER": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.strip() == "[]"
