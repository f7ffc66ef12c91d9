from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.energy.reading import Reading
from joulesmith.energy.totals import POINT_COLUMNS
from joulesmith.energy.training import LoopMeter, count_parameters


def joules(j: float | None, note: str = "") -> Reading:
    """A reading of a second, +-10 %."""
    if j is None:
        return Reading(None, 1.0, notes=(note,) if note else ())
    return Reading(j, 1.0, 0.9 * j, 1.1 * j, "modelled", marginal=j / 2)


class Meter:
    """Windows whose readings are given beforehand; the last one is repeated."""

    def __init__(self, *readings: Reading | Exception) -> None:
        self.script = list(readings)
        self.opened: list[str] = []
        self.open = 0
        self.readings: dict[str, list[Reading]] = {}

    def window(self, name: str) -> Any:
        meter = self

        class Window:
            reading: Reading

            def __init__(self) -> None:
                self.name = name

            def __enter__(self) -> None:
                meter.opened.append(name)
                meter.open += 1

            def __exit__(self, *exc: object) -> None:
                meter.open -= 1
                now = meter.script.pop(0) if len(meter.script) > 1 else meter.script[0]
                if isinstance(now, Exception):
                    raise now
                self.reading = now
                meter.readings.setdefault(name, []).append(now)

        return Window()


def steps(loop: LoopMeter, n: int, **counts: Any) -> None:
    for _ in range(n):
        with loop.step(**counts):
            pass


def test_joules_per_step_token_sample_and_parameter() -> None:
    meter = Meter(joules(10), joules(30), joules(0))
    theirs = joules(10)
    meter.readings["train"] = [theirs]  # a window of the user's own
    with LoopMeter(meter, parameters=1000, every=2) as loop:
        steps(loop, 4, tokens=100, samples=5)
    assert loop.steps == 4 and loop.tokens == 400 and loop.samples == 20
    assert loop.joules == 40 and loop.low == pytest.approx(36) and loop.high == pytest.approx(44)
    assert loop.joules_per_step == 10 and loop.joules_per_token == 0.1
    assert loop.joules_per_sample == 2 and loop.joules_per_parameter == 0.04
    assert loop.pedigree == "modelled" and loop.seconds == 3.0
    assert meter.open == 0 and meter.readings == {"train": [theirs]}
    first, second, tail = loop.curve
    assert (first["joules"], first["window_joules"], first["joules_per_token"]) == (10, 10, 0.05)
    assert (second["joules"], second["window_joules"], second["joules_per_token"]) == (40, 30, 0.15)
    assert (
        second["marginal"] == 20 and tail["window_steps"] == 0 and tail["joules_per_step"] is None
    )


def test_a_window_covers_as_many_steps_as_fill_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("joulesmith.energy.training.time.perf_counter", lambda: now[0])
    with LoopMeter(Meter(joules(1)), seconds=1.0) as loop:
        for _ in range(10):
            with loop.step():
                now[0] += 0.26
    assert [p["window_steps"] for p in loop.curve] == [4, 4, 2]


def test_between_steps_belongs_to_the_training() -> None:
    meter = Meter(joules(1))
    with LoopMeter(meter, every=1) as loop:
        steps(loop, 1)
        assert meter.open == 1  # the next window is open before the next step begins
        steps(loop, 1)
    assert loop.steps == 2


def test_loss_and_counts_may_be_set_late_and_be_tensors() -> None:
    torch = pytest.importorskip("torch")
    with LoopMeter(Meter(joules(8)), every=2) as loop:
        for x in (1.0, 3.0):
            with loop.step() as step:
                step.loss = torch.tensor(x, requires_grad=True)
                step.tokens = torch.tensor(7)
                step.samples = 2
    assert loop.curve[0]["loss"] == 2.0 and loop.tokens == 14 and loop.samples == 4
    assert loop.curve[0]["joules_per_token"] == pytest.approx(8 / 14)


def test_devices_are_only_read_at_the_ends_of_windows() -> None:
    reads = []

    class Lazy:
        def detach(self) -> Lazy:
            return self

        def __radd__(self, other: object) -> Lazy:
            return self

        def __add__(self, other: object) -> Lazy:
            return self

        def __float__(self) -> float:
            reads.append(1)
            return 4.0

    with LoopMeter(Meter(joules(1)), every=3) as loop:
        steps(loop, 2, loss=Lazy())
        assert not reads
        steps(loop, 1, loss=Lazy())
        assert len(reads) == 1


def test_unknown_energy_stays_unknown() -> None:
    with LoopMeter(Meter(joules(5), joules(None, "no counter")), every=1, parameters=3) as loop:
        assert loop.joules is None and loop.joules_per_step is None and loop.tokens is None
        steps(loop, 1, tokens=1)
        assert loop.joules == 5
        steps(loop, 1, tokens=1)
    assert loop.joules is None and loop.low is None and loop.pedigree is None
    assert loop.joules_per_token is None and loop.joules_per_parameter is None
    assert loop.spent == 5 and loop.tokens == 2
    assert [p["joules"] for p in loop.curve] == [5, None, None]
    assert loop.curve[1]["window_joules"] is None and loop.curve[1]["spent"] == 5
    assert "no counter" in loop.notes


def test_unknown_counts_stay_unknown() -> None:
    with LoopMeter(Meter(joules(6)), every=1) as loop:
        steps(loop, 1, tokens=3, samples=1)
        steps(loop, 1, samples=1)
        steps(loop, 1, tokens=3, samples=1)
    assert loop.tokens is None and loop.joules_per_token is None and loop.samples == 3
    assert [p["joules_per_token"] for p in loop.curve[:3]] == [2, None, 2]


@pytest.mark.parametrize("bad", [OSError("gone"), RuntimeError("boom")])
def test_a_failing_meter_does_not_stop_the_training(bad: Exception) -> None:
    with LoopMeter(Meter(joules(5), bad, joules(7)), every=1, budget_joules=100) as loop:
        steps(loop, 3)
    assert loop.steps == 3 and loop.joules is None and loop.spent == 5 + 7 + 7
    assert any(str(bad) in n for n in loop.notes) and any("budget" in n for n in loop.notes)


def test_a_meter_that_opens_no_window() -> None:
    class Dead:
        def window(self, name: str) -> Any:
            raise OSError("no driver")

    with LoopMeter(Dead(), every=1) as loop:
        steps(loop, 2, tokens=1)
        with loop.pause():
            pass
    assert loop.steps == 2 and loop.joules is None and loop.tokens == 2
    assert any("no driver" in n for n in loop.notes)


def test_a_loss_that_cannot_be_read_does_not_stop_the_training() -> None:
    with LoopMeter(Meter(joules(5)), every=1) as loop:
        steps(loop, 1, loss="high", tokens=object())
    assert loop.steps == 1 and loop.joules == 10 and any("could not be" in n for n in loop.notes)


def test_an_error_in_a_step_passes_and_its_joules_count() -> None:
    meter = Meter(joules(5), joules(9))
    with LoopMeter(meter, every=1) as loop:
        steps(loop, 1)
        with pytest.raises(KeyError), loop.step():
            raise KeyError
    assert loop.steps == 1 and loop.joules == 14 and meter.open == 0


def test_evaluation_is_metered_apart() -> None:
    meter = Meter(joules(10), joules(0), joules(4), joules(10), joules(0))
    with LoopMeter(meter, every=2) as loop:
        steps(loop, 2)
        with loop.pause("evaluate"):
            pass
        loop.record(eval_loss=1.5)
        steps(loop, 2)
    assert loop.aside == 4 and loop.joules == 20 and loop.spent == 24
    assert meter.opened == ["train", "train", "evaluate", "train", "train", "train"]
    (point,) = [p for p in loop.curve if p["metrics"]]
    assert point["metrics"] == {"eval_loss": 1.5} and point["step"] == 2


def test_budget() -> None:
    done = 0
    with LoopMeter(Meter(joules(10)), every=1, budget_joules=35) as loop:
        for _ in range(100):
            with loop.step():
                done += 1
            if loop.should_stop:
                break
    assert done == 4 and loop.spent >= 35
    assert not LoopMeter(Meter(joules(10))).should_stop
    with LoopMeter(Meter(joules(None)), every=1, budget_joules=1) as loop:
        steps(loop, 3)
    assert not loop.should_stop and any("budget" in n for n in loop.notes)


@pytest.mark.parametrize(
    "wrong", [{"every": 0}, {"seconds": 0}, {"budget_joules": -1}, {"budget_joules": math.nan}]
)
def test_arguments_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoopMeter(Meter(joules(1)), **wrong)


def test_resume_goes_on_where_it_stopped() -> None:
    with LoopMeter(Meter(joules(10)), every=1) as first:
        steps(first, 3, tokens=5, samples=1)
        state = json.loads(json.dumps(first.state_dict()))
    second = LoopMeter(Meter(joules(20)), every=1)
    second.load_state_dict(state)
    assert second.joules == state["joules"] and second.steps == 3 and second.tokens == 15
    with second:
        steps(second, 1, tokens=5, samples=1)
    assert second.joules == state["joules"] + 40 and second.steps == 4 and second.tokens == 20
    assert any("resumed at step 3" in n for n in second.notes)
    unknown = LoopMeter(Meter(joules(1)), every=1)
    unknown.load_state_dict({**state, "unknown_windows": 1})
    assert unknown.joules is None


@pytest.mark.parametrize(
    "change",
    [{"version": 99}, {"joules": -1}, {"joules": math.nan}, {"steps": "x"}, {"pedigree": "sure"}],
)
def test_a_state_that_is_none_changes_nothing(change: dict[str, Any]) -> None:
    loop = LoopMeter(Meter(joules(1)))
    for bad in ({**loop.state_dict(), **change}, {}, None):
        with pytest.raises(ValueError, match="not a state"):
            loop.load_state_dict(bad)  # type: ignore[arg-type]
    assert loop.joules is None and loop.steps == 0


def test_points_are_written(tmp_path: Path) -> None:
    for name in ("curve.jsonl", "curve.csv"):
        with LoopMeter(Meter(joules(10)), every=1, path=tmp_path / name) as loop:
            steps(loop, 2, tokens=4, loss=0.5)
            loop.record(eval_loss=0.25)
    lines = [json.loads(x) for x in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [x["joules"] for x in lines] == [10, 20, 30, 40] and tuple(lines[0]) == POINT_COLUMNS
    assert lines[0]["loss"] == 0.5 and lines[2]["metrics"] == {"eval_loss": 0.25}
    with open(tmp_path / "curve.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [float(r["joules"]) for r in rows] == [10, 20, 30, 40]
    assert rows[0]["samples"] == "" and json.loads(rows[2]["metrics"]) == {"eval_loss": 0.25}


def test_a_full_disk_does_not_stop_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LoopMeter(Meter(joules(10)), every=1, path=tmp_path / "c.jsonl") as loop:
        steps(loop, 1)

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as m:
            m.setattr("os.write", full)
            steps(loop, 1)
        steps(loop, 1)
    assert loop.joules == 40 and any("No space left" in n for n in loop.notes)
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == 3


def test_long_runs_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("joulesmith.energy.training._MAX_POINTS", 50)
    with LoopMeter(Meter(joules(1)), every=1) as loop:
        for i in range(400):
            steps(loop, 1)
            if i == 3:
                loop.record(eval_loss=1.0)
    assert len(loop.curve) <= 51 and loop.joules == 402
    assert any(p["metrics"] for p in loop.curve)
    assert [p["step"] for p in loop.curve] == sorted(p["step"] for p in loop.curve)


def test_parameters() -> None:
    assert count_parameters(None) is None and count_parameters(5) == 5
    with pytest.raises(ValueError, match="parameters"):
        count_parameters(-1)
    torch = pytest.importorskip("torch")
    assert count_parameters(torch.nn.Linear(3, 4)) == 16


def test_the_loops_own_meter() -> None:
    with LoopMeter(every=1) as loop:
        steps(loop, 1, tokens=10)
    assert loop.steps == 1 and len(loop.curve) == 2
    assert loop.joules is None or loop.joules >= 0
    loop.stop()
    with loop.step():  # stopped: counted, and unknown
        pass
    loop.flush()
    assert loop.steps == 2 and loop.joules is None


@given(
    st.lists(st.tuples(st.one_of(st.none(), st.floats(0, 1e6)), st.integers(0, 1000)), max_size=20),
    st.integers(1, 4),
)
def test_totals_are_the_sums_of_the_points(
    plan: list[tuple[float | None, int]], every: int
) -> None:
    script = [joules(j) for j, _ in plan] + [joules(0.0)]
    with LoopMeter(Meter(*script), every=every) as loop:
        for _, tokens in plan:
            steps(loop, 1, tokens=tokens)
    parts = [p["window_joules"] for p in loop.curve]
    assert loop.steps == len(plan) == sum(p["window_steps"] for p in loop.curve)
    if not plan:
        assert loop.joules is None
    elif None in parts:
        assert loop.joules is None
        assert loop.spent == pytest.approx(math.fsum(p for p in parts if p is not None))
    else:
        assert loop.joules == pytest.approx(math.fsum(parts))
        low, mid, high = loop.low, loop.joules, loop.high
        assert low is not None and mid is not None and high is not None
        assert 0 <= low <= mid <= high
    if plan:
        assert loop.tokens == sum(t for _, t in plan)
    spent = [p["spent"] for p in loop.curve if p["spent"] is not None]
    assert spent == sorted(spent)
