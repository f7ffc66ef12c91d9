"""Several model files on one engine, measured in turn, so that ratios can be trusted.

Each round runs every model once, in an order that rotates, and ratios are taken
within rounds (see `paired`). Knows sessions and readings, not how the models came about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from joulesmith.energy.reading import Reading
from joulesmith.engines.base import Bench
from joulesmith.paired import PairedRatio, paired_ratio, rotated
from joulesmith.progress import Tick, silent

Phase = Literal["prefill", "decode", "workload"]
PHASES: tuple[Phase, ...] = ("prefill", "decode", "workload")


@dataclass(frozen=True)
class Cost:
    """Medians over rounds, per token: joules (None: unknown), 90 % interval, seconds."""

    joules: float | None
    low: float | None
    high: float | None
    marginal: float | None
    pedigree: str | None
    seconds: float


def flatten(bench: Bench) -> dict[str, Any]:
    """A bench as plain values: what a resumed run needs of it."""

    def one(reading: Reading, tokens: int) -> dict[str, Any]:
        return {
            "tokens": tokens,
            "joules": reading.joules,
            "low": reading.low,
            "high": reading.high,
            "marginal": reading.marginal,
            "pedigree": reading.pedigree,
            "seconds": reading.seconds,
        }

    return {
        "prefill": one(bench.prefill, bench.prefill_tokens),
        "decode": one(bench.decode, bench.decode_tokens),
        "peak_rss": bench.peak_rss,
    }


def rounds(
    runners: Mapping[str, Callable[[int], Bench]],
    count: int,
    done: Sequence[Mapping[str, Any]] = (),
    keep: Callable[[list[dict[str, Any]]], object] = lambda _: None,
    progress: Tick = silent,
) -> list[dict[str, Any]]:
    """``count`` interleaved rounds; returns one mapping name -> `flatten`ed bench a round.

    runners: name -> function of the round's seed. done: rounds of an interrupted run.
    keep: called with all rounds after each, to store them.
    """
    found = [dict(r) for r in done][:count]
    names = list(runners)
    for i in range(len(found), count):
        row: dict[str, Any] = {}
        for j, name in enumerate(rotated(names, i)):
            row[name] = flatten(runners[name](i))
            progress((i * len(names) + j + 1) / (count * len(names)))
        found.append(row)
        keep(found)
    return found


def _per_token(row: Mapping[str, Any], phase: Phase, key: str) -> float | None:
    parts = [row["prefill"], row["decode"]] if phase == "workload" else [row[phase]]
    values = [p[key] for p in parts]
    if any(v is None for v in values):
        return None
    tokens = sum(int(p["tokens"]) for p in parts)
    return float(sum(values)) / tokens


def cost(found: Sequence[Mapping[str, Any]], name: str, phase: Phase) -> Cost:
    """The median cost per token of one model over all rounds."""

    def mid(key: str) -> float | None:
        values = [_per_token(r[name], phase, key) for r in found]
        known = [v for v in values if v is not None]
        return float(median(known)) if len(known) == len(values) and known else None

    seconds = mid("seconds")
    assert seconds is not None
    pedigree = found[0][name]["decode" if phase == "workload" else phase]["pedigree"]
    return Cost(mid("joules"), mid("low"), mid("high"), mid("marginal"), pedigree, seconds)


def ratio(
    found: Sequence[Mapping[str, Any]], ours: str, other: str, phase: Phase, seed: int = 0
) -> PairedRatio:
    """Median over rounds of other / ours, with a 95 % bootstrap interval of the median."""
    unit: Literal["joules", "seconds"] = "joules"
    pairs = [(_per_token(r[other], phase, unit), _per_token(r[ours], phase, unit)) for r in found]
    if any(a is None or b is None for a, b in pairs):
        unit = "seconds"
        pairs = [
            (_per_token(r[other], phase, unit), _per_token(r[ours], phase, unit)) for r in found
        ]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    return paired_ratio([a for a, _ in known], [b for _, b in known], unit, seed)
