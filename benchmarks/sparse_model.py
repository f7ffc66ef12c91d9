"""A pruned SmolLM2-135M as a whole: bytes on disk and in memory, time of a decoded token.

    python benchmarks/sparse_model.py --work DIR [--tokens 12] [--rounds 5]

The model's block matrices are cut by magnitude to 25 % (a test of storage and speed, not of
quality) and rounded to four bits; written with `export.sparse_folder`, read back packed, and run
token by token against the same weights dense in bfloat16 and packed densely in four bits.
CPU seconds of one thread; forms take turns.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from sparse_compute import rounded

from joulesmith import models
from joulesmith.atomic import atomic_path
from joulesmith.compress.quantize.integers import IntGrid
from joulesmith.engines.packed import pack_model, resident_bytes
from joulesmith.export.sparse_folder import load_sparse, write_sparse

PROMPT = 16


def pruned(tall: bool) -> tuple[models.Model, dict[str, Any]]:
    """The model with 75 % zeros, and its codes. tall: 64 rows share their columns."""
    model = models.load("smollm2")
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.copy_(parameter.half().float())
    packed = {}
    for ref in model.matrices():
        if ref.layer is None:
            continue
        w = models.gguf_weight(model, ref.name)
        size = w.abs()
        if tall:
            parameter = model.module.get_parameter(ref.parameter).detach().abs()
            strips = parameter.view(-1, 64, parameter.shape[1]).square().sum(1)
            kept = strips.argsort(1, descending=True).argsort(1) < parameter.shape[1] // 4
            mask = kept.repeat_interleave(64, 0)
            mask = mask if ref.rows is None else mask[torch.from_numpy(ref.rows)]
        else:
            mask = size > size.flatten().kthvalue(int(0.75 * size.numel())).values
        w *= mask
        grid = IntGrid(4, ref.shape[1] if tall else 64)
        packed[ref.name] = (grid.name, rounded(grid, w))
        models.set_gguf_weight(
            model, ref.name, torch.from_numpy(grid.unpack(packed[ref.name][1], ref.shape[1]))
        )
    return model, packed


def decode(module: Any, tokens: int) -> float:
    """CPU seconds of one token after a prompt."""
    ids = torch.arange(100, 100 + PROMPT)[None]
    with torch.inference_mode():
        out = module(ids, use_cache=True)
        word = "cache" if hasattr(out, "cache") else "past_key_values"
        start = time.process_time()
        for i in range(tokens):
            out = module(torch.tensor([[200 + i]]), use_cache=True, **{word: out[word]})
        return (time.process_time() - start) / tokens


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for tall, kind in ((False, "anywhere"), (True, "64-row columns")):
        folder = args.work / ("tall" if tall else "free")
        model, packed = pruned(tall)
        sizes = write_sparse(model, folder, packed)
        if not tall:
            model.module.bfloat16()
            pack_model(model, packed)  # groups of 64 and bfloat16: on torch's kernel
        blocks = [s for s in sizes if "layers" in s.name]
        weights = sum(p.numel() for p in models.load("smollm2").module.parameters())
        forms = {
            "dense bfloat16": load_sparse(folder, dtype=torch.bfloat16).module,
            "packed, C kernel": load_sparse(
                folder, dtype=torch.bfloat16, packed=True, native=True
            ).module,
        }
        if not tall:
            forms["dense INT4-G64, torch kernel"] = model.module
        del model, packed
        gc.collect()
        found: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(args.rounds):
            for name, module in forms.items():
                found[name].append(decode(module, args.tokens))
        disk = (folder / "sparse.safetensors").stat().st_size
        share = 8 * sum(s.bytes for s in blocks) / sum(s.dense * 8 / 4.25 for s in blocks)
        for name, module in forms.items():
            ratio = [b / s for b, s in zip(found["dense bfloat16"], found[name], strict=True)]
            lines.append(
                f"| {kind} | {name} | {disk / 2**20:.0f} | {share:.2f} "
                f"| {resident_bytes(module) / 2**20:.0f} "
                f"| {1e3 * statistics.median(found[name]):.1f} "
                f"| {statistics.median(ratio):.2f} ({min(ratio):.2f}-{max(ratio):.2f}) |"
            )
            print(lines[-1], flush=True)
        del forms, module
    head = [
        f"# A pruned SmolLM2-135M ({date.today()}, {weights} weights)",
        "",
        f"`python benchmarks/sparse_model.py --work DIR --tokens {args.tokens} "
        f"--rounds {args.rounds}`",
        "",
        "75 % of the block matrices' weights are zero, the rest four bits; the embedding (tied "
        "head) is float16, 54 MiB of the file. One thread, CPU time. Bits: of a block weight on "
        "disk, scales counted. Held: parameters and buffers in memory.",
        "",
        "| zeros | form | file MiB | bits | held MiB | ms a token | faster than bfloat16 |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    path = Path(__file__).parent / "results" / "sparse_model.md"
    with atomic_path(path) as temp:
        temp.write_text("\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main()
