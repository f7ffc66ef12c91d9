"""Low rank at 20 % fewer parameters: plain SVD, SVD-LLM's whitening, and ours.

    python benchmarks/low_rank.py --stories stories260K.bin --work DIR
    python benchmarks/low_rank.py --smollm2 --calib FILE --eval FILE --work DIR

One model a run. The share is of the numbers in the linear layers of the blocks, as SVD-LLM
counts; the whole model's share stands beside it. Judged as perplexity of the float32 model
in torch on text that nothing was fitted on, for calibration seeds 0, 1, 2. stories260K knows
only its own stories: it is calibrated and judged on text that it wrote itself, with different
seeds. What is done is kept in ``--work`` and not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from joulesmith import models, text
from joulesmith.atomic import atomic_path
from joulesmith.compress.lowrank.factors import stored
from joulesmith.compress.lowrank.ranks import Curve, choose_ranks
from joulesmith.compress.lowrank.step import LowRank
from joulesmith.compress.lowrank.walk import factorable

SHARE = 0.8
SEEDS = (0, 1, 2)
OURS: dict[str, dict[str, Any]] = {
    "ours, plain factors": {"pivoted": False},
    "ours, uniform ranks": {"uniform": True},
    "ours, input metric": {"metric": "inputs"},
    "ours, diagonal Fisher": {"metric": "diagonal"},
    "ours, not refitted": {"refit": False},
    "ours": {},
}
ALWAYS = ("dense", "plain SVD", "SVD-LLM (whitening)", "SVD-LLM (whitening), pivoted", "ours")


def perplexity(model: models.Model, windows: np.ndarray) -> float:
    """exp of the mean NLL over windows (n, length), each from an empty context."""
    total, count = 0.0, 0
    with torch.no_grad():
        for part in torch.from_numpy(windows).long().split(2):
            logits = model.module(part).logits[:, :-1].float()
            nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())
            total, count = total + float(nll) * part[:, 1:].numel(), count + part[:, 1:].numel()
    return math.exp(total / count)


def svd_llm(model: models.Model, windows: np.ndarray, *, pivoted: bool) -> float:
    """Truncation-aware whitening by the paper (Wang et al. 2024, algorithm 1), in place.

    Its own code, from its own sums of ``x x^T`` over all tokens, dense inputs, Cholesky,
    one share for all layers. pivoted: the rank that our form of the factors affords. Returns
    the share of the numbers that is left.
    """
    left = 0
    shapes = factorable(model)
    grams: dict[str, torch.Tensor] = {}
    handles = []
    for name in shapes:

        def hook(_: Any, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            x = args[0].flatten(0, -2)
            grams[name] = grams.get(name, 0) + x.T @ x

        handles.append(model.module.get_submodule(name).register_forward_pre_hook(hook))
    with torch.no_grad():
        for part in torch.from_numpy(windows).long().split(2):
            model.module.model(part)
        for handle in handles:
            handle.remove()
        for name, (rows, columns) in shapes.items():
            gram = grams.pop(name).double()
            ridge = 1e-8 * float(gram.diagonal().mean())
            while True:
                eye = torch.eye(columns, dtype=torch.float64)
                s, info = torch.linalg.cholesky_ex(gram + ridge * eye)
                if int(info) == 0:
                    break
                ridge *= 10
            weight = model.module.get_submodule(name).weight
            u, sigma, vh = torch.linalg.svd(weight.double() @ s, full_matrices=False)
            curve = {name: Curve(rows, columns, sigma.square().numpy())}
            budget = int(SHARE * rows * columns)
            rank = choose_ranks(curve, parameters=budget, uniform=True, pivoted=pivoted)[name]
            left += stored(rows, columns, rank, pivoted=pivoted)
            right = torch.linalg.solve_triangular(s, vh[:rank], upper=False, left=False)
            weight.copy_(((u[:, :rank] * sigma[:rank]) @ right).float())
    return left / sum(r * c for r, c in shapes.values())


def compress(method: str, model: models.Model, windows: np.ndarray, seed: int) -> float:
    """Change the model in place; returns the share of the blocks' numbers that is left."""
    if method == "dense":
        return 1.0
    if method.startswith("SVD-LLM"):
        return svd_llm(model, windows, pivoted="pivoted" in method)
    plain = {"metric": "none", "uniform": True, "pivoted": False, "refit": False}
    given = plain if method == "plain SVD" else OURS[method]
    step = LowRank(parameters=SHARE, kept=False, seed=seed, **given)
    note = step.apply(model, windows).notes[0]
    return float(note.split(" hold ")[1].split()[0])


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stories", type=Path)
    parser.add_argument("--smollm2", action="store_true")
    parser.add_argument("--calib")
    parser.add_argument("--eval")
    parser.add_argument("--tokens", type=int, default=16384, help="of each text")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--name", default="low_rank")
    args = parser.parse_args()
    if bool(args.stories) == args.smollm2:
        parser.error("give --stories FILE or --smollm2")
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stories:
        length = 256
        load: Callable[[], models.Model] = lambda: models.load(args.stories)  # noqa: E731
        first = load()

        def calibration(seed: int) -> np.ndarray:
            return text.self_samples(first, args.tokens // length, length, seed).tokens

        judged, source = calibration(1000), "its own samples, other seeds"
    else:
        if not args.calib or not args.eval:
            parser.error("--smollm2 needs --calib and --eval")
        length = 512
        load = lambda: models.load("smollm2")  # noqa: E731
        first = load()

        def cut(ref: str, seed: int) -> np.ndarray:
            counts = {"all": args.tokens // length}
            return text.windows(first, text.read(ref), length, counts, seed)["all"].tokens

        def calibration(seed: int) -> np.ndarray:
            return cut(args.calib, seed)

        judged = cut(args.eval, 0)
        source = f"{Path(args.eval).name}, calibrated on {Path(args.calib).name}"
    methods = [*ALWAYS[:-1], *(OURS if args.ablations else ("ours",))]
    path = args.work / f"{'stories' if args.stories else 'smollm2'}-{args.tokens}.json"
    done: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for seed in args.seeds:
        windows = calibration(seed)
        for method in methods:
            fixed = method in ("dense", "plain SVD")
            key = f"{method}/{0 if fixed else seed}"
            if key in done:
                continue
            model, start = load(), time.perf_counter()
            left = compress(method, model, windows, seed)
            seconds = time.perf_counter() - start
            done[key] = {"left": left, "ppl": perplexity(model, judged), "seconds": seconds}
            print(f"{key}: {done[key]}", flush=True)
            with atomic_path(path) as temp:
                temp.write_text(json.dumps(done))
    known = [m for m in [*ALWAYS[:-1], *OURS] if any(k.startswith(f"{m}/") for k in done)]
    lines = _table(first, done, known, args, source, int(judged.size))
    print("\n".join(lines))
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / f"{args.name}.md").write_text("\n".join(lines) + "\n")


def _table(
    model: models.Model,
    done: dict[str, Any],
    methods: list[str],
    args: argparse.Namespace,
    source: str,
    tokens: int,
) -> list[str]:
    blocks = sum(r * c for r, c in factorable(model).values())
    chosen = f"--stories {args.stories.name}" if args.stories else (
        f"--smollm2 --calib {Path(args.calib).name} --eval {Path(args.eval).name}"
    )  # fmt: skip
    flags = " --ablations" if args.ablations else ""
    load = os.getloadavg()[1]
    lines = [
        f"# Low rank at 20 % fewer parameters: {model.origin} ({date.today()})",
        "",
        f"`python benchmarks/low_rank.py {chosen} --tokens {args.tokens}{flags} --work DIR "
        f"--name {args.name}`",
        "",
        f"Perplexity on {tokens} tokens of {source}; {args.tokens} calibration tokens. Left: share "
        f"of the {blocks} numbers in the blocks' linear layers, and of all {model.parameters}. "
        f"Mean over calibration seeds with the least and the most. "
        f"Seconds on one thread, shared machine (load {load:.0f}): no measure of speed.",
        "",
        "| method | seeds | left of blocks | of model | perplexity | least–most | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        found = [v for k, v in done.items() if k.rpartition("/")[0] == method]
        ppl = [f["ppl"] for f in found]
        left = sum(f["left"] for f in found) / len(found)
        whole = 1 - (1 - left) * blocks / model.parameters
        seconds = sum(f["seconds"] for f in found) / len(found)
        lines.append(
            f"| {method} | {len(found)} | {left:.3f} | {whole:.3f} | {sum(ppl) / len(ppl):.3f} "
            f"| {min(ppl):.3f}–{max(ppl):.3f} | {seconds:.0f} |"
        )
    return lines


if __name__ == "__main__":
    main()
