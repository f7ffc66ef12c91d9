"""A smaller dense model at 20 % fewer parameters: plain rules, and ours; quality and joules.

    python benchmarks/structured.py --subject stories260K --stories DIR --work DIR
    python benchmarks/structured.py --subject smollm2 --calib FILE --eval FILE --work DIR

The share is of all parameters, a tied head counted once. Nothing is trained. Judged as KL to the
dense model and as perplexity, float32 in torch, on text that nothing was fitted on. stories260K
is calibrated and judged on its own samples, with different seeds. ``--joules`` measures decode
in llama.cpp, dense and shrunk in turn. What is done is kept in ``--work``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import slicegpt
import torch

from joulesmith import models, text
from joulesmith.atomic import atomic_path
from joulesmith.compress.prune.structured import Shrink

LENGTH = 256
METHODS: dict[str, dict[str, Any]] = {
    "neurons by magnitude": {"parameters": 0.8, "by": "magnitude", "repair": False},
    "neurons by Taylor": {"parameters": 0.8, "by": "taylor", "repair": False},
    "layers by block influence (ShortGPT)": {
        "parameters": 0.8,
        "by": "block-influence",
        "repair": False,
    },
    "width by one rotation (SliceGPT's idea)": {"rotate": True, "repair": False},
    "width, a rotation a norm (SliceGPT)": {"slicegpt": True},
    "ours, neurons alone": {"alone": "neurons"},
    "ours, layers alone": {"alone": "layers"},
    "ours": {"parameters": 0.8},
    "ours, not repaired": {"like": "ours", "repair": False},
}


def widest(model: models.Model, share: float, multiple: int) -> int:
    """The largest width, in steps, whose rotated model has that share of the parameters."""
    from dataclasses import replace

    from joulesmith.compress.prune.shrink import count, possible, shape_of

    now = shape_of(model)
    fits = [
        w
        for w in range(multiple, now.hidden + 1, multiple)
        if possible(model, shape := replace(now, hidden=w, tied=False))
        and count(model, shape) <= share * model.parameters
    ]
    return max(fits)


def alone(model: models.Model, share: float, part: str, multiple: int) -> int:
    """How many of one kind of part are left where it alone is cut."""
    from dataclasses import replace

    from joulesmith.compress.prune.shapes import neurons_for
    from joulesmith.compress.prune.shrink import Shape, count, shape_of

    def parameters(shape: Shape) -> int:
        return count(model, shape)

    now, budget = shape_of(model), int(share * model.parameters)
    if part == "neurons":
        found = neurons_for(now, budget, parameters, multiple)
        assert found is not None
        return found.neurons
    return max(n for n in range(1, now.layers) if parameters(replace(now, layers=n)) <= budget)


def log_probabilities(model: models.Model, windows: np.ndarray) -> torch.Tensor:
    """(tokens, vocab) float16 of all but the last position."""
    found = []
    with torch.no_grad():
        for part in torch.from_numpy(windows).long().split(2):
            logits = model.module(part).logits[:, :-1].flatten(0, 1).float()
            found.append(logits.log_softmax(-1).clamp_min(-6e4).half())
    return torch.cat(found)


def judge(model: models.Model, windows: np.ndarray, dense: torch.Tensor) -> dict[str, float]:
    """KL to the dense model and perplexity."""
    kl = nll = 0.0
    at = 0
    with torch.no_grad():
        for part in torch.from_numpy(windows).long().split(2):
            q = model.module(part).logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
            p = dense[at : at + len(q)].float()
            kl += float((p.exp() * (p - q)).sum())
            nll -= float(q.gather(1, part[:, 1:].reshape(-1, 1)).sum())
            at += len(q)
    return {"kl": kl / at, "ppl": math.exp(nll / at)}


def settings(
    method: str, model: models.Model, args: argparse.Namespace, done: dict[str, Any], seed: int
) -> dict[str, Any]:
    """The step's settings of a method."""
    given = dict(METHODS[method], multiple=args.multiple, seed=seed)
    if given.pop("like", None):
        given |= done[f"ours/{seed}"]["shape"]
    if part := given.pop("alone", None):
        given[part] = alone(model, 0.8, part, args.multiple)
    if given.get("rotate"):
        # widths must be multiples of the number of heads as well: few are multiples of 32 too
        given |= {"multiple": 2, "width": widest(model, 0.8, 2)}
    elif method == "ours":
        given["trials"] = args.trials
    return given


def sliced(
    model: models.Model, windows: np.ndarray, judged: np.ndarray, dense: torch.Tensor, start: float
) -> dict[str, Any]:
    """SliceGPT's row; its residual matrices count among the parameters."""
    whole, config = model.parameters, model.module.config
    width = slicegpt.widest(model, int(0.8 * whole))
    left = slicegpt.parameters(model, width)
    slicegpt.slice_(model, windows, width)
    return {
        "left": left / whole,
        "read": (left - config.vocab_size * width) / whole,
        "seconds": time.perf_counter() - start,
        **judge(model, judged, dense),
        "words": f"width {width} of {config.hidden_size}, and {2 * config.num_hidden_layers} "
        "matrices on the residual; no engine loads it",
        "notes": [],
    }


def joules(args: argparse.Namespace, load: Any, shrunk: Path) -> list[dict[str, Any]]:
    """Decode in llama.cpp, dense and shrunk in turn, as each type of file."""
    from joulesmith.engines import get_engine
    from joulesmith.engines.compare import cost, ratio, rounds
    from joulesmith.engines.llama_quantize import LlamaQuantizer
    from joulesmith.export.gguf import extra_entries, float_entry, write_gguf

    engine, packer, out = get_engine("llama.cpp"), LlamaQuantizer(), []

    def write(model: models.Model, path: Path, kind: str) -> None:
        entries = []
        for name, ref in model.tensors.items():
            if kind == "Q8_0" and ref.is_matrix and ref.shape[1] % 32 == 0:
                view = models.gguf_view(model, name)
                entries.append((name, kind, ref.shape, lambda v=view: packer.pack(v.numpy(), kind)))
            else:
                entries.append(float_entry(model, name, "F16" if kind == "Q8_0" else kind))
        write_gguf(path, model.metadata, entries + extra_entries(model))

    for kind in args.types:
        paths = {}
        for name, model in (("dense", load()), ("shrunk", models.load(shrunk))):
            paths[name] = args.work / f"{args.subject}-{name}-{kind}.gguf"
            write(model, paths[name], kind)
        with (
            engine.load(paths["dense"], context=512, threads=args.threads) as a,
            engine.load(paths["shrunk"], context=512, threads=args.threads) as b,
        ):
            runners = {
                "dense": lambda i, s=a: s.bench(32, 128, seed=i),
                "shrunk": lambda i, s=b: s.bench(32, 128, seed=i),
            }
            found = rounds(runners, args.rounds)
        r = ratio(found, "dense", "shrunk", "decode")
        out.append(
            {
                "type": kind,
                "bytes": {n: p.stat().st_size for n, p in paths.items()},
                "joules": {n: cost(found, n, "decode").joules for n in paths},
                "seconds": {n: cost(found, n, "decode").seconds for n in paths},
                "ratio": [r.ratio, r.low, r.high],
                "unit": r.of,
            }
        )
        for path in paths.values():
            path.unlink()
    return out


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--subject", choices=("stories260K", "smollm2"), required=True)
    parser.add_argument("--stories", type=Path)
    parser.add_argument("--calib")
    parser.add_argument("--eval")
    parser.add_argument("--calibration", type=int, default=128, help="windows of 256 tokens")
    parser.add_argument("--evaluation", type=int, default=48, help="windows of 256 tokens")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--multiple", type=int)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--saved", nargs="*", default=["ours"], help="first of these is measured")
    parser.add_argument("--joules", action="store_true")
    parser.add_argument("--types", nargs="*", default=["Q8_0", "F16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/structured.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.subject == "stories260K":
        if not args.stories:
            parser.error("stories260K needs --stories")
        args.multiple = args.multiple or 4

        def load() -> models.Model:
            return models.load(args.stories / "stories260K.bin")

        first = load()

        def calibration(seed: int) -> np.ndarray:
            return text.self_samples(first, args.calibration, LENGTH, seed).tokens

        judged = text.self_samples(first, args.evaluation, LENGTH, 1_000_003).tokens
        source = "its own samples, other seeds than in calibration"
    else:
        if not args.calib or not args.eval:
            parser.error("smollm2 needs --calib and --eval")
        args.multiple = args.multiple or 32

        def load() -> models.Model:
            return models.load("smollm2")

        first = load()

        def cut(ref: str, count: int, seed: int) -> np.ndarray:
            return text.windows(first, text.read(ref), LENGTH, {"c": count}, seed)["c"].tokens

        def calibration(seed: int) -> np.ndarray:
            return cut(args.calib, args.calibration, seed)

        judged = cut(args.eval, args.evaluation, 0)
        source = f"{Path(args.eval).name}, calibrated on {Path(args.calib).name}"
    path = args.work / f"{args.subject}-{args.calibration}-{args.evaluation}.json"
    done: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def keep() -> None:
        with atomic_path(path) as temp:
            temp.write_text(json.dumps(done))
        lines = _table(first, done, args, source)
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text("\n".join(lines) + "\n")

    dense = log_probabilities(first, judged)
    done["dense/0"] = {"left": 1.0, **judge(first, judged, dense), "seconds": 0.0, "notes": []}
    for seed in args.seeds:
        windows = calibration(seed)
        for method in args.methods:
            key = f"{method}/{seed}"
            if key in done:
                continue
            model, start = load(), time.perf_counter()
            if METHODS[method].get("slicegpt"):
                done[key] = sliced(model, windows, judged, dense, start)
                print(f"{key}: {done[key]}", flush=True)
                keep()
                continue
            found = Shrink(**settings(method, model, args, done, seed)).shrink(model, windows)
            seconds = time.perf_counter() - start
            after = found.after
            dropped = [i for i in range(found.before.layers) if i not in found.layers]
            done[key] = {
                "left": found.parameters[1] / found.parameters[0],
                "read": found.read[1] / found.read[0],
                **judge(model, judged, dense),
                "seconds": seconds,
                "words": after.words(),
                "notes": list(found.notes()),
                "shape": {
                    "neurons": after.neurons,
                    "kv_heads": after.kv,
                    "queries": after.queries,
                    "drop": dropped,
                },
            }
            print(f"{key}: {done[key]}", flush=True)
            for t in found.trials:
                print(f"    {t.shape.words()}: {t.parameters}, {t.damage:.4f}", flush=True)
            folder = args.work / f"{args.subject}-ours-{seed}"
            if method in args.saved and not folder.exists():
                models.save(model, folder)
            keep()
    if args.joules and "joules" not in done:
        done["joules"] = joules(args, load, args.work / f"{args.subject}-ours-{args.seeds[0]}")
    keep()
    print(args.out.read_text())


def _table(
    model: models.Model, done: dict[str, Any], args: argparse.Namespace, source: str
) -> list[str]:
    words = [f"--subject {args.subject}"]
    if args.subject == "stories260K":
        words.append("--stories DIR")
    else:
        words.append(f"--calib {Path(args.calib).name} --eval {Path(args.eval).name}")
    words.append(f"--calibration {args.calibration} --evaluation {args.evaluation}")
    words.append(f"--seeds {' '.join(map(str, args.seeds))} --trials {args.trials}")
    words += ["--joules"] if args.joules else []
    lines = [
        f"# 20 % fewer parameters, nothing trained: {model.origin} ({date.today()})",
        "",
        f"`python benchmarks/structured.py {' '.join(words)} --work DIR`",
        "",
        f"Judged on {args.evaluation} windows of {LENGTH} tokens of {source}; {args.calibration} "
        f"windows of calibration. Left: share of all {model.parameters} parameters; read: share of "
        "those that a decoded token reads. Mean over calibration seeds, with least and most. "
        f"Seconds on {args.threads} thread(s) of a shared machine (load {os.getloadavg()[1]:.0f}): "
        "no measure of speed.",
        "",
        "| method | seeds | left | read | KL (nats a token) | perplexity | seconds | shape |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in ["dense", *METHODS]:
        found = [v for k, v in done.items() if k.rpartition("/")[0] == method]
        if not found:
            continue
        kl, ppl = [f["kl"] for f in found], [f["ppl"] for f in found]
        seconds = sum(f["seconds"] for f in found) / len(found)
        lines.append(
            f"| {method} | {len(found)} | {found[0]['left']:.3f} | {found[0].get('read', 1):.3f} "
            f"| {sum(kl) / len(kl):.4f} ({min(kl):.4f}–{max(kl):.4f}) "
            f"| {sum(ppl) / len(ppl):.2f} ({min(ppl):.2f}–{max(ppl):.2f}) "
            f"| {seconds:.0f} | {found[0].get('words', '')} |"
        )
    if "joules" in done:
        lines += [
            "",
            f"Decode in llama.cpp, 32 tokens of prompt, 128 of answer, {args.threads} thread(s), "
            f"{args.rounds} interleaved rounds; joules per token as the meter has them (modelled "
            "where there are no counters), ratio shrunk / dense with its 95 % interval.",
            "",
            "| file | dense, MB | shrunk, MB | dense mJ | shrunk mJ | ratio | of |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in done["joules"]:
            mj = [
                "–" if v is None else f"{1000 * v:.2f}"
                for v in (row["joules"]["dense"], row["joules"]["shrunk"])
            ]
            r = row["ratio"]
            lines.append(
                f"| {row['type']} | {row['bytes']['dense'] / 1e6:.2f} "
                f"| {row['bytes']['shrunk'] / 1e6:.2f} | {mj[0]} | {mj[1]} "
                f"| {r[0]:.3f} ({r[1]:.3f}–{r[2]:.3f}) | {row['unit']} |"
            )
    return lines


if __name__ == "__main__":
    main()
