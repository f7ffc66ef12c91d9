"""What the page and the terminal both say about a result. Knows no HTML and no colours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from joulesmith.report import figures
from joulesmith.report.result import Energy, Ratio, Result, Run

PHASES: tuple[Literal["decode", "prefill", "workload"], ...] = ("decode", "prefill", "workload")
KINDS = {
    "plan": "the plan",
    "baseline": "baseline",
    "given": "the file given",
    "uniform": "one type throughout",
    "torch": "reference in torch",
    "peer": "another tool",
}


@dataclass(frozen=True)
class Headline:
    """The ratio that the page is about, in words. ``number`` is None when there is none."""

    number: str | None
    claim: str
    """"fewer joules per token than", or what the interval leaves of that."""
    against: str
    """What the baseline is, as it follows its name; empty when its run is unknown."""
    interval: str


def plan_run(result: Result) -> Run | None:
    """The plan's run (the nearest miss where no plan passed)."""
    return result.run("plan")


def baseline_run(result: Result) -> Run | None:
    """The run that the headline compares with: by name, never the plan itself."""
    others = [r for r in result.runs if r.kind != "plan"]
    return next((r for r in others if r.name == result.headline_baseline), None)


def ratio_for(result: Result, phase: str, baseline: str | None = None) -> Ratio | None:
    """The ratio of a phase against ``baseline`` (the headline's by default)."""
    name = result.headline_baseline if baseline is None else baseline
    return next((r for r in result.ratios if r.baseline == name and r.phase == phase), None)


def times(value: float) -> str:
    """``"1.24"``; more digits close to 1, where they decide."""
    return figures.fixed(value, 3 if abs(value - 1) < 0.02 else 2)


def claim(ratio: Ratio) -> str:
    """What a ratio shows: a saving, a loss, or nothing when its interval holds 1."""
    if ratio.low > 1:
        return "fewer joules per token"
    if ratio.high < 1:
        return "more joules per token"
    return "no difference shown"


def headline(result: Result) -> Headline:
    """The headline ratio: the workload's, against the file the user would run today."""
    run = baseline_run(result)
    against = "" if run is None else f", {KINDS[run.kind]}, on {run.engine}"
    ratio = ratio_for(result, "workload")
    if ratio is None or not figures.known(ratio.ratio):
        return Headline(
            None, "Ratio unknown: joules per token could not be compared with", against, ""
        )
    said = claim(ratio)
    if said == "fewer joules per token":
        number, said = ratio.ratio, "fewer joules per token than"
    elif said == "more joules per token":
        number, said = 1 / ratio.ratio, "more joules per token than"
        low, high = 1 / ratio.high, 1 / ratio.low
        ratio = ratio.model_copy(update={"low": low, "high": high})
    else:
        number, said = ratio.ratio, "no difference in joules per token shown against"
    pairs = f"{ratio.pairs} interleaved pair{'' if ratio.pairs == 1 else 's'}"
    text = f"95 % interval {times(ratio.low)} to {times(ratio.high)}, {pairs}"
    return Headline(f"{times(number)}×", said, against, text)


def phase_of(run: Run | None, phase: str) -> Energy | None:
    """One phase's energy of a run, None without the run."""
    if run is None:
        return None
    return {"decode": run.decode, "prefill": run.prefill, "workload": run.workload}[phase]


def kept_share(result: Result) -> tuple[float, float, float] | None:
    """Kept, its lower bound and the floor as places (0..1) on a common scale that ends at 1."""
    run = plan_run(result)
    if run is None or run.quality is None:
        return None
    kept, low = run.quality.kept, run.quality.kept_low
    if not (figures.known(kept) and figures.known(low)):
        return None
    left = min(low, result.keep) - 0.35 * (1 - min(low, result.keep, 0.999))
    span = max(1.0, kept) - left

    def at(x: float) -> float:
        return min(1.0, max(0.0, (x - left) / span))

    return at(kept), at(low), at(result.keep)
