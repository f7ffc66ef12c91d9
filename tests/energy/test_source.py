from __future__ import annotations

import gc
import itertools
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.energy.source import Count, Patient, PowerSum, Tally

watts = st.floats(0, 1e4)
step = st.floats(1e-3, 10)


def tally(raw: float = 0.0, turn: float | None = None, limit: float = 1000.0) -> Tally:
    return Tally("x", raw, 0.0, limit=limit, turn=turn, notes=[])


@given(st.lists(st.tuples(step, watts), min_size=2, max_size=20))
def test_trapezoid_equals_the_exact_integral_of_a_polyline(
    points: list[tuple[float, float]],
) -> None:
    """Against the closed form: the area under straight lines between the samples."""
    total, t = PowerSum(gap=100, hold=1), 0.0
    area, before = 0.0, None
    for dt, w in points:
        if before is not None:
            t += dt
            area += dt * (before + w) / 2
        total.add(t, w)
        before = w
    count = total.count(t)
    assert count is not None and count.joules == pytest.approx(area)


@given(st.lists(watts, min_size=5, max_size=60), st.integers(2, 7))
def test_the_sampling_error_covers_coarser_sampling(levels: list[float], every: int) -> None:
    """A slowly changing power, seen at each and at every k-th point: the areas differ less
    than the sum of the half-widths, which is what the worst case may take."""
    fine, coarse = PowerSum(1e9, 1), PowerSum(1e9, 1)
    smooth = sorted(levels)  # monotone: what lies between two samples lies between their levels
    keep = [k for k in range(len(smooth)) if k % every == 0]
    for k in keep:
        coarse.add(float(k), smooth[k])
    for k in range(keep[-1] + 1):
        fine.add(float(k), smooth[k])
    a, b = fine.count(float(keep[-1])), coarse.count(float(keep[-1]))
    assert a is not None and b is not None
    worst = sum(0.5 * (smooth[j] - smooth[i]) * every for i, j in itertools.pairwise(keep))
    assert abs(a.joules - b.joules) <= worst + 1e-6
    assert b.variance <= worst**2 + 1e-6
    assert b.variance == pytest.approx(
        sum((0.5 * (smooth[j] - smooth[i]) * every) ** 2 for i, j in itertools.pairwise(keep))
    )


def test_steady_power_has_no_sampling_error_unless_unseen_for_long() -> None:
    p = PowerSum(gap=2, hold=1)
    p.add(0, 100)
    p.add(1, 100)
    assert p.count(1) == Count(100.0, variance=0.0, watts=100)
    p.add(11, 100)
    count = p.count(11)
    assert count is not None and count.joules == pytest.approx(1100)
    assert count.variance**0.5 == pytest.approx(500) and p.gaps == 1


def test_the_last_sample_holds_for_a_while_and_counts_never_fall() -> None:
    p = PowerSum(gap=9, hold=2)
    assert p.count(0) is None
    p.add(0, 100)
    held = p.count(2)
    assert held is not None and held.joules == pytest.approx(200)
    assert p.count(2.1) is None
    p.add(2, 0)  # it had fallen meanwhile: 100 J
    later = p.count(2)
    assert later is not None and later.joules == pytest.approx(200)
    p.add(0.5, 1e9)  # a clock that goes back adds nothing
    assert p.count(2) == later


def test_an_interruption_begins_another_epoch() -> None:
    p = PowerSum(gap=9, hold=2)
    p.interrupt()
    p.add(0, 10)
    first = p.count(0)
    p.interrupt()
    assert p.count(0) is None
    p.add(5, 10)
    again = p.count(5)
    assert first is not None and again is not None
    assert again.epoch == first.epoch + 1 and again.joules == first.joules == 0


raws = st.lists(
    st.tuples(st.floats(0, 100), st.floats(0, 1e6)), min_size=1, max_size=30
)  # time passed, the counter then


@given(raws, st.none() | st.just(1e6))
def test_whatever_the_counter_says_joules_never_fall(
    values: list[tuple[float, float]], turn: float | None
) -> None:
    t, now = tally(turn=turn), 0.0
    last = Count(0.0)
    for dt, raw in values:
        now += dt
        count = t.add(raw, now)
        assert count.joules >= last.joules and count.missing >= last.missing
        assert count.joules - last.joules <= 1000 * dt + 50 + 1e-6
        last = count


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0, 100)), min_size=1), st.floats(0, 2e3))
def test_wraps_are_undone(moves: list[tuple[float, float]], start: float) -> None:
    """At up to 100 W, a counter that turns over at 2 kJ gives the true joules."""
    t, now, true = tally(start, turn=2e3), 0.0, 0.0
    for dt, w in moves:
        now, true = now + dt, true + w * dt
        count = t.add((start + true) % 2e3, now)
    assert count.joules == pytest.approx(true, abs=1e-6)


def test_a_call_that_hangs_is_left_behind_and_comes_back() -> None:
    p, gate = Patient("driver", 0.05), threading.Event()
    assert p.call(lambda: 7) == 7
    with pytest.raises(TimeoutError, match="driver does not answer"):
        p.call(gate.wait)
    begin = time.perf_counter()
    with pytest.raises(TimeoutError):  # at once: nothing is queued behind the hung call
        p.call(lambda: 8, 60)
    assert time.perf_counter() - begin < 30
    gate.set()
    for _ in range(500):
        try:
            assert p.call(lambda: 9) == 9
            break
        except TimeoutError:
            time.sleep(0.01)
    else:
        pytest.fail("the driver never came back")
    p.close()
    p.close()


def test_errors_of_the_call_pass_through() -> None:
    def fail() -> None:
        raise KeyError("x")

    p = Patient("driver", 5)
    with pytest.raises(KeyError):
        p.call(fail)
    assert p.call(lambda: 1) == 1


def test_its_thread_ends_with_it() -> None:
    p = Patient("ends-with-it", 5)
    (worker,) = p.call(
        lambda: [t for t in threading.enumerate() if t.name == "joulesmith-ends-with-it"]
    )
    del p
    gc.collect()
    worker.join(10)
    assert not worker.is_alive()


@pytest.mark.parametrize("rests", [False, True])
def test_standing_still_widens_unless_it_may_rest(rests: bool) -> None:
    t = Tally("x", 0.0, 0.0, limit=1000, rests=rests, notes=(notes := []))
    t.add(100.0, 1.0)
    for k in range(1, 31):  # three seconds, at ten looks a second
        count = t.add(100.0, 1.0 + k / 10)
    assert (count.missing > 300, bool(notes)) == (not rests, not rests)
    assert count.joules == 100.0 and count.missing <= 600 + 1e-6
