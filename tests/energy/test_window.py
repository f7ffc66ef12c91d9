from __future__ import annotations

import asyncio
import inspect
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_counters import FakeNvml

from joulesmith.energy import EnergyMeter
from joulesmith.energy.cpu_power import CpuPower

MODEL = CpuPower("test CPU", 4, 10.0, 50.0, 2.0, 0.6, 0.5, 1.5, "test CPU")


@pytest.fixture
def meter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EnergyMeter:
    monkeypatch.delenv("JOULESMITH_METER", raising=False)
    return make(tmp_path)


def make(tmp_path: Path, **k: Any) -> EnergyMeter:
    none = tmp_path / "none"
    return EnergyMeter(rapl_root=none, supply_root=none, nvml=FakeNvml(), cpu_model=MODEL, **k)


def test_a_function(meter: EnergyMeter) -> None:
    @meter.measure("f")
    def f(a: int, b: int = 2) -> int:
        "Doc."
        return a + b

    assert f(1) == 3 and f(1, b=5) == 6 and f.__doc__ == "Doc." and f.__name__ == "f"
    assert len(meter.readings["f"]) == 2
    assert all((r.joules or 0) > 0 for r in meter.readings["f"])


def test_without_a_name_the_function_gives_it(meter: EnergyMeter) -> None:
    @meter.measure
    def plain() -> int:
        return 1

    @meter.measure()
    def called() -> int:
        return 2

    assert (plain(), called()) == (1, 2)
    assert [k.rsplit(".", 1)[-1] for k in meter.readings] == ["plain", "called"]


def test_an_error_passes_and_is_noted(meter: EnergyMeter) -> None:
    @meter.measure("f")
    def f() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        f()
    assert "KeyError" in meter.readings["f"][0].notes[0]


def test_recursion_and_threads_have_windows_of_their_own(meter: EnergyMeter) -> None:
    @meter.measure("f")
    def f(n: int) -> int:
        return n and 1 + f(n - 1)

    threads = [threading.Thread(target=f, args=(3,)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(meter.readings["f"]) == 16


def test_a_coroutine_and_overlapping_tasks(meter: EnergyMeter) -> None:
    @meter.measure("work")
    async def work(event: asyncio.Event, other: asyncio.Event) -> int:
        event.set()
        await other.wait()
        return 5

    async def main() -> list[int]:
        a, b = asyncio.Event(), asyncio.Event()
        async with meter.window("all"):
            return list(await asyncio.gather(work(a, b), work(b, a)))

    assert inspect.iscoroutinefunction(work)
    assert asyncio.run(main()) == [5, 5]
    assert len(meter.readings["work"]) == 2
    whole = meter.readings["all"][0].seconds
    assert all(r.seconds <= whole for r in meter.readings["work"])


def test_a_generator(meter: EnergyMeter) -> None:
    @meter.measure("g")
    def g(n: int) -> Iterator[Any]:
        got = yield 0
        yield got
        yield from range(n)

    it = g(3)
    assert "g" not in meter.readings
    assert next(it) == 0
    assert it.send("sent") == "sent"  # type: ignore[attr-defined]
    assert list(it) == [0, 1, 2] and len(meter.readings["g"]) == 1
    cut = g(3)
    next(cut)
    cut.close()  # type: ignore[attr-defined]
    assert len(meter.readings["g"]) == 2


def test_an_async_generator(meter: EnergyMeter) -> None:
    closed: list[str] = []

    @meter.measure("g")
    async def g() -> AsyncIterator[Any]:
        try:
            got = yield 0
            try:
                yield got
            except KeyError:
                yield "caught"
            yield "last"
        finally:
            closed.append("closed")

    async def main() -> list[Any]:
        it: Any = g()
        seen = [await it.asend(None), await it.asend("sent"), await it.athrow(KeyError("x"))]
        seen += [item async for item in it]
        cut: Any = g()
        await cut.asend(None)
        await cut.aclose()
        return seen

    assert asyncio.run(main()) == [0, "sent", "caught", "last"]
    assert closed == ["closed", "closed"] and len(meter.readings["g"]) == 2


def test_start_and_stop(meter: EnergyMeter) -> None:
    w = meter.window("w")
    with pytest.raises(RuntimeError, match="not open"):
        w.stop()
    first = w.start().stop()
    assert w.reading is first and meter.readings["w"] == [first]
    w.start()
    with pytest.raises(RuntimeError, match="not closed"):
        _ = w.reading
    w.stop("enough")
    assert w.reading.notes[0] == "enough" and len(meter.readings["w"]) == 2


def test_gpu_work_is_waited_for_at_both_ends(tmp_path: Path) -> None:
    calls: list[str] = []
    m = make(tmp_path, synchronize=lambda: calls.append("wait"))
    with m.window("w"):
        calls.append("work")
    assert calls == ["wait", "work", "wait"]
    quiet = make(tmp_path, synchronize=False)
    with quiet.window("w"):
        pass
    assert len(calls) == 3


def test_a_failing_wait_is_a_note(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    m = make(tmp_path, synchronize=fail)
    with m.window("w") as w:
        pass
    assert any("illegal memory access" in n for n in w.reading.notes)


@pytest.mark.parametrize(
    ("begun", "used", "waited"), [(False, [0], []), (True, [0, 2], [0, 2]), (True, None, ["all"])]
)
def test_pytorch_is_waited_for_where_it_uses_cuda(
    meter: EnergyMeter, monkeypatch: pytest.MonkeyPatch, begun: bool, used: Any, waited: list[Any]
) -> None:
    calls: list[Any] = []
    cuda = SimpleNamespace(
        is_initialized=lambda: begun,
        device_count=lambda: 3,
        synchronize=lambda device="all": calls.append(device),
    )
    inner = SimpleNamespace()
    if used is not None:
        inner._cuda_hasPrimaryContext = lambda index: index in used
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, _C=inner))
    with meter.window("w"):
        assert calls == waited
    assert calls == 2 * waited


def test_peak_memory_of_a_window(meter: EnergyMeter) -> None:
    with meter.window("small") as small:
        pass
    with meter.window("large") as large:
        block = bytearray(96 * 2**20)
        block[::4096] = b"x" * len(block[::4096])
        with meter.window("inner") as inner:
            pass
        del block
    with meter.window("after") as after:
        pass
    a, b, c, d = (w.reading.peak_memory_bytes or 0 for w in (small, large, inner, after))
    assert a > 2**20
    assert min(b, c) > a + 80 * 2**20
    assert d < b - 40 * 2**20  # an earlier peak is not this window's
    assert (meter.total.peak_memory_bytes or 0) >= b
