"""What the benchmarks of training share: small Llamas of bytes, a text cut in two, runs metered one
at a time, and how tables tell them. A module, not a script.

On a GPU joules are the board's, by its counter; what the machine's processor drew meanwhile, which
is mostly modelled on rented machines, is left out. Without a GPU they are the machine's.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from joulesmith.energy.meter import EnergyMeter
from joulesmith.energy.reading import Reading
from joulesmith.train.distil import Distil
from joulesmith.train.loop import Trained, train
from joulesmith.train.recover_settings import DistilSettings
from joulesmith.train.scores import HeldOut
from joulesmith.train.settings import TrainSettings

LENGTH = 256
"""Bytes of a window."""
HARD = DistilSettings(hard=1, soft=0)


class Board:
    """A meter of the GPU alone, where there is one."""

    def __init__(self, meter: EnergyMeter) -> None:
        self.meter = meter

    def window(self, name: str) -> _Window:
        """As the meter's."""
        self.meter.readings.clear()
        return _Window(self.meter.window(name))


class _Window:
    def __init__(self, inner: Any) -> None:
        self.inner, self.name = inner, inner.name
        self.reading = Reading(None, 0.0)

    def __enter__(self) -> _Window:
        self.inner.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.inner.__exit__(None, None, None)
        r = self.reading = self.inner.reading
        parts = [p for p in r.parts if p.device.startswith("gpu")]
        if len(parts) == 1:
            p = parts[0]
            self.reading = replace(
                r, joules=p.joules, low=p.low, high=p.high, pedigree=p.pedigree, marginal=None
            )


def llama(
    width: int, layers: int, seed: int, device: torch.device, vocab: int = 256,
    length: int = LENGTH, heads: int = 0, **given: Any,
) -> LlamaForCausalLM:  # fmt: skip
    """Heads of 32 channels unless told; random weights of the seed."""
    torch.manual_seed(seed)
    heads = heads or width // 32
    usual: dict[str, Any] = {
        "intermediate_size": width * 8 // 3 // 8 * 8, "num_key_value_heads": heads,
        "tie_word_embeddings": False,
    }  # fmt: skip
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        max_position_embeddings=length, bos_token_id=0, eos_token_id=0, **{**usual, **given},
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config)


class Lab:
    """One device, one text, one meter."""

    def __init__(self, a: argparse.Namespace, meter: EnergyMeter) -> None:
        self.a, self.meter = a, Board(meter)
        self.device = device_of(a)
        raw = np.frombuffer(Path(a.text).read_bytes(), np.uint8).astype(np.int32)
        windows = raw[: len(raw) // LENGTH * LENGTH].reshape(-1, LENGTH)
        cut = len(windows) * 9 // 10
        self.windows: NDArray[np.int32] = np.ascontiguousarray(windows[:cut])
        held = windows[cut:]
        self.held = np.ascontiguousarray(held[:: max(1, len(held) // a.held)][: a.held])
        self.seeds, self.steps = a.seeds, a.steps

    def model(self, seed: int, width: int = 0, layers: int = 0) -> LlamaForCausalLM:
        """Of bytes."""
        a = self.a
        return llama(width or a.width, layers or a.layers, seed, self.device)

    def settings(self, steps: int, seed: int, **given: Any) -> TrainSettings:
        """Of a run; held-out losses at some fifteen points."""
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


def device_of(a: argparse.Namespace) -> torch.device:
    """As asked for."""
    if a.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(a.device)


def arguments(doc: str, **defaults: Any) -> argparse.ArgumentParser:
    """What all of these scripts take."""
    usual = {
        "steps": 300, "batch": 16, "width": 128, "layers": 4, "held": 64, "precision": "float32",
    }  # fmt: skip
    p = argparse.ArgumentParser(description=doc.splitlines()[0])
    p.add_argument("--text", required=True, help="a file, such as tinyshakespeare's")
    p.add_argument("--out", type=Path, required=True, help="folder of the results")
    p.add_argument("--device", default="auto")
    for name, value in {**usual, **defaults}.items():
        p.add_argument(f"--{name}", type=type(value), default=value)
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    return p


@contextmanager
def lab(a: argparse.Namespace) -> Iterator[Lab]:
    """Ready and warm."""
    a.out.mkdir(parents=True, exist_ok=True)
    with EnergyMeter() as meter:
        found = Lab(a, meter)
        found.run(found.model(0), found.settings(4, 0))
        yield found


def machine(device: torch.device) -> str:
    """In words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}"


def heading(title: str, a: argparse.Namespace, pedigree: str | None) -> list[str]:
    """Of a file of results."""
    words = list(sys.argv[1:])
    for hidden in ("--text", "--out"):
        if hidden in words:
            words[words.index(hidden) + 1] = "TEXT" if hidden == "--text" else "DIR"
    name = Path(sys.argv[0]).name
    what = "the board's, by its counter" if pedigree == "measured" else "the machine's"
    return [
        f"# {title}\n",
        f"{datetime.now(timezone.utc):%Y-%m-%d}, {machine(device_of(a))}. "
        f"`python benchmarks/{name} {' '.join(words)}`\n",
        f"Llamas of bytes, width {a.width}, {a.layers} layers, batch {a.batch} windows of {LENGTH} "
        f"bytes, {a.precision}; text: tinyshakespeare, the last tenth held out. Seeds "
        f"{', '.join(map(str, a.seeds))}: median (least to most). Joules are {what} ({pedigree}); "
        "evaluation is not counted.\n",
    ]


def joules_to(curve: Sequence[tuple[float | None, float]], target: float) -> float | None:
    """Joules at which the held-out loss first is ``target``, between two points by a line."""
    before: tuple[float, float] | None = None
    for j, x in curve:
        if j is None and before is None and x > target:
            before = (0.0, x)  # nothing was spent before the first step
            continue
        if j is None:
            return None
        if x <= target:
            if before is None or before[1] == x:
                return j
            share = (before[1] - target) / (before[1] - x)
            return before[0] + share * (j - before[0])
        before = (j, x)
    return None


def best(run: Trained) -> float:
    """Least held-out loss on its curve."""
    return min(x for _, x in run.curve)


def told(values: Sequence[float | None], digits: int = 3) -> str:
    """Median (least to most); how many are missing, where some are."""
    known = sorted(float(v) for v in values if v is not None and math.isfinite(v))
    if len(known) < len(values):
        return f"not reached by {len(values) - len(known)} of {len(values)}"
    middle = f"{float(np.median(known)):.{digits}g}"
    return middle if len(known) == 1 else f"{middle} ({known[0]:.{digits}g}–{known[-1]:.{digits}g})"


def tried(
    lab: Lab, run: Callable[[float, int], Trained], grid: Sequence[float],
    judge: Callable[[Trained], float] = best,
) -> tuple[float, list[Trained]]:  # fmt: skip
    """The best rate of a grid on the first seed, and the runs of all seeds at it. A rate at which
    it diverges is out."""
    first: dict[float, Trained] = {}
    for rate in grid:
        try:
            first[rate] = run(rate, lab.seeds[0])
        except Exception as e:
            print(f"  rate {rate:g}: {e}", file=sys.stderr, flush=True)
    rate = min(first, key=lambda r: judge(first[r]))
    return rate, [first[rate], *(run(rate, seed) for seed in lab.seeds[1:])]
