"""What rounded inputs and a quantized key-value cache cost in perplexity.

    python -m benchmarks.activations --eval WIKITEXT_TEST --calib WIKITEXT_VALID [--seeds 3]
    python -m benchmarks.activations --model stories260K.bin --eval samples --calib samples

A model (SmolLM2-135M-Instruct, dequantized from Q4_1, unless --model says another; a .bin is a
llama2.c checkpoint), float32 in torch, against itself: the same windows of the evaluation text,
paired. "samples" instead of a file is text that the model writes itself, with a seed of its
own. Weights of W8A8, W8A8-STATIC and FP8 are rounded after smoothing as `joulesmith quantize`
does it, on calibration windows drawn by seed, all three from one calibration pass; caches need
none. With --engine the last rows are llama.cpp's own cache types on the F16 file, against its
F16 cache. Each cell is kept in --work as it is done, so that a run can be interrupted, and
shared out with --only (names by their start, "=" before a whole one).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from joulesmith import text
from joulesmith.calibrate import calibrate
from joulesmith.compress.quantize.activations import InputQuantizer, Scheme, quantized_inputs
from joulesmith.compress.quantize.grids import grid
from joulesmith.compress.quantize.input_types import (
    SCHEMES,
    bounded_inputs,
    module_of,
)
from joulesmith.compress.quantize.kv_cache import DEFAULTS, KVScheme
from joulesmith.compress.quantize.kv_layers import PackedCache, packed_cache
from joulesmith.compress.quantize.row_walk import round_at, smooth_at
from joulesmith.compress.quantize.smooth_step import predicted_excess
from joulesmith.engines.torch_engine import TorchSession
from joulesmith.errors import EngineError
from joulesmith.models import Model, load, set_gguf_weight
from joulesmith.quality import Reference, judge, write_reference

CACHES = {
    "8 bits, keys by channel before positions, groups of 32": DEFAULTS[8],
    "8 bits, by token, groups of 32": KVScheme(8, "token", 32),
    "4 bits, keys by channel before positions, groups of 32": DEFAULTS[4],
    "4 bits, keys by channel before positions, groups of 64": replace(DEFAULTS[4], group=64),
    "4 bits, keys by channel (KIVI), groups of 32": KVScheme(4, "channel", 32),
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


def opened(name: str) -> Model:
    """The model, float32."""
    return load(name)


class Bench:
    """The model, its reference on the evaluation windows, and the cells done so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder = Path(args.work)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = opened(args.model)
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
        asked = only is None or any(
            name == o[1:] if o.startswith("=") else name.startswith(o) for o in only
        )
        return asked and not self.cell(name, seed).exists()

    def put(self, name: str, seed: int | None = None, **more: Any) -> None:
        """Judge the module as it is and keep the figures."""
        if self.reference is None:
            raise RuntimeError("no reference")
        scores = self.session().score(self.windows, self.reference.path)
        q = judge(scores, self.reference)
        diff = (scores.nll.astype(np.float64) - self.reference.nll).mean(axis=1)
        error = float(diff.std(ddof=1) / math.sqrt(len(diff)))
        found = {"change": 1 / q.kept - 1, "error": error, "kl": q.kl, "top1": q.top1} | more
        found["windows"] = diff.tolist()
        self.cell(name, seed).write_text(json.dumps(found))
        print(f"{name} {seed}: {100 * found['change']:+.3f} % ± {100 * error:.3f}, KL {q.kl:.5f}")


def round_all(bench: Bench, names: list[str], calib: np.ndarray, seed: int) -> None:
    """Smooth and round for each type, from one calibration pass; each kept in a file."""
    model = opened(bench.args.model)
    refs: dict[int, list[Any]] = {}
    for ref in model.matrices():
        if ref.layer is not None:
            refs.setdefault(ref.layer, []).append(ref)
    kept: dict[str, dict[str, Any]] = {n: {} for n in names}
    excess: dict[str, dict[str, float]] = {n: {} for n in names}

    def visit(index: int, moments: Any) -> None:
        block = model.module.model.layers[index]
        whole = copy.deepcopy(block.state_dict())
        for name in names:
            scheme, here = SCHEMES[name], moments
            if scheme.kind == "int8":
                done, here = smooth_at(model, index, moments, scheme)
                excess[name] |= predicted_excess({index: done})
            for r in round_at(model, index, refs[index], here, scheme):
                kept[name][f"{r.type}:{r.ref.name}"] = r.packed
            for key, value in block.state_dict().items():
                if value.ndim == 1:
                    kept[name][f"vector:model.layers.{index}.{key}"] = value.numpy().copy()
            block.load_state_dict(whole)
        print(f"seed {seed}: block {index}", flush=True)

    calibrate(model.module, calib, visit, seed=seed, scratch=bench.folder)
    for name in names:
        told = np.array(json.dumps(excess[name]))
        np.savez(bench.folder / f"{name}.{seed}.npz", excess=told, **kept[name])


def rounded(bench: Bench, names: list[str], seed: int) -> None:
    """The types that round inputs, calibrated on windows of their own."""
    args = bench.args
    calib = windows(opened(args.model), args.calib, args.calib_windows, 256, seed).tokens
    missing = [n for n in SCHEMES if not (bench.folder / f"{n}.{seed}.npz").exists()]
    if missing:
        round_all(bench, missing, calib, seed)
    for name in names:
        judge_rounded(bench, name, calib, seed)


def judge_rounded(bench: Bench, name: str, calib: np.ndarray, seed: int) -> None:
    """One type, rounded before, as a cell with inputs and one of its weights alone."""
    scheme, model = SCHEMES[name], opened(bench.args.model)
    inside = [module_of(r) for r in model.matrices() if r.layer is not None]
    parameters = dict(model.module.named_parameters())
    with np.load(bench.folder / f"{name}.{seed}.npz", allow_pickle=False) as z:
        excess = json.loads(str(z["excess"]))
        for key in z.files:
            kind, _, of = key.partition(":")
            if kind == "vector":
                parameters[of].data.copy_(torch.from_numpy(z[key]))
            elif of:
                back = grid(kind).unpack(z[key], model.ref(of).shape[1])
                set_gguf_weight(model, of, torch.as_tensor(back))
    inputs = dict.fromkeys(inside, InputQuantizer(Scheme(scheme.kind, True, scheme.symmetric)))
    if not scheme.dynamic:
        inputs = bounded_inputs(model, calib, scheme, excess)
    by_token = sum(q.scheme.dynamic for q in inputs.values())
    whole, bench.model = bench.model, model
    try:
        if bench.wanted(name, seed):
            with quantized_inputs(model.module, inputs):
                told = {} if scheme.dynamic else {"by_token": by_token, "of": len(inside)}
                bench.put(name, seed, **told)
        if bench.wanted(f"{name}, weights alone", seed):
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
        if len(found) > 1:  # of all seeds together, on the same windows
            every = np.mean([f["windows"] for f in found], axis=0)
            error = every.std(ddof=1) / math.sqrt(len(every))
            mean = 100 * math.expm1(every.mean())
            change += f"; together {mean:+.2f} ± {100 * error:.2f}"
        kl = "; ".join(f"{f['kl']:.4f}" for f in found if "kl" in f)
        note = "; ".join(f"{f['by_token']} of {f['of']}" for f in found if "by_token" in f)
        note += "; ".join(f"{f['bits']:g} bits" for f in found if "bits" in f)
        return f"| {name} | {change} | {kl} | {note} |"

    names = [*PLAIN, *(n for s in SCHEMES for n in (s, f"{s}, weights alone"))]
    names += [*CACHES, *(f"llama.cpp {t}" for t in ENGINE)]
    args = bench.args
    lines = [
        f"# Rounded inputs and caches ({date.today()})",
        "",
        f"{bench.model.origin}",
        "",
        f"`python -m benchmarks.activations --model {Path(args.model).name} --eval "
        f"{Path(args.eval).name} --calib "
        f"{Path(args.calib).name} --windows {args.windows} --length {args.length} "
        f"--calib-windows {args.calib_windows} --seeds {args.seeds}`",
        "",
        f"{bench.windows.shape[0]} windows of {bench.windows.shape[1]} tokens of {bench.source}; "
        f"calibration on {args.calib_windows} windows of 256 tokens a seed. Change of perplexity "
        "in per cent ± one standard error over windows, one figure a seed; KL in nats a token.",
        "",
        "| what | perplexity, % | KL | scales by token, or bits stored |",
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
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--calib-windows", type=int, default=32)
    parser.add_argument("--name", default="activations")
    parser.add_argument("--work", default="activations.work")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--engine", action="store_true")
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
                held = PackedCache(bench.model.module.config, cache)
                bench.put(name, bits=held.bits_per_value)
    if args.engine:
        engine_cells(bench)
    for seed in range(args.first_seed, args.seeds):
        wanted = [
            n for n in SCHEMES if bench.wanted(n, seed) or bench.wanted(f"{n}, weights alone", seed)
        ]
        if wanted:
            rounded(bench, wanted, seed)
    found = table(bench)
    print(found)
    if args.only is None:
        (Path(__file__).parent / "results" / f"{args.name}.md").write_text(found)


if __name__ == "__main__":
    main()
