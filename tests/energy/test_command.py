"""Commands in rounds: medians, spread, ratios, what is told of failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.energy import command as room
from joulesmith.energy.carbon import grid
from joulesmith.energy.command import (
    Measured,
    Rounds,
    Run,
    compare,
    measure_commands,
    merged,
    report,
)
from joulesmith.energy.cpu_power import CpuPower
from joulesmith.energy.cpu_time import Descendants
from joulesmith.energy.launch import CommandNotRunError, Ended
from joulesmith.energy.memory import Resident, resident
from joulesmith.energy.meter import EnergyMeter
from joulesmith.energy.rates import price_for
from joulesmith.energy.reading import Part, Reading
from joulesmith.energy.series import Series
from joulesmith.errors import JoulesmithError

MODEL = CpuPower(
    name="test", cpus=os.cpu_count() or 1, idle_watts=10.0, max_watts=50.0, dram_watts=2.0,
    exponent=1.0, low=0.5, high=2.0, source="test",
)  # fmt: skip


def meter(tmp_path: Path) -> EnergyMeter:
    """Without counters, whatever the machine has."""
    return EnergyMeter(rapl_root=tmp_path / "none", nvml=object(), cpu_model=MODEL)


def reading(joules: float | None, seconds: float = 1.0, marginal: float | None = None) -> Reading:
    return Reading(
        joules, seconds,
        None if joules is None else joules / 2,
        None if joules is None else joules * 2,
        None if joules is None else "modelled",
        marginal, 0.5,
        (Part("cpu", joules, None, None, None if joules is None else "modelled", "test"),),
    )  # fmt: skip


def measured(*joules: float | None, seconds: float = 1.0) -> Measured:
    return Measured("x", ("x",), tuple(Run(reading(j, seconds), 0, None, 100, 0.0) for j in joules))


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Commands that are not run; ends maps a word to exit codes, or raises."""

    def set_up(ends: dict[str, list[int | BaseException]], stop_at: int = -1) -> list[str]:
        log: list[str] = []

        def fake(command: tuple[str, ...], started: object) -> Ended:
            end = ends[command[0]][sum(w == command[0] for w in log)]
            log.append(command[0])
            if isinstance(end, BaseException):
                raise end
            return Ended(end, None, 1000, 0, len(log) == stop_at)

        monkeypatch.setattr(room, "launch", fake)
        monkeypatch.setattr(room.shutil, "which", lambda name: name)
        return log

    return set_up


def test_a_short_command_has_a_wide_interval_and_no_zero(tmp_path: Path) -> None:
    with meter(tmp_path) as m:
        rounds = measure_commands([("true", ["true"])], 1, m)
    r = rounds.measured[0].runs[0].reading
    assert r.joules is not None and r.low is not None and r.high is not None
    assert 0 < r.low < r.joules < r.high
    assert r.marginal is not None and 0 < r.marginal <= r.joules
    assert rounds.exit_code == 0 and not rounds.stopped


def test_descendants_are_counted(tmp_path: Path) -> None:
    """CPU time of grandchildren that have ended is the command's."""
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    with meter(tmp_path) as m:
        rounds = measure_commands(
            [("x", ["sh", "-c", f'sh -c "{sys.executable} -c \\"{burn}\\""; true'])], 1, m
        )
    cpu = rounds.measured[0].runs[0].reading.cpu_seconds
    assert cpu is not None and cpu >= 0.29


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
def test_what_leaves_its_parent_is_counted_while_the_command_runs(tmp_path: Path) -> None:
    """A daemon in a session of its own, whose parent has ended."""
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    fifo = tmp_path / "fifo"
    script = (
        f'mkfifo {fifo}; (setsid sh -c \'"$0" -c "$1"; echo > {fifo}\' "$0" "$1" &); cat {fifo}'
    )
    with EnergyMeter(Descendants(), rapl_root=tmp_path, nvml=object(), cpu_model=MODEL) as m:
        rounds = measure_commands([("x", ["sh", "-c", script, sys.executable, burn])], 1, m)
    cpu = rounds.measured[0].runs[0].reading.cpu_seconds
    assert rounds.exit_code == 0 and cpu is not None and cpu >= 0.29


def test_order_rotates(made_up: Callable[..., list[str]], tmp_path: Path) -> None:
    log = made_up({"a": [0] * 4, "b": [0] * 4})
    rounds = measure_commands([("A", ["a"]), ("B", ["b"])], 4, meter(tmp_path))
    assert log == list("abbaabba")
    assert [len(m.runs) for m in rounds.measured] == [4, 4]


def test_failures_are_told_and_passed_on(made_up: Callable[..., list[str]], tmp_path: Path) -> None:
    made_up({"a": [0, 5, 6], "b": [9, 0, 0]})
    rounds = measure_commands([("A", ["a"]), ("B", ["b"])], 3, meter(tmp_path))
    assert rounds.exit_code == 5, "the command's own goes before the other's"
    assert "2 of 3 runs ended" in rounds.measured[0].runs[-1].reading.notes[-1]
    made_up({"a": [0] * 3, "b": [9, 0, 0]})
    assert measure_commands([("A", ["a"]), ("B", ["b"])], 3, meter(tmp_path)).exit_code == 9


def test_a_signal_ends_the_rounds(made_up: Callable[..., list[str]], tmp_path: Path) -> None:
    log = made_up({"a": [0, 0, 130, 0]}, stop_at=3)
    rounds = measure_commands([("A", ["a"])], 4, meter(tmp_path))
    assert len(log) == 3 and rounds.stopped and rounds.exit_code == 130
    assert len(rounds.measured[0].runs) == 2, "the run that was cut short is no figure"
    made_up({"a": [130]}, stop_at=1)
    rounds = measure_commands([("A", ["a"])], 4, meter(tmp_path))
    assert rounds.stopped and rounds.exit_code == 130
    assert "a signal stopped it early" in rounds.measured[0].runs[0].reading.notes
    log = made_up({"a": [130], "b": [0]}, stop_at=1)
    rounds = measure_commands([("A", ["a"]), ("B", ["b"])], 2, meter(tmp_path))
    assert log == ["a"] and [m.label for m in rounds.measured] == ["A"]


def test_ctrl_c_between_runs_keeps_what_is_done(
    made_up: Callable[..., list[str]], tmp_path: Path
) -> None:
    made_up({"a": [0, KeyboardInterrupt()]})
    rounds = measure_commands([("A", ["a"])], 3, meter(tmp_path))
    assert len(rounds.measured[0].runs) == 1 and rounds.stopped
    made_up({"a": [KeyboardInterrupt()]})
    with pytest.raises(KeyboardInterrupt):
        measure_commands([("A", ["a"])], 3, meter(tmp_path))


def test_a_real_signal_is_reported(tmp_path: Path) -> None:
    with meter(tmp_path) as m:
        rounds = measure_commands(
            [("x", ["sleep", "60"])], 3, m,
            started=lambda pid: os.kill(os.getpid(), signal.SIGINT),
        )  # fmt: skip
    run = rounds.measured[0].runs[0]
    assert run.signal == signal.SIGINT and rounds.exit_code == 130 and rounds.stopped
    assert run.reading.joules is not None and run.reading.joules > 0


def test_absent_commands_and_bad_counts(tmp_path: Path) -> None:
    m = meter(tmp_path)
    with pytest.raises(CommandNotRunError):
        measure_commands([("x", ["no-such-command"])], 2, m)
    out = tmp_path / "out"
    with pytest.raises(CommandNotRunError, match="'no-such-command'"):
        measure_commands([("x", ["touch", str(out)]), ("y", ["no-such-command"])], 2, m)
    assert not out.exists(), "told before anything ran"
    with pytest.raises(JoulesmithError, match="--repeat"):
        measure_commands([("x", ["true"])], 0, m)
    with pytest.raises(JoulesmithError, match="no command"):
        measure_commands([("x", [])], 1, m)


def test_standard_input_is_rewound(tmp_path: Path) -> None:
    """Each run reads the whole file; of a pipe it is told that only the first could."""
    file = tmp_path / "in"
    file.write_text("abc")
    out = tmp_path / "out"
    command = [("x", ["sh", "-c", f"cat >> {out}"])]
    saved = os.dup(0)
    try:
        with file.open() as f:
            os.dup2(f.fileno(), 0)
            rounds = measure_commands(command, 3, meter(tmp_path))
        assert out.read_text() == "abcabcabc"
        assert not any("rewound" in n for n in rounds.measured[0].typical.notes)
        r, w = os.pipe()
        os.dup2(r, 0)
        os.close(w)
        os.close(r)
        rounds = measure_commands(command, 2, meter(tmp_path))
        assert any("rewound" in n for n in rounds.measured[0].typical.notes)
    finally:
        os.dup2(saved, 0)
        os.close(saved)


@given(st.lists(st.one_of(st.none(), st.floats(0.001, 1e6)), min_size=1, max_size=9))
def test_medians_leave_unknown_runs_out_and_are_never_zero(joules: list[float | None]) -> None:
    m = measured(*joules)
    known = [j for j in joules if j is not None]
    typical = m.typical
    if not known:
        assert (
            typical.joules is None
            and typical.pedigree is None
            and m.figure(lambda r: r.joules) is None
        )
        return
    assert typical.joules is not None and min(known) <= typical.joules <= max(known)
    assert typical.low is not None and typical.high is not None
    assert typical.low <= typical.joules <= typical.high
    assert typical.parts[0].joules == typical.joules
    found = m.figure(lambda r: r.joules)
    assert found is not None and found.known == len(known)


def test_ratio_is_other_over_ours_within_rounds() -> None:
    found = compare(measured(1, 2, 4), measured(3, 6, 12, 99, seconds=2.0))
    assert found.joules is not None and found.joules.ratio == pytest.approx(3)
    assert found.joules.low == found.joules.high == pytest.approx(3) and found.joules.pairs == 3
    assert found.seconds is not None and found.seconds.ratio == 2 and found.seconds.of == "seconds"
    assert found.marginal is None
    assert compare(measured(None, 2), measured(1, 4)).joules is not None
    assert compare(measured(None), measured(1)).joules is None


def test_notes_that_differ_by_a_number_are_one() -> None:
    assert merged(["others took 10 %", "b", "others took 12 %", "b"]) == ("others took 12 %", "b")


def test_report_holds_carbon_and_cost(tmp_path: Path) -> None:
    with meter(tmp_path) as m:
        rounds = measure_commands([("A", ["true"]), ("B", ["sh", "-c", "exit 3"])], 2, m)
        found = report(rounds, m, grid("DE"), price_for(grid("DE")), pue=2.0)
        plain = report(rounds, m, grid("DE"), price_for(grid("DE")))
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["label"] == "A" and told["repeat"] == 2 and len(told["runs"]) == 2
    assert told["joules"] > 0 and told["low"] < told["joules"] < told["high"]
    assert told["watts"] == pytest.approx(told["joules"] / told["seconds"])
    assert told["other"]["exit_code"] == 3 and told["ratio"]["joules"]["pairs"] == 2
    assert told["cost"]["unit"] == "EUR" and told["cost"]["value"] > 0
    once = plain.to_dict()["carbon"]["value"]
    assert told["carbon"]["value"] == pytest.approx(2 * once)
    kwh = told["joules"] / 3.6e6
    assert once == pytest.approx(kwh * grid("DE").gco2e_per_kwh)


def test_prices_follow_the_grid() -> None:
    region = price_for(grid("US-CA"))
    assert region is not None and region.currency == "USD"
    number = price_for(grid("350"))
    assert number is not None and number.code == "WORLD"


def test_the_meters_own_time_and_memory_are_not_the_commands(tmp_path: Path) -> None:
    """This process burns CPU and holds memory beside a command that does neither."""
    ballast = bytearray(300 << 20)
    ballast[::4096] = b"1" * len(ballast[::4096])
    m = EnergyMeter(Descendants(), rapl_root=tmp_path, nvml=object(), cpu_model=MODEL)

    def burn(pid: int) -> None:
        begin = time.process_time()
        while time.process_time() - begin < 0.3:
            pass

    with m:
        rounds = measure_commands([("x", ["sleep", "0.4"])], 1, m, started=burn)
    run = rounds.measured[0].runs[0]
    assert run.reading.cpu_seconds is not None and run.reading.cpu_seconds < 0.2
    assert run.peak_memory_bytes is None or run.peak_memory_bytes < 200 << 20


def test_descendants_time_never_goes_back() -> None:
    tree = Descendants()
    before = tree.seconds() or 0.0
    child = subprocess.Popen(["sh", "-c", "i=0; while [ $i -lt 50000 ]; do i=$((i+1)); done"])
    last = before
    while child.poll() is None:
        now = tree.seconds()
        assert now is not None and now >= last
        last = now
    after = tree.seconds()
    assert after is not None and after >= last and after > before
    assert child.pid not in tree.alive


def test_a_process_that_came_between_two_looks_has_its_high_water_mark() -> None:
    """Also when there was no process at all before it."""
    room = Resident()
    assert room.look([]) == (None, None)
    held, most = room.look([os.getpid()])
    mark = resident(os.getpid())
    assert held is not None and most is not None and mark is not None and mark[1] is not None
    assert most == pytest.approx(max(mark[1], mark[0]), rel=0.05)


def test_a_series_is_read_at_the_time_of_each_run(tmp_path: Path) -> None:
    hours = Series((0.0, 3600.0, 7200.0), (100.0, 200.0, 900.0), 3600.0, "gCO2e", "hours")
    runs = tuple(Run(reading(3.6e6), 0, None, 1, start) for start in (10.0, 3700.0, 7300.0))
    whole = Rounds((Measured("x", ("x",), runs),), 0, False)
    with meter(tmp_path) as m:
        found = report(whole, m, hours, None)
        late = replace(runs[0], start=1e6)
        some = report(Rounds((Measured("x", ("x",), (late, *runs[1:])),), 0, False), m, hours, None)
        none = report(Rounds((Measured("x", ("x",), (late,)),), 0, False), m, hours, None)
    assert found.carbon[0].value == pytest.approx(200)
    assert some.carbon[0].value == pytest.approx(550)
    assert any("outside of hours" in n for n in some.carbon[0].notes)
    assert none.carbon[0].value is None, "unknown, never 0"
    assert price_for(hours) == price_for(grid("WORLD"))
