"""Joules of a training step where rows of matrices are dead: all products, live ones alone, dense.

    python benchmarks/dead_rows.py [--shares 0.25 0.5 0.75] [--rounds 5] [--out FILE]

A Llama of random weights; in its MLPs a share of the neurons' rows (gate and up) is dead from the
first step on. The three ways take turns; ratios are to the dense model of the same round.
"""

from __future__ import annotations

import argparse
import platform
from datetime import date
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from joulesmith.energy.meter import EnergyMeter
from joulesmith.train import live_rows
from joulesmith.train.distil import Distil
from joulesmith.train.loop import train
from joulesmith.train.recover_settings import DistilSettings
from joulesmith.train.settings import TrainSettings
from joulesmith.train.sparse import SparseTraining
from joulesmith.train.sparse_settings import SparseSettings


def model(width: int, neurons: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=width, intermediate_size=neurons, num_hidden_layers=layers,
            num_attention_heads=width // 64, num_key_value_heads=width // 64,
            max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def told(values: list[float]) -> str:
    """Median (least to most)."""
    return f"{np.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--shares", nargs="+", type=float, default=[0.25, 0.5, 0.75])
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--width", type=int, default=512)
    p.add_argument("--neurons", type=int, default=2048)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results/dead_rows.md")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    windows = np.random.default_rng(0).integers(0, 512, (64, 256)).astype(np.int32)
    s = TrainSettings(steps=a.steps, batch=8, micro=8, rate=1e-3)
    objective = Distil(DistilSettings(hard=1, soft=0))
    usual = live_rows.LEAST
    with EnergyMeter() as meter:

        def step(share: float | None, least: float) -> tuple[float | None, float, list[float]]:
            live_rows.LEAST = least
            module = model(a.width, a.neurons, a.layers)
            hook = None
            if share is not None:
                kind = SparseSettings(
                    method="static", sparsity=share, pattern=f"block:1x{a.width}",
                    start="magnitude", layers=("*.gate_proj", "*.up_proj"),
                )  # fmt: skip
                hook = SparseTraining(module, kind, s)
            found = train(module, windows, objective, s, hook=hook, meter=meter)
            live_rows.LEAST = usual
            joules = None if found.joules is None else found.joules / found.steps
            return joules, found.seconds / found.steps, list(found.losses)

        step(None, usual)  # warm
        rows = []
        for share in a.shares:
            ratios: dict[str, list[float]] = {"all": [], "live": [], "all s": [], "live s": []}
            most = 0.0
            for _ in range(a.rounds):
                dense = step(None, usual)
                whole, live = step(share, 2.0), step(share, 0.0)  # live rows at every share
                most = max(most, *(abs(x - y) for x, y in zip(whole[2], live[2], strict=True)))
                for name, found in (("all", whole), ("live", live)):
                    if found[0] is not None and dense[0] is not None:
                        ratios[name].append(found[0] / dense[0])
                    ratios[f"{name} s"].append(found[1] / dense[1])
            told_of = {k: told(v) if v else "unknown" for k, v in ratios.items()}
            rows.append(
                f"| {share:.0%} | {told_of['all']} | **{told_of['live']}** | {told_of['all s']} | "
                f"{told_of['live s']} | {most:.1e} |"
            )
            print(rows[-1], flush=True)
    mlp = 3 * a.width * a.neurons
    part = 2 * a.width * a.neurons / (mlp + 4 * a.width**2)
    lines = [
        f"# Dead rows left out ({date.today()})",
        "",
        "`python benchmarks/dead_rows.py`",
        "",
        f"{platform.processor() or platform.machine()}, {a.threads} threads, torch "
        f"{torch.__version__}; joules are the machine's, modelled where it has no counters. A "
        f"Llama of width {a.width}, {a.neurons} neurons, {a.layers} layers, float32, AdamW, steps "
        f"of 2,048 tokens; gate and up are {part:.0%} of its blocks' weights. To the dense model "
        f"of the same round, medians of {a.rounds} rounds (least-most).",
        "",
        "| rows dead in gate and up | joules, all products | joules, live rows "
        "| time, all products | time, live rows | largest difference of a loss |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    a.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
