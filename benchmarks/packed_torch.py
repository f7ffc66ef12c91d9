"""Packed weights in torch: memory held, speed and joules beside the float model.

    python benchmarks/packed_torch.py [--rounds 5] [--work DIR] [--out FILE]

SmolLM2-135M (dequantized from Q4_1), its block matrices rounded to the nearest value of each
type, steps from each group's range (speed and memory do not depend on it). Speed and modelled
joules come from interleaved rounds in one process, ratios from pairs within rounds. Memory
comes from a process of its own for each row, before any model was loaded: resident bytes after
loading and one request, minus those before; the peak is its high-water mark minus the same.
KL is that of the row's logits against float32 logits of the same rounded weights: what the
arithmetic loses.
With torchao installed, its own int4 CPU tensors (of 0.18) are one row (they round by themselves).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from joulesmith.compress.quantize.grids import Grid, grid
from joulesmith.energy.memory import resident
from joulesmith.engines.compare import cost, ratio, rounds
from joulesmith.engines.packed import pack_model, resident_bytes
from joulesmith.engines.packed_folder import load_packed
from joulesmith.engines.torch_engine import TorchSession
from joulesmith.export.compressed_tensors import write_compressed
from joulesmith.memory import release_memory, return_large_blocks
from joulesmith.models import gguf_weight, load, set_gguf_weight
from joulesmith.text import english

MODEL = "smollm2"
BASE = "bfloat16 eager"
FOLDERS = ("INT8-G64", "INT4-G64", "INT4-G64-ZP")
EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class Variant:
    """One row. how: eager, folder, packed, transformers or torchao."""

    how: str
    kind: str = ""
    dtype: str = "bfloat16"
    prefer: str = "bytes"
    embedding: str = ""


VARIANTS = {
    "float32 eager": Variant("eager", dtype="float32"),
    BASE: Variant("eager"),
    "INT8-G64, kernel": Variant("folder", "INT8-G64"),
    "INT4-G64, kernel": Variant("folder", "INT4-G64"),
    "INT4-G64-ZP, kernel": Variant("folder", "INT4-G64-ZP"),
    "INT4-G64 and INT8-G64 embedding, kernel": Variant("packed", "INT4-G64", embedding="INT8-G64"),
    "INT3-G64 widened, kernel": Variant("packed", "INT3-G64", prefer="speed"),
    "Q4_0, kernel": Variant("packed", "Q4_0"),
    "INT8-G64, tiles, float32": Variant("folder", "INT8-G64", dtype="float32"),
    "INT4-G64, tiles, float32": Variant("folder", "INT4-G64", dtype="float32"),
    "INT3-G64, tiles": Variant("packed", "INT3-G64"),
    "TERNARY-G64, tiles": Variant("packed", "TERNARY-G64"),
    "Q5_0, tiles": Variant("packed", "Q5_0"),
    "INT4-G64 in transformers": Variant("transformers", "INT4-G64"),
    "torchao int4, group 64": Variant("torchao"),
}


def packed_of(work: Path, kind: str, names: list[str]) -> dict[str, tuple[str, np.ndarray]]:
    """The matrices, mapped from disk."""
    return {n: (kind, np.load(work / kind / f"{n}.npy", mmap_mode="r")) for n in names}


def nearest(kind: str, w: torch.Tensor) -> np.ndarray:
    """Packed rows, steps from each group's range: speed asks for nothing better."""
    g = grid(kind)
    assert isinstance(g, Grid)
    cut = w.view(len(w), -1, g.group)
    if g.affine:
        low, high = cut.amin(-1).clamp(max=0), cut.amax(-1).clamp(min=0)
        lattice = g.snap((high - low) / (g.levels[-1] - g.levels[0]), low)
    else:
        lattice = g.snap(cut.abs().amax(-1) / max(1, g.levels[-1]), None)
    return g.write(g.codes(w, lattice), lattice)


def prepare(work: Path, kinds: Iterable[str], pipe: Any) -> None:
    """Packed matrices and folders of these types, made once."""
    missing = [kind for kind in kinds if not (work / kind / "done").exists()]
    if not missing:
        pipe.send(None)
        return
    model = load(MODEL)
    inside = [r.name for r in model.matrices() if r.layer is not None]
    for kind in missing:
        (work / kind).mkdir(parents=True, exist_ok=True)
        for name in [*inside, *([EMBEDDING] if kind == "INT8-G64" else [])]:
            np.save(work / kind / f"{name}.npy", nearest(kind, gguf_weight(model, name)))
        if kind in FOLDERS and not (work / f"{kind}-folder").exists():
            write_compressed(model, packed_of(work, kind, inside), work / f"{kind}-folder")
        (work / kind / "done").touch()
    pipe.send(None)


def make(variant: Variant, work: Path) -> Any:
    """The module of a row."""
    dtype = getattr(torch, variant.dtype)
    folder = work / f"{variant.kind}-folder"
    if variant.how == "folder":
        return load_packed(folder, dtype=dtype, prefer=variant.prefer).module
    if variant.how == "transformers":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = load(MODEL, dtype=dtype)
    if variant.how == "packed":
        inside = [r.name for r in model.matrices() if r.layer is not None]
        packed = packed_of(work, variant.kind, inside)
        if variant.embedding:
            packed |= packed_of(work, variant.embedding, [EMBEDDING])
        pack_model(model, packed, prefer=variant.prefer)
    if variant.how == "torchao":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import quantize_

        blocks = model.module.model.layers
        quantize_(blocks, PrototypeInt4WeightOnlyConfig(group_size=64))
    return model.module


def warm() -> None:
    """A tiny model made, run and dropped: the libraries' own memory is no row's."""
    import gguf  # noqa: F401
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with TorchSession(LlamaForCausalLM(config)) as session:
        session.generate(np.arange(8, dtype=np.int32), 2)


def memory_of(name: str, work: Path, pipe: Any) -> None:
    """Memory of one row, in a process that has loaded no other model."""
    return_large_blocks()
    warm()
    release_memory()
    before, _ = resident(os.getpid()) or (0, 0)
    module = make(VARIANTS[name], work)
    with TorchSession(module) as session:
        session.generate(np.arange(64, dtype=np.int32), 4)
        release_memory()
        now, peak = resident(os.getpid()) or (0, 0)
    pipe.send(
        {
            "held": now - before,
            "peak": (peak or now) - before,
            "buffers": resident_bytes(module),
        }
    )


def apart(function: Callable[..., None], *arguments: Any) -> Any:
    """What a function sends, run in a process of its own: this one keeps clear of models.

    A new interpreter, no fork: torch's threads do not live on in one, and it waits for them.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(*arguments, there))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise SystemExit(f"{arguments[0]} failed") from None
    finally:
        process.join()


def losses(modules: Mapping[str, Any], work: Path) -> dict[str, float]:
    """Mean KL, nats a token, of each row against float32 logits of the same weights."""
    model = load(MODEL)
    ids = np.asarray(model.tokenizer.encode(english().text[50_000:60_000])[:256], np.int64)
    ids_t = torch.from_numpy(ids)[None]
    names = [r.name for r in model.matrices() if r.layer is not None]
    original = {n: gguf_weight(model, n) for n in [*names, EMBEDDING]}
    out: dict[str, float] = {}
    done: dict[tuple[str, str], torch.Tensor] = {}
    for name, module in modules.items():
        v = VARIANTS[name]
        if v.how == "torchao":
            continue
        key = (v.kind, v.embedding)
        if key not in done:
            packed = packed_of(work, v.kind, names) if v.kind else {}
            if v.embedding:
                packed |= packed_of(work, v.embedding, [EMBEDDING])
            for n, weight in original.items():
                if n in packed:
                    kind, raw = packed[n]
                    weight = torch.from_numpy(grid(kind).unpack(np.array(raw), weight.shape[1]))
                set_gguf_weight(model, n, weight)
            with torch.no_grad():
                done[key] = torch.log_softmax(model.module(ids_t).logits[0], -1)
        with torch.no_grad():
            got = torch.log_softmax(module(ids_t).logits[0].float(), -1)
        want = done[key]
        out[name] = float((want.exp() * (want - got)).sum(-1).mean())
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", type=int, default=256)
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", help="Rows whose names have one of these parts.")
    parser.add_argument("--note", default="", help="What to say of the machine's load.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        work = args.work or Path(made)
        work.mkdir(parents=True, exist_ok=True)
        names = [n for n, v in VARIANTS.items() if v.how != "torchao" or find_spec("torchao")]
        if args.only:
            names = [n for n in names if n == BASE or any(part in n for part in args.only)]
        chosen = [VARIANTS[n] for n in names]
        kinds = [kind for v in chosen for kind in (v.kind, v.embedding) if kind]
        import transformers  # noqa: F401 - its own memory is no row's

        apart(prepare, work, list(dict.fromkeys(kinds)))
        memory = {}
        for name in names:
            memory[name] = apart(memory_of, name, work)
            print(name, memory[name], file=sys.stderr)
        modules = {name: make(VARIANTS[name], work) for name in names}
        kl = losses(modules, work)
        sessions = {name: TorchSession(module) for name, module in modules.items()}
        runners = {
            n: (lambda i, s=s: s.bench(args.prefill, args.decode, i)) for n, s in sessions.items()
        }
        tick = lambda share: print(f"{share:.0%}", end=" ", flush=True, file=sys.stderr)  # noqa: E731
        found = rounds(runners, args.rounds, progress=tick)
    page = render(names, memory, kl, found, args)
    print(page)
    if args.out:
        args.out.write_text(page, encoding="utf-8")


def render(
    names: list[str],
    memory: Mapping[str, Mapping[str, int]],
    kl: Mapping[str, float],
    found: list[dict[str, Any]],
    args: argparse.Namespace,
) -> str:
    """The page, in Markdown."""
    mib = 1 << 20

    def speed(name: str, phase: Any) -> str:
        pairs = [row[BASE][phase]["seconds"] / row[name][phase]["seconds"] for row in found]
        return f"{np.median(pairs):.2f} ({min(pairs):.2f}-{max(pairs):.2f})"

    def joules(name: str, phase: Any) -> str:
        at = ratio(found, name, BASE, phase)
        value = cost(found, name, phase).joules
        if value is None or at.ratio is None:
            return "unknown"
        return f"{1e3 * value:.2f} ({at.ratio:.2f})"

    rows = []
    for n in names:
        m = memory[n]
        rows.append(
            f"| {n} | {m['buffers'] / mib:.0f} | {m['held'] / mib:.0f} | {m['peak'] / mib:.0f} "
            f"| {speed(n, 'decode')} | {speed(n, 'prefill')} | {joules(n, 'decode')} "
            f"| {joules(n, 'prefill')} | {f'{kl[n]:.1e}' if n in kl else '-'} |"
        )
    versions = ", ".join(
        f"{p} {metadata.version(p)}"
        for p in ("torch", "transformers", "compressed-tensors", "torchao")
        if find_spec(p.replace("-", "_"))
    )
    pedigree = found[0][BASE]["decode"]["pedigree"]
    return f"""# Packed weights in torch

{date.today()}, `python benchmarks/packed_torch.py --rounds {args.rounds}`, {versions},
{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads.
{args.note}

SmolLM2-135M, dequantized from Q4_1; {args.prefill} tokens of prefill, {args.decode} of decode.
Speed: {BASE} seconds / row's seconds, median (smallest-largest) of {args.rounds} interleaved
rounds; above 1 is faster. Joules: {pedigree}, mJ a token, in brackets {BASE} / row. MiB: of
weights; held after loading and one request in a fresh process; peak of that process. KL, nats:
against float32 logits of the same rounded weights. Embedding and head are not packed except
where told. "Kernel": torch's four-bit one; "tiles": the slow path of docs/packed.md.

| row | weights MiB | held | peak | decode speed | prefill speed | decode mJ | prefill mJ | KL |
|---|--:|--:|--:|--:|--:|--:|--:|--:|
{chr(10).join(rows)}
"""


if __name__ == "__main__":
    main()
