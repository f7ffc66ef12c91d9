"""What rounded inputs and a quantized key-value cache cost in perplexity.

    python benchmarks/activations.py --eval WIKITEXT_TEST --calib WIKITEXT_VALID [--seeds 3]

A model (SmolLM2-135M-Instruct, dequantized from Q4_1, unless --model says another), float32 in
torch, against itself: the same windows of the evaluation text, paired. "samples" instead of a
file is text that the model writes itself, with a seed of its own. Weights of W8A8, W8A8-STATIC
and FP8 are rounded after smoothing as `joulesmith quantize` does it, on calibration windows
drawn by seed; caches need none. The last rows are llama.cpp's own cache types on the F16 file,
against its F16 cache. Each cell is kept in --work as it is done, so that a run can be
interrupted, and shared out with --only.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from joulesmith import text
from joulesmith.compress.quantize.activations import InputQuantizer, Scheme, quantized_inputs
from joulesmith.compress.quantize.grids import grid
from joulesmith.compress.quantize.input_types import (
    SCHEMES,
    module_of,
    static_inputs,
    too_wide,
)
from joulesmith.compress.quantize.kv_cache import KVScheme
from joulesmith.compress.quantize.kv_layers import packed_cache
from joulesmith.compress.quantize.row_walk import walk_rows
from joulesmith.compress.quantize.sites import folds_of
from joulesmith.compress.quantize.smooth_step import Smoothed
from joulesmith.compress.quantize.walk import Rounded
from joulesmith.engines.torch_engine import TorchSession
from joulesmith.errors import EngineError
from joulesmith.models import Model, load, set_gguf_weight
from joulesmith.quality import Reference, judge, write_reference

CACHES = {
    "8 bits, by token, groups of 32": KVScheme(8, "token", 32),
    "4 bits, keys by channel (KIVI), groups of 32": KVScheme(4, "channel", 32),
    "4 bits, keys by channel (KIVI), groups of 64": KVScheme(4, "channel", 64),
    "4 bits, by token, groups of 32": KVScheme(4, "token", 32),
    "4 bits, by token, rotated, groups of 32": KVScheme(4, "token", 32, rotate=True),
    "8 bits as q8_0": KVScheme(8, "token", 32, symmetric=True),
    "4 bits as q4_0": KVScheme(4, "token", 32, symmetric=True),
}
PLAIN = {
    "int8 inputs alone, no smoothing": Scheme("int8"),
    "int8 inputs alone, zero points, no smoothing": Scheme("int8", symmetric=False),
    "FP8 inputs alone": Scheme("fp8"),
}
EVALUATION_SEED = 1000
"""Of sampled text, so that it is not what is calibrated on."""
ENGINE = ("Q8_0", "Q5_1", "Q4_1", "Q4_0")


def windows(model: Model, where: str, n: int, length: int, seed: int) -> text.Windows:
    """Windows of a text file, or of what the model writes."""
    if where == "samples":
        return text.self_samples(model, n, length, seed)
    return text.windows(model, text.read(where), length, {"judge": n}, seed)["judge"]


class Bench:
    """The model, its reference on the evaluation windows, and the cells done so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder = Path(args.work)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = load(args.model)
        seed = EVALUATION_SEED if args.eval == "samples" else 0
        read = windows(self.model, args.eval, args.windows, args.length, seed)
        self.windows, self.source = read.tokens, read.source
        self.reference: Reference | None = None

    def session(self) -> TorchSession:
        """The module as it is."""
        return TorchSession(self.model.module)

    def cell(self, name: str, seed: int | None = None) -> Path:
        """Where a cell's figures are kept."""
        plain = "".join(c if c.isalnum() else "-" for c in name)
        return self.folder / f"{plain}{'' if seed is None else f'.{seed}'}.json"

    def wanted(self, name: str, seed: int | None = None) -> bool:
        """Whether it is asked for and not done."""
        only = self.args.only
        return (only is None or any(o in name for o in only)) and not self.cell(name, seed).exists()

    def put(self, name: str, seed: int | None = None, **more: Any) -> None:
        """Judge the module as it is and keep the figures."""
        if self.reference is None:
            raise RuntimeError("no reference")
        scores = self.session().score(self.windows, self.reference.path)
        q = judge(scores, self.reference)
        diff = (scores.nll.astype(np.float64) - self.reference.nll).mean(axis=1)
        error = float(diff.std(ddof=1) / math.sqrt(len(diff)))
        found = {"change": 1 / q.kept - 1, "error": error, "kl": q.kl, "top1": q.top1} | more
        self.cell(name, seed).write_text(json.dumps(found))
        print(f"{name} {seed}: {100 * found['change']:+.3f} % ± {100 * error:.3f}, KL {q.kl:.5f}")


def rounded(bench: Bench, name: str, seed: int) -> None:
    """One type that rounds inputs, calibrated on windows of its own."""
    args, scheme = bench.args, SCHEMES[name]
    model: Model = load(args.model)
    calib = windows(model, args.calib, args.calib_windows, 256, seed).tokens
    packed: dict[str, Rounded] = {}
    done: dict[int, Smoothed] = {}
    walk_rows(
        model,
        calib,
        scheme,
        lambda _, found: packed.update({r.ref.name: r for r in found}),
        smooth=scheme.kind == "int8",
        keep=done.__setitem__,
        seed=seed,
        scratch=bench.folder,
    )
    for tensor, r in packed.items():
        back = grid(r.type).unpack(r.packed, r.ref.shape[1])
        set_gguf_weight(model, tensor, torch.from_numpy(back))
    inside = [module_of(r.ref) for r in packed.values()]
    inputs = dict.fromkeys(inside, InputQuantizer(Scheme(scheme.kind, True, scheme.symmetric)))
    by_token: list[str] = []
    if not scheme.dynamic:
        wide = too_wide({f"{i}.{p}": e for i, s in done.items() for p, e in s.excess.items()})
        by_token = [
            f"model.layers.{i}.{c}"
            for i, block in enumerate(model.module.model.layers)
            for fold in folds_of(block, model.module.config)
            for c in fold.consumers
            if f"{i}.{fold.producer}" in wide
        ]
        inputs = static_inputs(model, calib, scheme, by_token)
    whole = bench.model
    bench.model = model
    try:
        with quantized_inputs(model.module, inputs):
            bench.put(name, seed, by_token=len(by_token), of=len(inside))
        bench.put(f"{name}, weights alone", seed)
    finally:
        bench.model = whole


def engine_cells(bench: Bench) -> None:
    """llama.cpp's cache types, on the model as an F16 file."""
    from joulesmith.engines import get_engine
    from joulesmith.job.judge import write_choice

    names = [t for t in ENGINE if bench.wanted(f"llama.cpp {t}")]
    if not names:
        return
    engine: Any = get_engine("llama.cpp")
    types = dict.fromkeys((r.name for r in bench.model.matrices()), "F16")
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        path = Path(folder) / "f16.gguf"
        write_choice(bench.model, lambda t, k: grid(k).pack(_weight(bench.model, t)), types, path)
        base = None
        for kind in ("F16", *names):
            try:
                with engine.load(path, context=bench.windows.shape[1], cache_type=kind) as session:
                    nll = session.score(bench.windows).nll.astype(np.float64)
            except EngineError as e:
                print(f"llama.cpp {kind}: {e}")
                continue
            if base is None:
                base = nll
                continue
            diff = (nll - base).mean(axis=1)
            error = float(diff.std(ddof=1) / math.sqrt(len(diff)))
            change = math.exp(float(diff.mean())) - 1
            name = f"llama.cpp {kind}"
            bench.cell(name).write_text(json.dumps({"change": change, "error": error}))
            print(f"{name}: {100 * change:+.3f} % ± {100 * error:.3f}")


def _weight(model: Model, name: str) -> torch.Tensor:
    from joulesmith.models import gguf_weight

    return gguf_weight(model, name)


def table(bench: Bench) -> str:
    """All cells that are done."""

    def read(name: str) -> list[dict[str, Any]]:
        paths = [bench.cell(name), *(bench.cell(name, s) for s in range(bench.args.seeds))]
        return [json.loads(p.read_text()) for p in paths if p.exists()]

    def row(name: str) -> str | None:
        found = read(name)
        if not found:
            return None
        change = "; ".join(f"{100 * f['change']:+.2f} ± {100 * f['error']:.2f}" for f in found)
        kl = "; ".join(f"{f['kl']:.4f}" for f in found if "kl" in f)
        note = "; ".join(f"{f['by_token']} of {f['of']}" for f in found if f.get("by_token"))
        return f"| {name} | {change} | {kl} | {note} |"

    names = [*PLAIN, *(n for s in SCHEMES for n in (s, f"{s}, weights alone"))]
    names += [*CACHES, *(f"llama.cpp {t}" for t in ENGINE)]
    args = bench.args
    lines = [
        f"# Rounded inputs and caches ({date.today()})",
        "",
        f"{bench.model.origin}",
        "",
        f"`python benchmarks/activations.py --model {Path(args.model).name} --eval "
        f"{Path(args.eval).name} --calib "
        f"{Path(args.calib).name} --windows {args.windows} --length {args.length} "
        f"--calib-windows {args.calib_windows} --seeds {args.seeds}`",
        "",
        f"{bench.windows.shape[0]} windows of {bench.windows.shape[1]} tokens of {bench.source}; "
        f"calibration on {args.calib_windows} windows of 256 tokens a seed. Change of perplexity "
        "in per cent ± one standard error over windows, one figure a seed; KL in nats a token.",
        "",
        "| what | perplexity, % | KL | scales by token |",
        "|---|---|---|---|",
        *(r for n in names if (r := row(n)) is not None),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Do what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--eval", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--calib-windows", type=int, default=32)
    parser.add_argument("--name", default="activations")
    parser.add_argument("--work", default="activations.work")
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    bench = Bench(args)
    side = f"reference-{args.windows}-{args.length}.npy"
    bench.reference = write_reference(
        bench.session(), bench.windows, bench.folder / side, bench.source
    )
    for name, scheme in PLAIN.items():
        if bench.wanted(name):
            inside = [module_of(r) for r in bench.model.matrices() if r.layer is not None]
            every = dict.fromkeys(inside, InputQuantizer(scheme))
            with quantized_inputs(bench.model.module, every):
                bench.put(name)
    for name, cache in CACHES.items():
        if bench.wanted(name):
            with packed_cache(bench.model.module, cache):
                bench.put(name, bits=cache.bits_per_value)
    engine_cells(bench)
    for seed in range(args.first_seed, args.seeds):
        for name in SCHEMES:
            if bench.wanted(name, seed):
                rounded(bench, name, seed)
    found = table(bench)
    print(found)
    if args.only is None:
        (Path(__file__).parent / "results" / f"{args.name}.md").write_text(found)


if __name__ == "__main__":
    main()
