"""The estimate of the time left, on a clock of our own."""

from __future__ import annotations

import io

import pytest

from joulesmith.progress import Progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_left_follows_what_stages_really_took() -> None:
    clock = Clock()
    p = Progress({"a": 10, "b": 30}, io.StringIO(), clock=clock)
    with p.stage("a"):
        clock.now = 20  # twice as slow as expected
    assert p.left("b", 0.0) == pytest.approx(60)
    clock.now = 50
    assert p.left("b", 0.5) == pytest.approx(30)


def test_a_log_gets_plain_lines_now_and_then() -> None:
    clock, out = Clock(), io.StringIO()
    p = Progress({"work": 1}, out, every=10, clock=clock)
    with p.stage("work") as tick:
        for i in range(100):
            clock.now = i
            tick(i / 100)
    lines = out.getvalue().splitlines()
    assert 8 <= len(lines) <= 14
    assert "left" in lines[-2] and lines[-1] == "work: 1 min 39 s"
    assert "\r" not in out.getvalue()


def test_a_terminal_gets_one_live_line() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    clock, out = Clock(), Terminal()
    p = Progress({"work": 1}, out, clock=clock)
    with p.stage("work") as tick:
        clock.now = 5
        tick(0.5)
    assert "\r[1/1] work  50%" in out.getvalue()
    assert out.getvalue().endswith("work: 5.0 s\n")


def test_a_failed_stage_is_not_done() -> None:
    p = Progress({"work": 1}, io.StringIO())
    with pytest.raises(ValueError), p.stage("work"):
        raise ValueError
    assert "work" not in p.done
