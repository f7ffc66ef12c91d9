from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.energy import external
from joulesmith.energy.external import External, last_line, parse
from joulesmith.errors import JoulesmithError


@pytest.mark.parametrize(
    ("text", "watts"),
    [
        ("42", 42),
        (" 42.5 W ", 42.5),
        ("1.5kW", 1500),
        ("900 mW", 0.9),
        ("3e2 watts", 300),
        (".5 Watt", 0.5),
        ("+7", 7),
        ('{"watts": 12.5, "time": "now"}', 12.5),
        ("0", 0),
    ],
)
def test_lines_that_are_watts(text: str, watts: float) -> None:
    assert parse(text) == pytest.approx(watts)


@pytest.mark.parametrize(
    "text",
    [
        *("", "watts", "-5", "5 MW", "5 k", "5 m", "1,5", "12 J", "nan", "inf", "1e9", "{", "{}"),
        *('{"watts": "5"}', '{"watts": true}', '{"watts": -1}', '{"watts": NaN}', "5 6", "[5]"),
        '{"watts": 1' + "0" * 400 + "}",
    ],
)
def test_lines_that_are_not(text: str) -> None:
    with pytest.raises(ValueError, match=r"watts"):
        parse(text)


@given(st.text(max_size=40))
def test_any_text_is_watts_or_a_reason(text: str) -> None:
    try:
        assert parse(text) >= 0
    except ValueError as e:
        assert str(e) and "\n" not in str(e)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("1\n2\n", "2"),
        ("1\n2", "1"),  # the writer is not through with it
        ("12", "12"),
        ("1\n2\n\n \n", "2"),
        ("", ""),
    ],
)
def test_the_last_whole_line(text: str, line: str) -> None:
    assert last_line(text) == line


@pytest.mark.parametrize("spec", ["", "42", "file:", "http://x", "command: ", "command:'a"])
def test_another_form_is_one_line(spec: str) -> None:
    with pytest.raises(JoulesmithError) as e:
        External(spec)
    assert "\n" not in str(e.value) and "external meter" in str(e.value)


def write(path: Path, text: str, age: float = 0.0) -> None:
    """A file last written ``age`` seconds ago; each writing has a time of its own."""
    path.write_text(text)
    stamp = time.time() - age
    os.utime(path, (stamp, stamp))


def joules(e: External, now: float) -> float | None:
    count = e.read(now).get("machine")
    return None if count is None else count.joules


def test_a_file_is_integrated(tmp_path: Path) -> None:
    f = tmp_path / "watts"
    write(f, "100 W\n")
    e = External(f"file:{f}")
    now = time.perf_counter()
    first = joules(e, now)
    write(f, "100 W\n300\n")
    second = joules(e, now + 2)
    assert first is not None and second is not None
    assert second - first == pytest.approx(400, rel=0.05)
    third = joules(e, now + 3)  # nothing new: the last value holds
    assert third is not None and third - second == pytest.approx(300, rel=0.05)
    assert e.notes == []


def test_a_stale_file_is_unknown(tmp_path: Path) -> None:
    f = tmp_path / "watts"
    write(f, "100\n", age=60)
    e = External(f"file:{f}")
    now = time.perf_counter()
    assert joules(e, now) is None and "stale" in e.notes[0]
    write(f, "100\n")
    assert joules(e, now) is not None
    assert joules(e, now + external.STALE_SECONDS + 5) is None
    assert any("no new value" in n for n in e.notes)


@pytest.mark.parametrize("junk", ["", "x\n", "-5\n", "\x00\xff"])
def test_garbage_in_the_file_is_a_note_and_the_last_value_holds(tmp_path: Path, junk: str) -> None:
    f = tmp_path / "watts"
    write(f, "100\n")
    e = External(f"file:{f}")
    now = time.perf_counter()
    write(f, junk)
    held = joules(e, now + 1)
    assert held is not None and held == pytest.approx(100, rel=0.1)
    assert len(e.notes) == 1 and "external meter" in e.notes[0]


def test_a_file_that_is_absent_vanishes_or_is_none(tmp_path: Path) -> None:
    f = tmp_path / "watts"
    e = External(f"file:{f}")
    assert e.read(time.perf_counter()) == {} and "cannot read" in e.notes[0]
    write(f, "5\n")
    assert joules(e, time.perf_counter()) is not None
    assert External(f"file:{tmp_path}").read(0.0) == {}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_nobody_writes_to_does_not_block(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    e = External(f"file:{pipe}")
    assert e.read(0.0) == {} and "not a regular file" in e.notes[0]


def until(say: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not say():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def command(code: str, interval: float = 0.05) -> External:
    return External(f'command:"{sys.executable}" -S -c "{code}"', interval)


def test_a_command_is_run_over_and_over() -> None:
    e = command("print('hello'); print('2 kW')")
    try:
        assert until(lambda: "machine" in e.read(time.perf_counter()))
        a = e.read(time.perf_counter())["machine"]
        assert until(lambda: e.read(time.perf_counter())["machine"].joules > a.joules)
        assert e.read(time.perf_counter())["machine"].watts == 2000
    finally:
        e.close()
        e.close()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit('no meter here')", "ended with code 1: no meter here"),
        ("print('n/a')", "no number of watts"),
        ("print(-3)", "negative"),
        ("import time; time.sleep(60)", "took more than"),
    ],
)
def test_a_command_that_fails_is_a_note(
    monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    monkeypatch.setattr(external, "_PATIENCE_SECONDS", 3.0 if "sleep" not in code else 0.2)
    e = command(code, 0.2)
    try:
        assert until(lambda: any(said in n for n in e.notes)), e.notes
        assert e.read(time.perf_counter()) == {}
    finally:
        e.close()


def test_a_command_that_does_not_exist_is_a_note() -> None:
    e = External("command:/nonexistent/meter --watts")
    assert until(lambda: bool(e.notes)) and "cannot run /nonexistent/meter" in e.notes[0]
    e.close()


def test_its_thread_ends_with_it() -> None:
    e = command("print(1)", 60)

    def alive() -> bool:
        return any(t.name == "joulesmith-external" for t in threading.enumerate())

    assert alive()
    del e
    assert until(lambda: not alive())
