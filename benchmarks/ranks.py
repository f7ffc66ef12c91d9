"""Two ranks against one on the same global batches: losses, time, joules, communication.

    python benchmarks/ranks.py
    python benchmarks/ranks.py --rounds 5 --steps 20 --width 512 --device cuda

A Llama of fresh weights on made-up windows, trained by each way of sharing the work in turn, over
and over, each time in fresh processes that warm up first. One rank is given as a whole machine (all
processor cores) and as one of two would be (half of them). Writes ``--out``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 256
WAYS: dict[str, tuple[int, dict[str, Any] | None]] = {
    "one rank, all cores": (1, None),
    "one rank, half of the cores": (1, None),
    "two, replicated (DDP)": (2, {"data": "replicate"}),
    "two, in shards (FSDP2)": (2, {"data": "shard"}),
    "two, split matrices (tensor parallel)": (2, {"tensor": 2}),
}


def windows(length: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Windows in which a token follows from the one before more often than not."""
    rng = np.random.default_rng(0)
    found = rng.integers(0, VOCAB, (256, length))
    for i in range(1, length):
        follows = rng.random(len(found)) < 0.7
        found[follows, i] = (found[follows, i - 1] * 31 + 7) % VOCAB
    return found.astype(np.int32)


def model(width: int, layers: int) -> Any:
    """A Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=width * 8 // 3 // 32 * 32,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).float()


def child(way: str, a: argparse.Namespace) -> None:
    """One rank of one run; the first prints what it found."""
    import torch

    from joulesmith.train import losses
    from joulesmith.train.group import cores
    from joulesmith.train.loop import train
    from joulesmith.train.outputs import run
    from joulesmith.train.parallel import ParallelSettings, ranks
    from joulesmith.train.settings import TrainSettings

    def objective(module: Any, tokens: Any, places: Any) -> Any:
        return losses.hard(run(module, tokens[:, :-1]).logits, tokens[:, 1:])

    def go(steps: int, probe: int) -> Any:
        settings = TrainSettings(
            steps=steps, batch=a.batch, micro=a.batch // 2, warmup=0, rate=2e-3
        )
        how = ParallelSettings(**(WAYS[way][1] or {}), probe=probe)
        module = model(a.width, a.layers).to(me.device)
        return train(module, windows(a.length), objective, settings, parallel=how), module

    with ranks(a.device) as me:
        if way == "one rank, half of the cores":
            torch.set_num_threads(max(1, cores() // 2))
        share = go(2, 2)[0].scaling
        found, module = go(a.steps, 0)
        if me.first:
            told = {
                "losses": found.losses, "seconds": found.seconds / found.steps,
                "joules": None if found.joules is None else found.joules / found.steps,
                "pedigree": found.pedigree, "bytes": found.optimizer_bytes,
                "communication": None if share is None else share.communication,
                "parameters": sum(p.numel() for p in module.parameters()),
                "device": torch.cuda.get_device_name(me.device) if me.device.type == "cuda"
                else f"CPU, {cores()} cores", "torch": torch.__version__,
            }  # fmt: skip
            print("FOUND " + json.dumps(told), flush=True)


def once(way: str, arguments: list[str]) -> dict[str, Any]:
    """A run in processes of its own."""
    count = WAYS[way][0]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(count):
        env = dict(os.environ)
        if count > 1:
            told = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            env |= {k: str(v) for k, v in told.items()}
        line = [sys.executable, __file__, "--child", way, *arguments]
        processes.append(subprocess.Popen(line, env=env, stdout=subprocess.PIPE, text=True))
    out = [p.communicate()[0] for p in processes]
    if any(p.returncode for p in processes):
        raise SystemExit(f"{way}: a rank failed")
    found: dict[str, Any] = json.loads(out[0].split("FOUND ", 1)[1].splitlines()[0])
    return found


def spread(values: list[float], digits: int) -> str:
    """Median, least and most."""
    m = statistics.median(values)
    return f"{m:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def table(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Ratios are of runs of the same round."""
    base = next(iter(WAYS))
    rows = [
        "| way | s/step | J/step | T1/Tn | Jn/J1 | T1/Tn, Jn/J1 of the least | communication "
        "| optimizer state | largest difference of a loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for way, found in runs.items():
        pairs = list(zip(runs[base], found, strict=True))
        speed = spread([a["seconds"] / b["seconds"] for a, b in pairs], 2)
        known = all(x["joules"] for x in (*runs[base], *found))
        ratio = spread([b["joules"] / a["joules"] for a, b in pairs], 2) if known else "unknown"
        joules = spread([x["joules"] for x in found], 2) if known else "unknown"
        shares = [x["communication"] for x in found if x["communication"] is not None]
        share = f"{statistics.median(shares):.0%}" if shares else "–"
        off = max(
            abs(x - y) for a, b in pairs for x, y in zip(a["losses"], b["losses"], strict=True)
        )
        least = [
            min(x[k] or 0 for x in runs[base]) / max(1e-12, min(x[k] or 0 for x in found))
            for k in ("seconds", "joules")
        ]
        best = f"{least[0]:.2f}, " + (f"{1 / least[1]:.2f}" if known else "unknown")
        rows.append(
            f"| {way} | {spread([x['seconds'] for x in found], 3)} | {joules} | {speed} | {ratio} "
            f"| {best} | {share} | {found[0]['bytes'] / 1e6:.1f} MB | {off:.1g} |"
        )
    return rows


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--child", help=argparse.SUPPRESS)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--batch", type=int, default=8, help="windows a step, over all ranks")
    p.add_argument("--length", type=int, default=128)
    p.add_argument("--width", type=int, default=256)
    p.add_argument("--layers", type=int, default=6)
    p.add_argument("--device", default="cpu")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ranks.md")
    a = p.parse_args()
    if a.child:
        child(a.child, a)
        return
    arguments = [
        f"--{n}={getattr(a, n)}" for n in ("steps", "batch", "length", "width", "layers", "device")
    ]
    runs: dict[str, list[dict[str, Any]]] = {w: [] for w in WAYS}
    load = os.getloadavg()[0]
    for i in range(a.rounds):
        for way in WAYS:
            runs[way].append(once(way, arguments))
            print(f"round {i + 1}, {way}: {runs[way][-1]['seconds']:.3f} s a step", flush=True)
    first = next(iter(runs.values()))[0]
    loss = first["losses"]
    text = [
        f"# Two ranks against one ({date.today().isoformat()})",
        "",
        f"`python benchmarks/ranks.py {' '.join(sys.argv[1:])}`".replace(" `", "`"),
        "",
        f"{first['device']} ({platform.machine()}), torch {first['torch']}. A Llama of "
        f"{first['parameters'] / 1e6:.1f} M weights, float32, AdamW; {a.batch} windows of "
        f"{a.length} tokens a step, {a.steps} steps, of which the loss goes from {loss[0]:.3f} to "
        f"{loss[-1]:.3f}. {a.rounds} rounds, ways in turn; median (least–most). Joules are "
        f"{first['pedigree'] or 'unknown'}, of all ranks, idle included. Ratios are to one rank "
        "with all cores, of the same round. Communication: share of a step in which a collective "
        "is under way, waiting included. Of the least: by each way's best round, nearest to a "
        "machine of its own; where other programs take a core, a process of several threads waits "
        f"for it in every operation. Load average of the machine at the start: {load:.1f}.",
        "",
        *table(runs),
    ]
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text("\n".join(text) + "\n")
    print(a.out.read_text())


if __name__ == "__main__":
    main()
