"""Errors of the training estimator on runs whose family was left out, and its constants.

    python benchmarks/estimate_training.py TRAINING.csv [--out FILE.md] [--write]

TRAINING.csv: published runs; columns model, family, params_b, active_params_b, tokens_b,
accelerator, n_accel, accel_hours, wall_days, power_w_per_accel, power_basis, pue,
carbon_intensity_kg_kwh, energy_mwh, tco2e, energy_is_circular. Published figures besides lie in
training_runs.csv and power_model.csv here, with their sources. --write: the constants, fitted to
all of it, to fitted.csv in the package.

"Left out": nothing of the family that is predicted enters the fit, nor the choice of its widths,
nor the calibration of its intervals, which is done on families left out once more.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from fit_training import (
    LLAMA3,
    Measured,
    Run,
    centre,
    device,
    fit,
    fit_power,
    inside_runs,
    measured,
    number,
    outside_runs,
    predict,
    system_watts,
)

from joulesmith.atomic import atomic_path
from joulesmith.estimate.answer import Figure
from joulesmith.estimate.training import power_model
from joulesmith.estimate.training import utilisation as mfu
from joulesmith.estimate.training.constants import FITTED, GENERATION

FIXED = 0.40
PACKAGE = Path(__file__).parents[1] / "src/joulesmith/estimate"


@dataclass(frozen=True)
class Left:
    """A row that was left out, and what was predicted for it."""

    run: Run
    found: Figure
    median: float

    def error(self, share: float) -> float:
        """Relative error of hours."""
        return self.run.mfu / share - 1

    @property
    def covered(self) -> bool:
        return self.found.low <= self.run.mfu <= self.found.high


def leave_out(runs: Sequence[Run], group: Callable[[Run], str], inside: bool = True) -> list[Left]:
    """Every row predicted without its group; ``inside``: only rows of the CSV."""
    left = []
    for name in dict.fromkeys(group(r) for r in runs):
        held = [r for r in runs if group(r) == name and (r.inside or not inside)]
        if held:
            c = fit([r for r in runs if group(r) != name])
            left += [Left(r, predict(c, r), centre(c, r)[0]) for r in held]
    return left


def own(r: Run) -> str:
    return r.family


def merged(r: Run) -> str:
    return "llama3" if r.family in LLAMA3 else r.family


def mape(errors: Sequence[float]) -> float:
    return 100 * float(np.mean(np.abs(errors)))


def summary(name: str, left: Sequence[Left]) -> str:
    point = mape([x.error(x.found.value) for x in left])
    median = mape([x.error(x.median) for x in left])
    fixed = mape([x.error(FIXED) for x in left])
    covered = 100 * np.mean([x.covered for x in left])
    return f"| {name} | {len(left)} | {point:.1f} | {median:.1f} | {fixed:.1f} | {covered:.0f} |"


def hours_tables(runs: Sequence[Run]) -> tuple[list[str], list[Left]]:
    inside, outside = [r for r in runs if r.inside], [r for r in runs if not r.inside]
    alone, together = leave_out(runs, own), leave_out(runs, merged)
    prior = fit(outside)
    without = [Left(r, predict(prior, r), centre(prior, r)[0]) for r in inside]
    ours = fit(inside)
    others = [Left(r, predict(ours, r), centre(ours, r)[0]) for r in outside]
    everyone = leave_out(runs, merged, inside=False)
    best = min((mape([r.mfu / s - 1 for r in inside]), s) for s in np.arange(0.2, 0.6, 0.01))
    lines = [
        "## Hours", "",
        "Mean absolute percentage error of device-hours. Point: what the estimator answers.",
        "Median: of its distribution, which a run exceeds as often as not. Covered: share of",
        "rows, in per cent, inside the 90 % interval.", "",
        f"| left out | rows | point, % | median, % | fixed MFU {FIXED:.2f}, % | covered, % |",
        "|---|---|---|---|---|---|",
        summary("the row's family", alone),
        summary("and Llama 3, 3.1 and 3.2 as one family", together),
        summary("all rows of the CSV: fitted to training_runs.csv alone", without),
        summary("all rows of training_runs.csv: fitted to the CSV alone", others),
        summary("every family in turn, training_runs.csv too", everyone), "",
        f"The best fixed MFU in hindsight, {best[1]:.2f}, has {best[0]:.1f} % on the CSV.", "",
        "| run | MFU | predicted | 90 % interval | error of hours, % | Llama 3 as one, % |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    second = {x.run.model: x for x in together}
    for x in alone:
        f, y = x.found, second[x.run.model]
        lines.append(
            f"| {x.run.model} | {x.run.mfu:.3f} | {f.value:.3f} | {f.low:.3f} to {f.high:.3f} | "
            f"{100 * x.error(f.value):+.0f} | {100 * y.error(y.found.value):+.0f} |"
        )
    return [*lines, ""], alone


def power_table(rows: Sequence[Measured]) -> tuple[list[str], float]:
    """Watts, each system left out of the fit; and the factor of the 90 % interval, from their root
    mean square."""
    lines = ["## Watts", "", "Of a device with its host; each system left out of the constants.",
             "PaLM's never enters: of TPU v4 no TDP is published; 192 W is the most that was seen.",
             "", "| system | device | MFU | measured, W | predicted, W | error, % |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    logs = []
    for i, m in enumerate(rows):
        watts = system_watts(m.device, m.mfu, *fit_power([*rows[:i], *rows[i + 1 :]]))
        logs.append(math.log(watts / m.watts))
        lines.append(
            f"| {m.system} | {m.device.name} | {m.mfu:.3f} | {m.watts:.0f} | {watts:.0f} | "
            f"{100 * (watts / m.watts - 1):+.0f} |"
        )
    spread = math.sqrt(float(np.mean(np.square(logs))))
    error = mape([math.exp(x) - 1 for x in logs])
    lines += ["", f"Mean absolute error {error:.0f} %.", ""]
    return lines, math.exp(mfu.Z90 * spread)


@dataclass(frozen=True)
class Case:
    """A row of LLMCarbon's table: Faiz et al. 2023, arXiv:2309.14393, table 4. theirs: tCO2e that
    LLMCarbon predicts there. efficiency: the hardware efficiency that it is given."""

    run: Run
    days: float
    watts: float
    efficiency: float
    pue: float
    kg_kwh: float
    tco2e: float
    theirs: float

    def answer(self, share: float, watts: float) -> tuple[float, float]:
        """Days and tCO2e."""
        hours = self.run.predicted_hours(share)
        carbon = hours * watts / 1000 * self.pue * self.kg_kwh / 1000
        return hours / 24 / self.run.devices, carbon


PUBLISHED = {  # hardware efficiency, LLMCarbon's own tCO2e
    "T5-11B": (0.37, 45.66), "GPT-3 175B": (0.197, 553.87), "GShard-600B": (0.39, 4.46),
    "Switch-1500B": (0.28, 63.9), "XLM": (0.212, 37.6),
}  # fmt: skip


def cases(runs: Sequence[Run], path: Path) -> list[Case]:
    by_name = {r.model: r for r in runs}
    with path.open(encoding="utf-8", newline="") as f:
        table = {r["model"]: r for r in csv.DictReader(f)}
    found = []
    for name, (efficiency, theirs) in PUBLISHED.items():
        if name == "XLM":  # in their table, not in the CSV
            v100 = device("V100")
            hours = 512 * 20.4 * 24
            run = Run(
                "XLM", "xlm", v100, 0.55e9, 7e12, 512, hours, 0.0, False, False, "fp16", False
            )
            found.append(Case(run, 20.4, 342, efficiency, 1.1, 0.413, 39, theirs))
            continue
        r = table[name]
        days, watts, pue, kg, t = (
            float(r[k]) for k in ("wall_days", "power_w_per_accel", "pue",
                                  "carbon_intensity_kg_kwh", "tco2e")
        )  # fmt: skip
        found.append(Case(by_name[name], days, watts, efficiency, pue, kg, t, theirs))
    return found


def llmcarbon(runs: Sequence[Run], rows: Sequence[Measured], path: Path) -> list[str]:
    """Their table twice: with what they are given, and with nothing but the task."""
    c = fit([r for r in runs if r.family != "patterson"])
    lines = [
        "## LLMCarbon's table", "",
        "Given: with the hardware efficiency and system power that the table lists, as LLMCarbon",
        "is run. Predicted: neither; utilisation without Patterson's family, watts without the",
        "system. PUE and carbon intensity are the site's in both. Their own predictions are of the",
        "paper's table 4 (written from memory; its repository's earlier table has 43.9, 638.8 and",
        "37.18 t for T5, GPT-3 and XLM).", "",
        "| model | days | given | predicted | 90 % interval | tCO2e | LLMCarbon's | given | "
        "predicted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    errors: dict[str, list[float]] = {k: [] for k in ("gd", "pd", "l", "gc", "pc")}
    for x in cases(runs, path):
        f = predict(c, x.run)
        rest = [m for m in rows if m.system != x.run.model]
        watts = system_watts(x.run.device, f.value, *fit_power(rest))
        days, carbon = x.answer(x.efficiency, x.watts)
        free_days, free_carbon = x.answer(f.value, watts)
        slow, fast = x.answer(f.low, watts)[0], x.answer(f.high, watts)[0]
        told = {"gd": days / x.days, "pd": free_days / x.days, "l": x.theirs / x.tco2e,
                "gc": carbon / x.tco2e, "pc": free_carbon / x.tco2e}  # fmt: skip
        for key, ratio in told.items():
            errors[key].append(ratio - 1)
        e = {k: f"{100 * (v - 1):+.0f} %" for k, v in told.items()}
        lines.append(
            f"| {x.run.model} | {x.days:g} | {days:.1f} ({e['gd']}) | "
            f"{free_days:.1f} ({e['pd']}) | "
            f"{fast:.1f} to {slow:.1f} | {x.tco2e:g} | {x.theirs:g} ({e['l']}) | "
            f"{carbon:.1f} ({e['gc']}) | {free_carbon:.1f} ({e['pc']}) |"
        )
    m = {k: f"{mape(v):.1f} %" for k, v in errors.items()}
    lines.append(
        f"| mean absolute error |  | {m['gd']} | {m['pd']} |  |  | {m['l']} | "
        f"{m['gc']} | {m['pc']} |"
    )
    return [*lines, ""]


GPU_MWH = (("OLMo 2 7B", 7.299e9, 4.05e12, 131.0), ("OLMo 2 13B", 13.716e9, 5.6e12, 257.0))
"""Weights, tokens, MWh of the GPUs, measured on a node of H100: arXiv:2501.00656, table 19 (for the
13B, arXiv:2503.05804 has 230)."""


def gpu_energies(runs: Sequence[Run], rows: Sequence[Measured]) -> list[str]:
    """Energy of GPUs alone, from the task; neither the family's hours nor its watts known."""
    c = fit([r for r in runs if r.family != "olmo"])
    h100 = device("H100 SXM 80GB")
    lines = ["GPUs alone, without host and PUE; the family is not in the fit:", "",
             "| run | MWh | predicted | error, % |", "|---|---|---|---|"]  # fmt: skip
    for name, active, tokens, truth in GPU_MWH:
        flops = 6 * active * tokens
        count = mfu.usual_devices(flops, h100.peak("bf16") or math.nan)
        share = mfu.predict(h100, active, count, coefficients=c).value
        hours = flops / ((h100.peak("bf16") or math.nan) * 3600 * share)
        watts = power_model.draw(
            h100, share, exponent=fit_power(rows)[0], host_share=0.0, factor=1.0
        )
        mwh = hours * watts.device / 1e6
        lines.append(f"| {name} | {truth:g} | {mwh:.0f} | {100 * (mwh / truth - 1):+.0f} |")
    return [*lines, ""]


def energies(
    alone: Sequence[Left], rows: Sequence[Measured], factor: float, path: Path
) -> list[str]:
    """MWh of the CSV's runs that were measured: predicted from the task, all of it left out."""
    by_name = {x.run.model: x for x in alone}
    with path.open(encoding="utf-8", newline="") as f:
        table = [r for r in csv.DictReader(f) if r["model"] in by_name
                 and number(r["energy_mwh"]) and r["energy_is_circular"] != "YES"]  # fmt: skip
    lines = ["## Energy", "", "Of the CSV's runs that are not hours x TDP, at the site's PUE:",
             "hours and watts predicted, the family and the system left out.", "",
             "| run | MWh | predicted | 90 % interval | error, % |",
             "|---|---|---|---|---|"]  # fmt: skip
    errors, inside = [], 0
    for r in table:
        x, pue = by_name[r["model"]], float(r["pue"])
        constants = fit_power([m for m in rows if m.system != r["model"]])

        def mwh(share: float, x: Left = x, pue: float = pue,
                constants: tuple[float, float] = constants) -> float:  # fmt: skip
            watts = system_watts(x.run.device, share, *constants)
            return x.run.predicted_hours(share) * watts * pue / 1e6

        truth, value = float(r["energy_mwh"]), mwh(x.found.value)
        up = math.hypot(math.log(mwh(x.found.low) / value), math.log(factor))
        down = math.hypot(math.log(value / mwh(x.found.high)), math.log(factor))
        low, high = value / math.exp(down), value * math.exp(up)
        errors.append(value / truth - 1)
        inside += low <= truth <= high
        lines.append(
            f"| {r['model']} | {truth:g} | {value:.1f} | {low:.1f} to {high:.1f} | "
            f"{100 * errors[-1]:+.0f} |"
        )
    lines += ["", f"Mean absolute error {mape(errors):.0f} %; {inside} of {len(table)} inside.", ""]
    return lines


def constants(
    c: mfu.Coefficients, watts: tuple[float, float], factor: float
) -> list[tuple[str, float, str]]:
    """Name, value and unit of what fitted.csv holds."""
    return [
        ("utilisation", c.base, "share of the 16-bit peak"),
        ("half size", c.half_size, "weights at 312 TFLOP/s"),
        ("exponent of size", c.exponent, ""),
        ("ten times the devices", c.devices, "factor"),
        ("mixture of experts", c.mixture, "factor"),
        ("whole run", c.run, "factor"),
        ("fp8", c.fp8, "factor"),
        ("spread of utilisation", c.spread, "of its logarithm"),
        ("spread of an unseen generation", c.unseen, "of its logarithm"),
        *((GENERATION + g, x, "factor") for g, x in c.generations.items()),
        ("exponent of power", watts[0], ""),
        ("host", watts[1], "share of a device's sustained watts"),
        ("interval of power", factor, "factor either way"),
    ]


def write_constants(found: Sequence[tuple[str, float, str]], path: Path) -> None:
    source = "benchmarks/estimate_training.py"
    with atomic_path(path) as part, part.open("w", encoding="utf-8", newline="") as f:
        table = csv.writer(f, lineterminator="\n")
        table.writerow(["name", "value", "unit", "basis", "source"])
        table.writerows([name, f"{x:.4g}", unit, "fitted", source] for name, x, unit in found)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("table", type=Path)
    p.add_argument("--out", type=Path)
    p.add_argument("--write", action="store_true")
    a = p.parse_args(argv)
    runs = [*inside_runs(a.table), *outside_runs()]
    rows = measured(runs, a.table)
    hours, alone = hours_tables(runs)
    watts, factor = power_table(rows)
    found = constants(fit(runs), fit_power(rows), factor)
    if a.write:
        write_constants(found, PACKAGE / FITTED)
    inside = sum(r.inside for r in runs)
    text = [
        f"# Estimates of training ({datetime.now(timezone.utc).date()})", "",
        f"`python benchmarks/estimate_training.py {a.table.name} --write`", "",
        f"{inside} runs of {a.table.name} and {len(runs) - inside} published figures of",
        "training_runs.csv. See docs/estimate_training.md.", "",
        *hours,
        *llmcarbon(runs, rows, a.table),
        *watts,
        *energies(alone, rows, factor, a.table),
        *gpu_energies(runs, rows),
        "## Constants, fitted to everything", "", "| constant | value | unit |", "|---|---|---|",
        *(f"| {name} | {x:.4g} | {unit} |" for name, x, unit in found),
    ]  # fmt: skip
    report = "\n".join(text) + "\n"
    sys.stdout.write(report)
    if a.out is not None:
        with atomic_path(a.out) as part:
            part.write_text(report, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
