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


def test_what_an_earlier_run_did_took_no_time_of_this_one() -> None:
    clock = Clock()
    p = Progress({"a": 1, "train": 8, "c": 1}, io.StringIO(), clock=clock)
    with p.stage("a"):
        clock.now = 10
    with p.stage("train") as tick:
        clock.now = 15  # a checkpoint is read
        tick(0.5)
        clock.now = 25
        tick(0.625)  # an eighth, as much as "a", took 10 s as well
        assert p.left("train", 0.625) == pytest.approx(40)
        clock.now = 55
        tick(1)
    assert p.left("c", 0.0) == pytest.approx(10)


def test_a_stage_much_longer_than_expected_is_seen_early() -> None:
    clock = Clock()
    p = Progress({"a": 10, "train": 10, "c": 1}, io.StringIO(), clock=clock)
    with p.stage("a"):
        clock.now = 10
    with p.stage("train") as tick:
        found = []
        for step in range(100):  # 1000 s instead of 10
            tick(step / 1000)
            found.append(p.left("train", step / 1000))
            clock.now += 1
    assert found[0] == pytest.approx(11)
    assert all(f is not None and 800 < f < 1100 for f in found[50:])
    assert found[5] is not None and found[5] > 400


def test_a_name_that_comes_twice_is_two_stages() -> None:
    clock = Clock()
    p = Progress({"train": 10}, io.StringIO(), clock=clock)
    with p.stage("train") as tick:
        clock.now = 3000  # made ready for long
        tick(0.1)
        clock.now = 3010
    with p.stage("train") as tick:
        clock.now = 3012
        tick(0.1)
        for second in range(1, 20):
            clock.now = 3012 + second
            left = p.left("train", 0.1 + second / 100)
            assert left is not None and 0 <= left < 3100
        assert left < 1000


def test_a_stage_that_tells_only_its_end_counts_whole() -> None:
    clock = Clock()
    p = Progress({"a": 10, "b": 30}, io.StringIO(), clock=clock)
    with p.stage("a") as tick:
        clock.now = 20
        tick(1)
    assert p.left("b", 0.0) == pytest.approx(60)


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
