from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from joulesmith.energy import cpu_time
from joulesmith.energy.cpu_time import OthersLoad, ProcessTree, machine_busy

BURN = "import time\nwhile time.process_time() < {s}: pass\n"


def burn(s: float) -> None:
    end = time.process_time() + s
    while time.process_time() < end:
        pass


def test_own_time_is_finer_than_a_tick() -> None:
    t = ProcessTree()
    a = t.seconds()
    burn(0.003)
    b = t.seconds()
    assert a is not None and b is not None
    assert 0.003 <= b - a < 0.003 + 0.05


def test_children_count_while_alive_and_after() -> None:
    t = ProcessTree()
    a = t.seconds() or 0.0
    code = BURN.format(s=0.15) + "print(flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as p:
        assert p.stdout is not None
        p.stdout.readline()
        alive = (t.seconds() or 0.0) - a
        p.communicate(b"\n")
    after = (t.seconds() or 0.0) - a
    assert alive >= 0.15
    assert after >= alive


def test_another_process_by_pid_and_its_end() -> None:
    code = BURN.format(s=0.1) + "print(flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as p:
        assert p.stdout is not None
        p.stdout.readline()
        t = ProcessTree([p.pid])
        seen = t.seconds()
        p.communicate(b"\n")
    assert seen is not None and seen >= 0.1
    assert t.seconds() == pytest.approx(seen, abs=0.05)  # ended: the last value stays


def test_a_process_that_never_was_is_unknown_not_zero() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as p:
        pass
    assert ProcessTree([p.pid]).seconds() is None


def test_the_same_process_is_not_counted_twice() -> None:
    me = os.getpid()
    once, twice = ProcessTree([me]).seconds(), ProcessTree([me, me]).seconds()
    assert once is not None and twice == pytest.approx(once, abs=0.05)


def test_without_the_kernel_clock_psutil_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_time, "_LINUX", False)
    t = ProcessTree().seconds()
    assert t is not None and t > 0
    busy = machine_busy()
    assert busy is not None and busy > 0


def test_machine_busy_leaves_out_idle_and_stolen_time(tmp_path: Path) -> None:
    f = tmp_path / "stat"
    f.write_text("cpu  100 20 30 9999 888 4 6 777 5 5\ncpu0 1 1 1 1\n")
    assert machine_busy(f) == pytest.approx(160 / os.sysconf("SC_CLK_TCK"))


@pytest.mark.parametrize("junk", ["", "cpu", "cpu a b c d e f g", "\x00"])
def test_garbage_stat_falls_back(tmp_path: Path, junk: str) -> None:
    f = tmp_path / "stat"
    f.write_text(junk)
    busy = machine_busy(f)
    assert busy is None or busy >= 0


def test_others_load_of_a_long_window() -> None:
    o = OthersLoad(cpus=4)
    # 10 s of 4 CPUs; 16 busy, 6 of them ours: others took 10 of 40.
    assert o.load((0.0, 100.0, 5.0), (10.0, 116.0, 11.0)) == pytest.approx(0.25)
    assert o.load((0.0, 100.0, 5.0), (10.0, 106.0, 11.5)) == 0.0  # ticks may lag behind our clock
    assert o.load((0.0, 0.0, 0.0), (10.0, 500.0, 0.0)) == 1.0


def test_a_short_window_borrows_the_last_second() -> None:
    o = OthersLoad(cpus=2)
    assert o.load((0.0, 0.0, 0.0), (0.02, 0.0, 0.0)) is None
    for k in range(12):
        o.add(k / 10, k / 10, 0.0)  # one of two CPUs busy with others
    assert o.load((1.08, 1.08, 0.0), (1.1, 1.1, 0.0)) == pytest.approx(0.5)
    assert o.load((9.0, 9.0, 0.0), (9.1, 9.1, 0.0)) is None  # too old to tell
    o.add(2.0, None, 1.0)


def test_a_young_meter_uses_the_history_it_has() -> None:
    o = OthersLoad(cpus=2)
    o.add(0.0, 0.0, 0.0)
    assert o.load((0.1, 0.1, 0.0), (0.2, 0.2, 0.0)) == pytest.approx(0.5)
