"""Speed and damage of the uniform types that people download, on one engine build.

    python benchmarks/uniform_types.py --eval FILE [--engine-lib LIB] [--name uniform_types]

Files of SmolLM2-135M-Instruct (dequantized from Q4_1) made by llama.cpp's own quantizer
without an importance matrix, "nearest" rounding; decode and prefill in interleaved rounds,
KL to the float model on 4,096 tokens of the text. "+ 4-bit head" has the tied embedding and
head in the same type as the rest.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from datetime import date
from pathlib import Path

import numpy as np

from joulesmith import text
from joulesmith.engines import get_engine
from joulesmith.engines.base import Bench, Session
from joulesmith.engines.compare import cost, ratio, rounds
from joulesmith.engines.llama_quantize import LlamaQuantizer
from joulesmith.engines.torch_engine import TorchSession
from joulesmith.export.mixtures import mixture
from joulesmith.job.judge import score_file, write_choice
from joulesmith.models import gguf_weight, load
from joulesmith.quality import Quality, write_reference

NAMES = ("BF16", "F16", "Q8_0", "Q6_K", "Q5_0", "Q5_K_M", "Q4_K_M", "IQ4_NL", "Q4_0")
FOUR_BIT_HEAD = ("Q4_0", "IQ4_NL")


def main() -> None:
    """Write the files, judge them, measure them, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--eval", default="english")
    parser.add_argument("--engine-lib", default=None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--name", default="uniform_types")
    args = parser.parse_args()
    model = load("smollm2")
    engine = get_engine("llama.cpp", library=args.engine_lib)
    read = text.read(args.eval)
    windows = text.windows(model, read, 256, {"judge": 16}, 0)["judge"]
    quantizer = LlamaQuantizer(args.engine_lib)
    layers = 1 + max(r.layer for r in model.matrices() if r.layer is not None)

    def pack(tensor: str, kind: str) -> np.ndarray:
        return quantizer.pack(gguf_weight(model, tensor).numpy(), kind)

    choices: dict[str, dict[str, str]] = {}
    for name in NAMES:
        if name in ("BF16", "F16"):
            choices[name] = dict.fromkeys((r.name for r in model.matrices()), name)
        else:
            choices[name] = mixture(name, model.matrices(), layers)
    for name in FOUR_BIT_HEAD:
        choices[f"{name} + 4-bit head"] = dict.fromkeys((r.name for r in model.matrices()), name)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        reference = write_reference(
            TorchSession(model.module), windows.tokens, Path(folder) / "r.npy", windows.source
        )
        quality: dict[str, Quality] = {}
        sessions: dict[str, Session] = {}
        sizes: dict[str, int] = {}
        for name, types in choices.items():
            path = Path(folder) / f"{len(sizes)}.gguf"
            sizes[name] = write_choice(model, pack, types, path)
            quality[name] = score_file(engine, path, reference)
            print(f"{name}: KL {quality[name].kl:.4f}", flush=True)
            sessions[name] = stack.enter_context(engine.load(path, context=320))

        def runner(session: Session) -> Callable[[int], Bench]:
            return lambda i: session.bench(64, 256, seed=i)

        found = rounds({n: runner(s) for n, s in sessions.items()}, args.rounds)
    lines = [
        f"# Uniform types on SmolLM2-135M-Instruct, dequantized from Q4_1 ({date.today()})",
        "",
        f"`python benchmarks/uniform_types.py --eval {Path(args.eval).name} --name {args.name}`",
        "",
        f"{engine.version}, {engine.threads} threads, {platform.machine()}; {args.rounds} "
        f"interleaved rounds of 64:256 tokens, medians. KL on {quality['BF16'].tokens} tokens of "
        f"{windows.source}. Joules against Q8_0: above 1 is cheaper than Q8_0.",
        "",
        "| type | size | decode tokens/s | prefill tokens/s | Q8_0's joules / this (rounds) | KL "
        "| kept |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in choices:
        r = ratio(found, name, "Q8_0", "workload")
        decode, prefill = cost(found, name, "decode"), cost(found, name, "prefill")
        q = quality[name]
        lines.append(
            f"| {name} | {sizes[name] / 1e6:.1f} MB | {1 / decode.seconds:.0f} "
            f"| {1 / prefill.seconds:.0f} | {r.ratio:.2f} ({r.spread[0]:.2f}–{r.spread[1]:.2f}) "
            f"| {q.kl:.4f} | {q.kept:.4f} |"
        )
    out = "\n".join(lines) + "\n"
    print(out)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / f"{args.name}.md").write_text(out)


if __name__ == "__main__":
    main()
