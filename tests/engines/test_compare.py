"""Interleaving and ratios on made-up benches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from joulesmith.energy.reading import Reading
from joulesmith.engines.base import Bench
from joulesmith.engines.compare import cost, ratio, rounds


def bench(seconds: float, joules: float | None) -> Bench:
    def reading(share: float) -> Reading:
        j = None if joules is None else joules * share
        return Reading(
            j, seconds * share, None if j is None else j / 2, None if j is None else j * 2,
            None if j is None else "modelled",
        )  # fmt: skip

    return Bench(10, 20, reading(0.25), reading(0.75), 1000)


def drifting(base: float, log: list[str], name: str, drift: list[float]) -> Callable[[int], Bench]:
    def run(i: int) -> Bench:
        log.append(name)
        return bench(base * drift[i], 10 * base * drift[i])

    return run


def test_ratio_is_untouched_by_drift() -> None:
    log: list[str] = []
    drift = list(np.random.default_rng(0).uniform(1, 3, 7))
    found = rounds(
        {"ours": drifting(1, log, "ours", drift), "theirs": drifting(1.5, log, "theirs", drift)}, 7
    )
    r = ratio(found, "ours", "theirs", "decode")
    assert r.ratio == pytest.approx(1.5) and r.low == pytest.approx(1.5)
    assert r.pairs == 7 and r.of == "joules"
    assert log[:4] == ["ours", "theirs", "theirs", "ours"], "the order rotates"


def test_cost_is_per_token() -> None:
    found = rounds({"a": lambda i: bench(3.0, 30.0)}, 3)
    assert cost(found, "a", "prefill").joules == pytest.approx(30 * 0.25 / 10)
    assert cost(found, "a", "decode").joules == pytest.approx(30 * 0.75 / 20)
    whole = cost(found, "a", "workload")
    assert whole.joules == pytest.approx(1.0) and whole.low == pytest.approx(0.5)
    assert whole.seconds == pytest.approx(0.1) and whole.pedigree == "modelled"


def test_unknown_joules_stay_unknown_and_ratios_fall_back_to_time() -> None:
    found = rounds({"a": lambda i: bench(1.0, None), "b": lambda i: bench(2.0, None)}, 3)
    assert cost(found, "a", "decode").joules is None
    r = ratio(found, "a", "b", "workload")
    assert r.of == "seconds" and r.ratio == pytest.approx(2)


def test_an_interrupted_comparison_goes_on() -> None:
    kept: list[list[dict[str, object]]] = []
    calls: list[int] = []

    def run(i: int) -> Bench:
        calls.append(i)
        return bench(1, 1)

    first = rounds({"a": run}, 2, keep=lambda f: kept.append(list(f)))
    assert [len(k) for k in kept] == [1, 2]
    again = rounds({"a": run}, 4, done=first)
    assert calls == [0, 1, 2, 3] and len(again) == 4


def test_interval_contains_the_median_and_lies_in_the_spread() -> None:
    rng = np.random.default_rng(1)
    noise = list(rng.lognormal(0, 0.1, 9))
    found = [
        {
            "a": {p: {"tokens": 1, "joules": 1.0, "seconds": 1.0} for p in ("prefill", "decode")},
            "b": {p: {"tokens": 1, "joules": n, "seconds": n} for p in ("prefill", "decode")},
        }
        for n in noise
    ]
    r = ratio(found, "a", "b", "decode")
    assert r.spread[0] <= r.low <= r.ratio <= r.high <= r.spread[1]
