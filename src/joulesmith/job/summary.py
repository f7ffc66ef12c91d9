"""Put one run's figures into a `Result`. Computes medians and ratios; measures nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from joulesmith.engines.compare import PHASES, Cost, cost, ratio
from joulesmith.quality import Quality
from joulesmith.report.result import (
    Emission,
    Energy,
    FrontPoint,
    Prediction,
    QualityFigures,
    Ratio,
    Run,
)
from joulesmith.units import si

Rounds = Sequence[Mapping[str, Any]]


def energy(c: Cost) -> Energy:
    """A cost per token as the result stores it."""
    return Energy(
        joules=c.joules,
        low=c.low,
        high=c.high,
        marginal=c.marginal,
        pedigree=c.pedigree,  # type: ignore[arg-type]
        seconds=c.seconds,
    )


def quality_figures(q: Quality) -> QualityFigures:
    """Quality as the result stores it."""
    return QualityFigures(
        kept=q.kept,
        kept_low=q.kept_low,
        perplexity=q.perplexity,
        reference_perplexity=q.reference_perplexity,
        kl=q.kl,
        top1=q.top1,
        tokens=q.tokens,
        text=q.text,
    )


def make_run(
    name: str,
    kind: str,
    found: Rounds,
    *,
    engine: str,
    keep: float,
    quality: Quality | None,
    file: str | None = None,
    file_bytes: int | None = None,
    bits: float | None = None,
    note: str = "",
) -> Run:
    """One model's medians over all rounds in which it ran."""
    mine = [r for r in found if name in r]
    memory = [r[name]["peak_rss"] for r in mine if r[name]["peak_rss"] is not None]
    return Run(
        name=name,
        kind=kind,  # type: ignore[arg-type]
        engine=engine,
        file=file,
        file_bytes=file_bytes,
        bits_per_weight=bits,
        prefill=energy(cost(mine, name, "prefill")),
        decode=energy(cost(mine, name, "decode")),
        workload=energy(cost(mine, name, "workload")),
        peak_rss=max(memory) if memory else None,
        quality=quality_figures(quality) if quality else None,
        passes=quality.passes(keep) if quality else None,
        note=note,
    )


def make_ratios(found: Rounds, ours: str, others: Sequence[str], seed: int) -> list[Ratio]:
    """Ratios of every other run to ours, phase by phase."""
    out = []
    for other in others:
        mine = [r for r in found if other in r and ours in r]
        for phase in PHASES:
            p = ratio(mine, ours, other, phase, seed)
            out.append(
                Ratio(
                    baseline=other,
                    phase=phase,
                    ratio=p.ratio,
                    low=p.low,
                    high=p.high,
                    pairs=p.pairs,
                    spread=p.spread,
                )
            )
    return out


def drift(before: Mapping[str, float], untouched: Run) -> dict[str, float]:
    """Joules of the untouched model now / before, by phase: the machine's drift."""
    out: dict[str, float] = {}
    for phase in PHASES:
        measured = getattr(untouched, phase).joules
        if measured is not None and before[phase] > 0:
            out[phase] = measured / before[phase]
    return out


def predictions(
    predicted: Mapping[str, float], plan: Run, drift: Mapping[str, float]
) -> list[Prediction]:
    """Predicted against measured joules per token of the plan, by phase.

    drift: factor by which the machine's own speed changed since the table was measured.
    """
    out = []
    for phase in PHASES:
        measured = getattr(plan, phase).joules
        if measured is not None:
            guess = predicted[phase] * drift.get(phase, 1.0)
            out.append(Prediction(phase=phase, predicted=guess, measured=measured))
    return out


def emissions(runs: Sequence[Run], grid: Any, price: Any) -> list[Emission]:
    """Carbon and money of a million tokens of the workload, on one grid at one price."""
    from joulesmith.energy.carbon import cost as money
    from joulesmith.energy.carbon import emission

    out = []
    for run in runs:
        joules = run.workload.joules
        total = None if joules is None else joules * 1e6
        out.append(
            Emission(
                name=run.name,
                grid=grid.code,
                gco2e_per_kwh=grid.gco2e_per_kwh,
                gco2e=None if total is None else emission(total, grid),
                price_per_kwh=price.price_per_kwh,
                currency=price.currency,
                cost=None if total is None else money(total, price),
                source=f"{grid.source}; {price.source}",
            )
        )
    return out


def best_baseline(runs: Sequence[Run]) -> Run:
    """The baseline that spends least on the workload (time where joules are unknown)."""
    baselines = [r for r in runs if r.kind == "baseline"]
    return min(baselines, key=lambda r: r.workload.joules or r.workload.seconds)


def verdict(plan: Run, headline: Ratio | None, keep: float, status: str) -> str:
    """The run in one sentence."""
    quality = plan.quality
    kept = f"{quality.kept:.2%} of the quality (at least {quality.kept_low:.2%})" if quality else ""
    if status == "none":
        return (
            f"No plan keeps {keep:.2%} of the quality: the nearest one keeps {kept}; "
            "nothing was exported."
        )
    if headline is None:
        return f"The plan keeps {kept}."
    joules = si(plan.workload.joules, "J")
    surely = (
        ""
        if headline.low > 1
        else " (the interval includes 1: no saving is shown)"
        if headline.high >= 1
        else " (it costs more)"
    )
    return (
        f"{headline.ratio:.2f}x fewer joules per token than {headline.baseline} "
        f"({headline.low:.2f} to {headline.high:.2f}){surely}, at {joules} per token, "
        f"keeping {kept}."
    )


def front_points(
    predicted: Sequence[tuple[float, float]],
    references: Sequence[tuple[str, float, Quality | None]],
    runs: Sequence[Run],
) -> list[FrontPoint]:
    """Predicted front (joules, kept), reference types (name, joules, quality), measured runs."""
    out = [
        FrontPoint(
            name="predicted front",
            kind="front",
            joules_per_token=j,
            kept=k,
            kept_low=None,
            measured=False,
        )
        for j, k in predicted
    ]
    measured = {r.name for r in runs}
    for name, joules, q in references:
        if name not in measured and q is not None:
            out.append(
                FrontPoint(
                    name=name,
                    kind="uniform",
                    joules_per_token=joules,
                    kept=q.kept,
                    kept_low=q.kept_low,
                    measured=False,
                    kl=q.kl,
                )
            )
    for run in runs:
        if run.kind in ("plan", "uniform", "baseline", "given") and run.quality is not None:
            if run.workload.joules is None:
                continue
            out.append(
                FrontPoint(
                    name=run.name,
                    kind=run.kind,  # type: ignore[arg-type]
                    joules_per_token=run.workload.joules,
                    kept=run.quality.kept,
                    kept_low=run.quality.kept_low,
                    measured=True,
                    kl=run.quality.kl,
                )
            )
    return out


def loss_per_damage(trials: Sequence[tuple[float, Quality]]) -> float:
    """Measured NLL increase per unit of predicted damage, over the plans that were run."""
    damage = sum(d for d, _ in trials)
    return max(0.0, sum(-math.log(q.kept) for _, q in trials)) / damage if damage > 0 else 1.0
