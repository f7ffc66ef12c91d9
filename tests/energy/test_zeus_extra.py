"""Against stand-ins with the interface of zeus.device.gpu and zeus.device.soc."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from joulesmith.energy import zeus_extra
from joulesmith.energy.zeus_extra import Zeus


class AMDGPUs:
    """The newer interface: names with underscores, millijoules and milliwatts."""

    def __init__(self, *energy: Any, counts: bool = True) -> None:
        self.energy, self.power, self.counts = list(energy), [50_000] * len(energy), counts

    def __len__(self) -> int:
        return len(self.energy)

    def supports_get_total_energy_consumption(self, gpu_index: int) -> bool:
        return self.counts

    def get_total_energy_consumption(self, gpu_index: int) -> Any:
        if isinstance(self.energy[gpu_index], Exception):
            raise self.energy[gpu_index]
        return self.energy[gpu_index]

    def get_instant_power_usage(self, gpu_index: int) -> Any:
        return self.power[gpu_index]


class NVIDIAGPUs(AMDGPUs):
    pass


class OldAMDGPUs:
    """The older interface: names in one word."""

    def __init__(self) -> None:
        self.energy = 1000

    def __len__(self) -> int:
        return 1

    def supportsGetTotalEnergyConsumption(self, index: int) -> bool:  # noqa: N802
        return True

    def getTotalEnergyConsumption(self, index: int) -> int:  # noqa: N802
        return self.energy


class Soc:
    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def get_total_energy_consumption(self) -> Any:
        return SimpleNamespace(**self.fields)


def loader(gpus: Any = None, soc: Any = None) -> Any:
    def give(thing: Any, what: str) -> Any:
        if thing is None:
            raise RuntimeError(f"no {what} here")
        return thing

    modules = {
        "zeus.device.gpu": SimpleNamespace(get_gpus=lambda: give(gpus, "GPU")),
        "zeus.device.soc": SimpleNamespace(get_soc=lambda: give(soc, "SoC")),
    }
    return modules.__getitem__


def joules(z: Zeus, now: float) -> dict[str, float]:
    return {k: c.joules for k, c in z.read(now).items()}


def test_amd_gpus_by_counter() -> None:
    gpus = AMDGPUs(5_000, 7_000)
    z = Zeus(loader(gpus))
    assert [d.name for d in z.devices] == ["gpu0", "gpu1"] and not z.samples
    assert not any(d.cpu for d in z.devices)
    gpus.energy = [6_500, 7_000]
    assert joules(z, 1.0) == pytest.approx({"gpu0": 1.5, "gpu1": 0.0})
    gpus.energy[0] = RuntimeError("lost")
    assert joules(z, 2.0) == {"gpu1": 0.0} and "lost" in z.notes[0]


def test_the_older_names() -> None:
    gpus = OldAMDGPUs()
    z = Zeus(loader(gpus))
    gpus.energy = 3000
    assert joules(z, 1.0) == pytest.approx({"gpu0": 2.0})


def test_gpus_without_a_counter_by_power() -> None:
    gpus = AMDGPUs(0, counts=False)
    z = Zeus(loader(gpus))
    assert z.samples and "power" in z.devices[0].how
    joules(z, 0.0)
    gpus.power = [150_000]
    assert joules(z, 0.5) == pytest.approx({"gpu0": 50.0})


def test_nvidia_gpus_are_not_taken_twice() -> None:
    assert Zeus(loader(NVIDIAGPUs(1))).devices == ()


def test_apple_counts_the_processor_and_memory() -> None:
    soc = Soc(cpu_total_mj=1000, dram_mj=200, gpu_mj=50, ane_mj=None, gpu_sram_mj=0)
    z = Zeus(loader(soc=soc))
    assert {d.name: d.cpu for d in z.devices} == {
        "cpu": True,
        "dram": False,
        "gpu0": False,
        "gpu0-sram": False,
    }
    soc.fields.update(cpu_total_mj=4000, dram_mj=700)
    got = joules(z, 1.0)
    assert (got["cpu"], got["dram"]) == pytest.approx((3.0, 0.5))


def test_jetson_parts_are_within_the_module() -> None:
    soc = Soc(cpu_energy_mj=10.0, gpu_energy_mj=5.0, total_energy_mj=100.0)
    z = Zeus(loader(soc=soc))
    assert {d.name: (d.within, d.cpu) for d in z.devices} == {
        "module": (None, True),
        "cpu": ("module", True),
        "gpu0": ("module", False),
    }
    soc.fields["total_energy_mj"] = 2100.0
    assert joules(z, 1.0)["module"] == pytest.approx(2.0)


@pytest.mark.parametrize("junk", [None, -5, float("nan")])
def test_garbage_is_left_out(junk: Any) -> None:
    soc = Soc(cpu_total_mj=1000, dram_mj=10)
    z = Zeus(loader(soc=soc))
    soc.fields["cpu_total_mj"] = junk
    assert set(z.read(1.0)) == {"dram"}


def test_nothing_there_is_quiet() -> None:
    z = Zeus(loader())
    assert z.devices == () and z.read(0.0) == {} and z.notes == []


def test_where_no_such_hardware_is_zeus_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise AssertionError(name)

    monkeypatch.setattr(zeus_extra, "expected", lambda: None)
    monkeypatch.setattr(zeus_extra.importlib, "import_module", refuse)
    z = Zeus()
    assert z.devices == () and z.notes == []


def test_hardware_without_the_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(zeus_extra, "expected", lambda: "AMD GPU")
    monkeypatch.setattr(zeus_extra.importlib, "import_module", absent)
    z = Zeus()
    assert z.devices == () and "joulesmith[zeus]" in z.notes[0] and "AMD GPU" in z.notes[0]


def test_a_hang_is_a_note() -> None:
    gate = threading.Event()
    soc = Soc(cpu_total_mj=1000)
    z = Zeus(loader(soc=soc), patience=0.1)
    assert len(z.devices) == 1
    soc.get_total_energy_consumption = gate.wait  # type: ignore[method-assign]
    assert z.read(1.0) == {} and "does not answer" in z.notes[0]
    gate.set()
    z.close()
