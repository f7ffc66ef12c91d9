"""Fits the constants of `joulesmith.estimate.training.utilisation` and `power_model`.

Utilisation: a linear model of log MFU with Gaussian priors. Each row counts with what its family
(a paper's models, or a code base's) has in common: the family's effect is part of the noise, so
that ten rows of one table do not count as ten runs. Generations' factors shrink towards 1. The
widths of families' and generations' effects, the noise and the half size maximise the marginal
likelihood on a coarse grid. Everything here is done again without the rows that are predicted.

Power: two constants by least squares of log watts, on a grid, with priors: five systems are few.
``estimate_training.py`` beside this file calls both and tells their errors.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from joulesmith.estimate.answer import Figure
from joulesmith.estimate.devices import Device, find
from joulesmith.estimate.training import power_model
from joulesmith.estimate.training import utilisation as mfu

Array = NDArray[np.float64]
HERE = Path(__file__).parent
LLAMA3 = {"llama3", "llama3.1", "llama3.2"}
"""Families of one project, which "merged" leaves out together."""

# log of: base, size^exponent (the exponent itself), ten times the devices, mixture, whole run, fp8
PRIOR_MEAN = np.array([math.log(0.45), 1.0, -0.05, -0.15, -0.15, 0.2])
PRIOR_SD = np.array([0.3, 0.5, 0.05, 0.2, 0.15, 0.15])
# exponent: a factor of two either way around 0.2, at which 0.4 of the peak draws 83 % of what a GPU
# may. host: 0.3; 8 H100 with 1200 W of host (Boavizta, EcoLogits) have 0.21, with 2800 W at the
# most that was measured (arXiv:2412.08602) 0.5
POWER_PRIOR, POWER_PRIOR_SD, POWER_NOISE = (0.2, 0.3), (0.7, 0.4), 0.2
HALF_SIZES = (1e7, 3e7, 1e8, 3e8)
FAMILY_SDS, GENERATION_SDS, NOISE_SDS = (0.2, 0.25, 0.3, 0.35, 0.4), (0.1, 0.2), (0.08, 0.12, 0.18)


@dataclass(frozen=True)
class Run:
    """A published run or throughput. active, tokens: plain counts, tokens None where only a rate is
    known. hours: of devices. inside: of the CSV that is predicted."""

    model: str
    family: str
    device: Device
    active: float
    tokens: float | None
    devices: float
    hours: float | None
    mfu: float
    mixture: bool
    steady: bool
    precision: str
    inside: bool

    @property
    def flops(self) -> float:
        return 6 * self.active * (self.tokens or 0)

    @property
    def peak(self) -> float:
        return mfu.peak_of(self.device, self.precision)

    def features(self, half_size: float) -> list[float]:
        size = math.log(mfu.size_factor(self.active, self.peak, half_size))
        tens = math.log10(self.devices / mfu.REFERENCE_DEVICES)
        fp8 = mfu.gains_fp8(self.device, self.precision)
        return [1, size, tens, float(self.mixture), float(not self.steady), float(fp8)]

    def predicted_hours(self, share: float) -> float:
        return self.flops / (self.peak * 3600 * share)


def number(cell: str) -> float | None:
    return float(cell) if cell else None


def device(name: str) -> Device:
    return find(name.replace("-", " "))


def _run(  # one row of either table
    r: dict[str, str], name: str, hours: float | None, count: float | None, inside: bool
) -> Run:
    active = (number(r.get("active_b", "") or r.get("active_params_b", "")) or 0) * 1e9
    total = float(r["params_b"]) * 1e9
    tokens = number(r["tokens_b"])
    at, precision = device(name), r.get("precision") or "bf16"
    run = Run(
        model=r["model"], family=r["family"], device=at, active=active or total,
        tokens=None if tokens is None else tokens * 1e9, devices=count or 1.0, hours=hours, mfu=0.0,
        mixture=0 < active < total, steady=r.get("basis") == "steady", precision=precision,
        inside=inside,
    )  # fmt: skip
    if count is None:
        run = replace(run, devices=mfu.usual_devices(run.flops, run.peak))
    if hours is not None:
        share = run.predicted_hours(1) / hours
    elif rate := number(r.get("tokens_s_device", "")):
        share = 6 * run.active * rate / run.peak
    else:
        share = float(r["mfu"])
    return replace(run, mfu=share)


def inside_runs(path: Path) -> list[Run]:
    """Rows of the CSV that have hours and sizes."""
    with path.open(encoding="utf-8", newline="") as f:
        table = [r for r in csv.DictReader(f) if r["params_b"] and r["accel_hours"]]
    return [
        _run(r, r["accelerator"], float(r["accel_hours"]), number(r["n_accel"]), True)
        for r in table
    ]


def outside_runs(path: Path = HERE / "training_runs.csv") -> list[Run]:
    """Published figures besides."""
    with path.open(encoding="utf-8", newline="") as f:
        table = list(csv.DictReader(f))
    return [
        _run(r, r["device"], number(r["device_hours"]), number(r["devices"]), False) for r in table
    ]


# ---- utilisation


@dataclass(frozen=True)
class Hyper:
    """Standard deviations of log MFU between families, between generations and of what is left;
    the half size."""

    half_size: float
    family: float
    generation: float
    noise: float


def fit(runs: Sequence[Run], calibrate: bool = True) -> mfu.Coefficients:
    """Coefficients from ``runs``. calibrate: widen the spread until 90 % intervals around the
    medians of families left out of ``runs`` cover 90 % of their rows; never narrow it."""
    hyper = max(
        (Hyper(*h) for h in itertools.product(HALF_SIZES, FAMILY_SDS, GENERATION_SDS, NOISE_SDS)),
        key=lambda h: _posterior(runs, h)[0],
    )
    found = _coefficients(runs, hyper)
    if not calibrate:
        return found
    scores = []
    for family in {r.family for r in runs}:
        rest = _coefficients([r for r in runs if r.family != family], hyper)
        for r in runs:
            if r.family == family:
                median, spread = centre(rest, r)
                scores.append(abs(math.log(r.mfu / median)) / spread)
    widen = max(1.0, float(np.quantile(scores, 0.9)) / mfu.Z90)
    return replace(found, spread=found.spread * widen, unseen=found.unseen * widen)


def centre(c: mfu.Coefficients, r: Run) -> tuple[float, float]:
    return mfu.centre(
        r.device, r.active, r.devices, precision=r.precision, mixture=r.mixture, steady=r.steady,
        coefficients=c,
    )  # fmt: skip


def predict(c: mfu.Coefficients, r: Run) -> Figure:
    return mfu.predict(
        r.device, r.active, r.devices, precision=r.precision, mixture=r.mixture, steady=r.steady,
        coefficients=c,
    )  # fmt: skip


def _posterior(runs: Sequence[Run], h: Hyper) -> tuple[float, Array, Array, list[str], Array]:
    """Log marginal likelihood; mean and covariance of the parameters, fixed ones first, then one a
    generation; the generations; the design matrix."""
    names = sorted({r.device.generation for r in runs})
    onto = [[float(r.device.generation == g) for g in names] for r in runs]
    X = np.hstack([np.array([r.features(h.half_size) for r in runs]), np.array(onto)])
    mean = np.concatenate([PRIOR_MEAN, np.zeros(len(names))])
    cov = np.diag(np.concatenate([PRIOR_SD, np.full(len(names), h.generation)]) ** 2)
    families = np.array([r.family for r in runs])
    noise = h.family**2 * (families[:, None] == families) + h.noise**2 * np.eye(len(runs))
    residual = np.log([r.mfu for r in runs]) - X @ mean
    K = X @ cov @ X.T + noise
    gain = np.linalg.solve(K, X @ cov).T
    likelihood = -0.5 * (residual @ np.linalg.solve(K, residual) + np.linalg.slogdet(K)[1])
    return float(likelihood), mean + gain @ residual, cov - gain @ X @ cov, names, X


def _coefficients(runs: Sequence[Run], h: Hyper) -> mfu.Coefficients:
    _, mean, cov, names, X = _posterior(runs, h)
    own = h.family**2 + h.noise**2
    seen = own + float(np.mean(np.einsum("ij,jk,ik->i", X, cov, X)))
    fixed = X[:, : len(PRIOR_MEAN)]
    other = np.einsum("ij,jk,ik->i", fixed, cov[: fixed.shape[1], : fixed.shape[1]], fixed)
    unseen = own + h.generation**2 + float(np.mean(other))
    factors = [math.exp(m) for m in mean]
    return mfu.Coefficients(
        base=factors[0],
        half_size=h.half_size,
        exponent=max(0.0, float(mean[1])),
        devices=min(1.0, factors[2]),
        mixture=factors[3],
        run=min(1.0, factors[4]),
        fp8=factors[5],
        spread=math.sqrt(seen),
        unseen=math.sqrt(max(unseen, seen)),
        generations=dict(zip(names, factors[len(PRIOR_MEAN) :], strict=True)),
    )


# ---- power


@dataclass(frozen=True)
class Measured:
    """Average watts of a system, a device. told: its TDP is published; where it is not, watts have
    no scale, and the row is a check but no part of the fit."""

    system: str
    device: Device
    mfu: float
    watts: float
    told: bool = True


def measured(runs: Iterable[Run], path: Path) -> list[Measured]:
    """Rows of the CSV whose power was measured, and those of training_power.csv."""
    by_name = {r.model: r for r in runs}
    with path.open(encoding="utf-8", newline="") as f:
        found = [
            Measured(r["model"], by_name[r["model"]].device, by_name[r["model"]].mfu,
                     float(r["power_w_per_accel"]))
            for r in csv.DictReader(f)
            if r["model"] in by_name and r["power_basis"].startswith("measured")
        ]  # fmt: skip
    with (HERE / "training_power.csv").open(encoding="utf-8", newline="") as f:
        return found + [
            Measured(r["system"], device(r["device"]), float(r["mfu"]), float(r["watts"]),
                     told=r["tdp"] == "published")
            for r in csv.DictReader(f)
        ]  # fmt: skip


def fit_power(rows: Sequence[Measured]) -> tuple[float, float]:
    """Exponent of power and the host's share."""
    grid = itertools.product(np.arange(0.02, 0.61, 0.02), np.arange(0.1, 0.91, 0.02))

    def loss(pair: tuple[float, float]) -> float:
        errors = [
            math.log(system_watts(r.device, r.mfu, *map(float, pair)) / r.watts)
            for r in rows
            if r.told
        ]
        priors = zip(pair, POWER_PRIOR, POWER_PRIOR_SD, strict=True)
        return float(np.sum(np.square(errors))) / POWER_NOISE**2 + sum(
            (math.log(x / at) / sd) ** 2 for x, at, sd in priors
        )

    exponent, share = min(grid, key=loss)
    return round(float(exponent), 2), round(float(share), 2)


def system_watts(of: Device, share: float, exponent: float, host: float) -> float:
    d = power_model.draw(of, share, exponent=exponent, host_share=host, factor=1.0)
    return d.device + d.host
