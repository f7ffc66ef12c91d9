"""What training choices cost to the same quality, in joules: optimizers, precision, data, zeros and
distillation, on small Llamas of bytes.

    python benchmarks/training.py --text tinyshakespeare.txt
        [--only optimizers precision data sparse distil]
        [--device auto|cpu|cuda] [--steps 300] [--seeds 0 1 2] --out DIR

Each part writes DIR/training-PART.json and a table to standard output. Losses are nats a byte on
the last tenth of the text, which is never trained on. Ratios compare runs of one device and call.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from joulesmith.energy.meter import EnergyMeter
from joulesmith.train import data
from joulesmith.train.distil import Distil
from joulesmith.train.loop import Trained, train
from joulesmith.train.recover_settings import DistilSettings
from joulesmith.train.scores import HeldOut, scores
from joulesmith.train.settings import TrainSettings
from joulesmith.train.sparse import SparseTraining
from joulesmith.train.sparse_settings import SparseSettings
from joulesmith.train.teacher import cache_top

LENGTH = 256
GRIDS = {
    "sgd": (0.3, 1.0, 3.0),
    "momentum": (0.03, 0.1, 0.3),
    "adamw": (3e-3, 6e-3, 1.2e-2),
    "adafactor": (3e-2, 1e-1, 3e-1),
    "muon": (0.02, 0.05, 0.1),
}
DISTIL_GRIDS = {"adamw": (2e-3, 4e-3, 8e-3, 1.6e-2), "muon": (0.02, 0.04, 0.08)}
"""The first is the teacher's."""
HARD = DistilSettings(hard=1, soft=0)


class Bench:
    """One device, one text, one meter."""

    def __init__(self, a: argparse.Namespace, meter: EnergyMeter) -> None:
        self.a, self.meter = a, meter
        self.device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if a.device == "auto" else a.device
        )
        raw = np.frombuffer(Path(a.text).read_bytes(), np.uint8).astype(np.int32)
        cut = len(raw) * 9 // 10
        windows = raw[: len(raw) // LENGTH * LENGTH].reshape(-1, LENGTH)
        train = windows[: cut // LENGTH]
        if a.windows:
            train = train[:: max(1, len(train) // a.windows)][: a.windows]
        self.windows = np.ascontiguousarray(train)
        held = windows[cut // LENGTH :]
        self.held = np.ascontiguousarray(held[:: max(1, len(held) // a.held)][: a.held])
        self.seeds, self.steps = a.seeds, a.steps

    def model(self, width: int, layers: int, seed: int) -> LlamaForCausalLM:
        """Of bytes; heads of 32 channels."""
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=256, hidden_size=width, intermediate_size=width * 8 // 3 // 8 * 8,
            num_hidden_layers=layers, num_attention_heads=width // 32,
            num_key_value_heads=width // 32, max_position_embeddings=LENGTH,
            tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return LlamaForCausalLM(config).to(self.device)

    def settings(self, steps: int, seed: int, **given: Any) -> TrainSettings:
        """Of a run."""
        usual = {
            "batch": self.a.batch, "micro": self.a.batch, "optimizer": "adamw", "rate": 3e-3,
            "precision": self.a.precision, "every": max(1, steps // 15), "seed": seed,
        }  # fmt: skip
        return TrainSettings(steps=steps, **{**usual, **given})

    def run(
        self, module: Any, s: TrainSettings, windows: Any = None, objective: Any = None,
        hook: Any = None,
    ) -> Trained:  # fmt: skip
        """Trained from where it is."""
        return train(
            module, self.windows if windows is None else windows, objective or Distil(HARD), s,
            judge=HeldOut(self.held), meter=self.meter, hook=hook,
        )  # fmt: skip


def joules_to(curve: Sequence[tuple[float | None, float]], target: float) -> float | None:
    """Joules at which the held-out loss first is ``target``, between two points by a line."""
    before: tuple[float, float] | None = None
    for j, x in curve:
        if j is None:
            return None
        if x <= target:
            if before is None or before[1] == x:
                return j
            share = (before[1] - target) / (before[1] - x)
            return before[0] + share * (j - before[0])
        before = (j, x)
    return None


def told(values: Sequence[float | None], digits: int = 3) -> str:
    """Median (least to most); "not reached" where one is missing."""
    if any(v is None or not math.isfinite(v) for v in values):
        return f"not reached by {sum(v is None for v in values)} of {len(values)}"
    found = sorted(float(v) for v in values if v is not None)
    middle = float(np.median(found))
    return f"{middle:.{digits}g} ({found[0]:.{digits}g}-{found[-1]:.{digits}g})"


def tried(b: Bench, run: Callable[[float, int], Trained], grid: Sequence[float]) -> Any:
    """The best rate of a grid on the first seed, and the runs of all seeds at it."""
    first: dict[float, Trained] = {}
    for rate in grid:
        try:
            first[rate] = run(rate, b.seeds[0])
        except Exception as e:  # a rate at which it diverges
            print(f"  rate {rate:g}: {e}", file=sys.stderr)
    best = min(first, key=lambda r: min(x for _, x in first[r].curve))
    return best, [first[best], *(run(best, seed) for seed in b.seeds[1:])]


def optimizers(b: Bench) -> dict[str, Any]:
    """Joules to the same held-out loss, each at its best rate of a grid; precision, recomputing."""
    runs, rows = {}, []
    for name, grid in GRIDS.items():

        def run(rate: float, seed: int, name: str = name) -> Trained:
            s = b.settings(b.steps, seed, optimizer=name, rate=rate)
            return b.run(b.model(b.a.width, b.a.layers, seed), s)

        rate, runs[name] = tried(b, run, grid)
        ends = [min(x for _, x in r.curve) for r in runs[name]]
        print(f"{name}: rate {rate:g}, loss {told(ends, 4)}", file=sys.stderr)
        rows.append({"optimizer": name, "rate": rate, "losses": ends})
    target = max(min(x for _, x in r.curve) for r in runs["adamw"]) + 0.02
    base = np.median([joules_to(r.curve, target) or math.nan for r in runs["adamw"]])
    print(f"\njoules to a held-out loss of {target:.3f}, {b.a.words}")
    for row in rows:
        found = runs[row["optimizer"]]
        spent = [joules_to(r.curve, target) for r in found]
        row |= {
            "joules": spent, "state_bytes": found[0].optimizer_bytes,
            "joules_per_step": [None if r.joules is None else r.joules / r.steps for r in found],
            "pedigree": found[0].pedigree, "curves": [r.curve for r in found],
        }  # fmt: skip
        ratio = [None if j is None else j / base for j in spent]
        print(
            f"| {row['optimizer']} | {row['rate']:g} | {told(spent)} | {told(ratio)} | "
            f"{told(row['losses'], 4)} | {row['state_bytes'] / 1e6:.1f} MB |"
        )
    return {"target": target, "rows": rows}


def precision(b: Bench) -> dict[str, Any]:
    """Joules a token of float32 and bfloat16, with and without recomputing, in turns; loss after a
    quarter of the steps."""
    rows: dict[tuple[str, bool], list[Trained]] = {}
    peaks: dict[tuple[str, bool], int | None] = {}
    for seed in b.seeds:
        for how in (("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True)):
            if b.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            s = b.settings(max(20, b.steps // 4), seed, precision=how[0], recompute=how[1])
            rows.setdefault(how, []).append(b.run(b.model(b.a.width, b.a.layers, seed), s))
            peaks[how] = torch.cuda.max_memory_allocated() if b.device.type == "cuda" else None
    out = []
    print(f"\njoules a token, {b.a.words}")
    for how, found in rows.items():
        tokens = found[0].steps * b.a.batch * (LENGTH - 1)
        joules = [None if r.joules is None else r.joules / tokens for r in found]
        first = rows["float32", False]
        ratio = [
            None if r.joules is None or f.joules is None else r.joules / f.joules
            for r, f in zip(found, first, strict=True)
        ]
        losses = [r.curve[-1][1] for r in found]
        out.append(
            {
                "precision": how[0], "recompute": how[1], "peak_bytes": peaks[how],
                "joules_per_token": joules, "ratio": ratio, "losses": losses,
                "pedigree": found[0].pedigree,
            }
        )  # fmt: skip
        print(f"| {how[0]} | {how[1]} | {told(joules)} | {told(ratio)} | {told(losses, 4)} |")
    return {"rows": out}


def data_choices(b: Bench) -> dict[str, Any]:
    """Joules to the same loss: all windows, half of them by score, short windows first, and a text
    half of which is repeats, with and without them."""
    reference = b.model(b.a.width, b.a.layers, 99)
    b.run(reference, b.settings(max(20, b.steps // 3), 99))
    found = scores(reference, b.windows)
    hard = scores(reference, b.windows, "gradient")
    rng = np.random.default_rng(0)
    half = b.windows[np.sort(rng.permutation(len(b.windows))[: len(b.windows) // 2])]
    few = half[: max(8, len(half) // 8)]
    doubled = np.concatenate([half, *[few] * 24])
    kept = doubled[data.without_repeats(doubled, 0.5)]
    choices = {
        "all windows": (b.windows, {}),
        "middle half by loss": (b.windows[data.by_score(found, 0.5, "middle")], {}),
        "high half by loss": (b.windows[data.by_score(found, 0.5, "high")], {}),
        "high half by gradient": (b.windows[data.by_score(hard, 0.5, "high")], {}),
        "a random half": (half, {}),
        "short windows first": (b.windows, {"start_length": 32}),
        "half, an eighth of it 25 times": (doubled, {}),
        "the same, repeats left out": (kept, {}),
    }
    runs = {
        name: [
            b.run(b.model(b.a.width, b.a.layers, seed), b.settings(b.steps, seed, **more), windows)
            for seed in b.seeds
        ]
        for name, (windows, more) in choices.items()
    }
    target = max(min(x for _, x in r.curve) for r in runs["all windows"]) + 0.02
    base = np.median([joules_to(r.curve, target) or math.nan for r in runs["all windows"]])
    rows = []
    print(f"\njoules to a held-out loss of {target:.3f}, {b.a.words}")
    for name, some in runs.items():
        spent = [joules_to(r.curve, target) for r in some]
        ends = [min(x for _, x in r.curve) for r in some]
        ratio = [None if j is None else j / base for j in spent]
        rows.append(
            {
                "data": name, "windows": len(choices[name][0]), "joules": spent, "losses": ends,
                "pedigree": some[0].pedigree, "curves": [r.curve for r in some],
            }
        )  # fmt: skip
        print(f"| {name} | {len(choices[name][0])} | {told(ratio)} | {told(ends, 4)} |")
    return {"target": target, "rows": rows}


def sparse(b: Bench) -> dict[str, Any]:
    """80 % zeros at the same training FLOPs (counted as in Evci et al. 2020, appendix H: a dense
    step is 3 units, RigL's mask update takes a dense gradient)."""
    share, until = 0.8, 0.75
    steps = b.steps
    change = max(5, steps // 20)
    # mean of 1 - S (1 - (1 - t)^3) over the schedule, then 1 - S
    gradual = until * (1 - share * 0.75) + (1 - until) * (1 - share)
    budget = 3 * steps * gradual
    rigl = (3 * (1 - share) * change + 2 * (1 - share) + 1) / (change + 1)
    counts = {
        "magnitude": steps,
        "rigl": round(budget / rigl),
        "set": round(budget / (3 * (1 - share))),
        "static": round(budget / (3 * (1 - share))),
    }
    rows = []
    print(f"\n80 % zeros at equal FLOPs ({budget / 3 / steps:.2f} of dense a step), {b.a.words}")

    def one(name: str, count: int, rate: float, seed: int) -> tuple[Trained, float]:
        module = b.model(b.a.width, b.a.layers, seed)
        s = b.settings(count, seed, rate=rate)
        method = name.partition(",")[0]
        if method == "dense":
            return b.run(module, s), 0.0
        hook = SparseTraining(
            module,
            SparseSettings(
                method=method, sparsity=share, layers=("*.layers.*",), seed=seed,
                **({} if method == "static" else {"every": change}),
            ),
            s,
        )  # fmt: skip
        return b.run(module, s, hook=hook), hook.sparsity

    every = {
        "dense, as many steps": steps, "dense, equal FLOPs": round(budget / 3), **counts,
        "rigl, as many steps": steps,
    }  # fmt: skip
    every = {n: c for n, c in every.items() if not b.a.methods or n.startswith(tuple(b.a.methods))}
    dense_bytes = 0
    for name, count in every.items():
        zeros: list[float] = []

        def run(rate: float, seed: int, name: str = name, count: int = count) -> Trained:
            r, z = one(name, count, rate, seed)
            zeros.append(z)  # noqa: B023
            return r

        rate, found = tried(b, run, (3e-3, 6e-3))
        ends = [r.curve[-1][1] for r in found]
        dense_bytes = dense_bytes or found[0].optimizer_bytes
        size = found[0].optimizer_bytes / dense_bytes
        rows.append(
            {
                "method": name, "steps": count, "rate": rate, "losses": ends, "zeros": zeros[-1],
                "state": size, "joules": [r.joules for r in found], "pedigree": found[0].pedigree,
            }
        )  # fmt: skip
        print(f"| {name} | {count} | {rate:g} | {told(ends, 4)} | {zeros[-1]:.3f} | {size:.3f} |")
    return {"share": share, "change": change, "rows": rows}


def distil(b: Bench) -> dict[str, Any]:
    """A student of a quarter of the parameters: from the teacher, and by the text alone, at equal
    joules. The teacher's pass over the text counts; its own training, which is there, does not.
    Rates are chosen on the first seed, by runs of a quarter of the length."""
    optimizer, rates = b.a.optimizer, DISTIL_GRIDS[b.a.optimizer]
    teacher = b.model(2 * b.a.width, b.a.layers, 7)
    size = sum(p.numel() for p in teacher.parameters())
    asked = b.settings(b.a.teacher_steps or 2 * b.steps, 7, rate=rates[0], optimizer=optimizer)
    big = b.run(teacher, asked)
    teacher.requires_grad_(False)
    print(f"\nteacher of {size:,}: {big.curve[-1][1]:.4f}, {b.a.words}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        with b.meter.window("teacher") as window:
            cache = cache_top(teacher, b.windows, 32, Path(folder) / "top")
        extra = window.reading.joules or math.nan
        shares = DistilSettings(hard=b.a.hard, soft=1 - b.a.hard)
        objective = Distil(shares, cache=cache)

        def one(rate: float, seed: int, steps: int, objective: Distil | None) -> Trained:
            s = b.settings(steps, seed, rate=rate, optimizer=optimizer)
            return b.run(b.model(b.a.width, b.a.layers, seed), s, objective=objective)

        def hard(rate: float, seed: int, steps: int) -> Trained:
            return one(rate, seed, steps, None)

        def soft(rate: float, seed: int, steps: int) -> Trained:
            return one(rate, seed, steps, objective)

        def best(run: Callable[[float, int, int], Trained]) -> float:
            short = {r: run(r, b.seeds[0], b.steps // 4) for r in rates}
            return min(short, key=lambda r: short[r].curve[-1][1])

        rate, hard_rate = best(soft), best(hard)
        print(f"rates {rate:g}, {hard_rate:g}; the teacher's pass {extra:.4g} J", flush=True)
        taught = [soft(rate, seed, b.steps) for seed in b.seeds]
        # as many joules as the distilled ones took: by their own price of a step, which this
        # comparison's runs in between may have had in other company
        trial = hard(hard_rate, b.seeds[0], b.steps // 4)
        per_step = (trial.joules or math.nan) / trial.steps
        spent = [(r.joules or math.nan) + extra for r in taught]
        count = round(float(np.median(spent)) / per_step)
        alone = [hard(hard_rate, seed, count) for seed in b.seeds]
    rows = []
    for name, found, more in (
        ("distilled", taught, extra), ("text alone, equal joules", alone, 0.0),
    ):  # fmt: skip
        ends = [min(x for _, x in r.curve) for r in found]
        joules = [None if r.joules is None else r.joules + more for r in found]
        rows.append(
            {
                "how": name, "steps": found[0].steps, "joules": joules, "losses": ends,
                "last": [r.curve[-1][1] for r in found], "pedigree": found[0].pedigree,
                "curves": [r.curve for r in found],
            }
        )  # fmt: skip
        print(f"| {name} | {found[0].steps} | {told(joules)} J | {told(ends, 4)} |", flush=True)
    small = sum(p.numel() for p in b.model(b.a.width, b.a.layers, 0).parameters())
    return {
        "teacher": big.curve[-1][1], "parameters": [size, small], "rates": [rate, hard_rate],
        "asking_joules": extra, "hard": b.a.hard, "rows": rows,
    }  # fmt: skip


PARTS = {
    "optimizers": optimizers,
    "precision": precision,
    "data": data_choices,
    "sparse": sparse,
    "distil": distil,
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--text", required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--device", default="auto")
    p.add_argument("--precision", default="bfloat16")
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--optimizer", choices=DISTIL_GRIDS, default="adamw", help="of distil")
    p.add_argument("--hard", type=float, default=0.1, help="share of the text's loss in distil")
    p.add_argument("--windows", type=int, default=0, help="to train on at most; 0: all")
    p.add_argument("--teacher-steps", type=int, default=0, help="0: twice the student's")
    p.add_argument("--methods", nargs="+", help="of sparse: those whose names begin so")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--width", type=int, default=192)
    p.add_argument("--layers", type=int, default=6)
    p.add_argument("--held", type=int, default=64)
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    a.words = f"{name}, {len(a.seeds)} seeds, width {a.width}, {a.layers} layers, batch {a.batch}"
    with EnergyMeter() as meter:
        b = Bench(a, meter)
        b.run(b.model(a.width, a.layers, 0), b.settings(5, 0))  # warm
        for part in a.only:
            begun = time.time()
            found = PARTS[part](b)
            found |= {
                "device": a.words, "seconds": time.time() - begun, "command": sys.argv,
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }  # fmt: skip
            (a.out / f"training-{part}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
