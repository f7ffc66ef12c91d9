"""What a GPU's own counter says: how good the counter is, joules of decoding and prefill by batch,
of products in three precisions, and that the tests pass where a GPU is.

    python benchmarks/gpu.py --out DIR [--only counter tests serving kernels] [--scale 1.0]

Each part writes DIR/gpu-PART.json and a table. Weights are random, of the shapes of public models,
and rotary embeddings are left out; the joules are the board's, by NVML, idle included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from joulesmith.energy.meter import EnergyMeter

SHAPES = {
    "135M": (576, 1536, 30, 9, 3, 49152, True),
    "1.1B": (2048, 5632, 22, 32, 4, 32000, False),
    "8B": (4096, 14336, 32, 32, 8, 128256, False),
}
"""width, neurons, layers, heads, key-value heads, vocabulary, tied."""


def steady(work: Callable[[], Any], seconds: float, meter: EnergyMeter) -> dict[str, Any]:
    """Repeat ``work`` for so long; joules and seconds of one, and watts."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    count, begun = 0, time.perf_counter()
    with meter.window("steady") as window:
        while time.perf_counter() - begun < seconds:
            for _ in range(4):
                work()
                count += 1
            torch.cuda.synchronize()
        torch.cuda.synchronize()
        took = time.perf_counter() - begun
    part = gpu_part(window.reading)
    joules = None if part is None else part.joules
    return {
        "seconds": took / count,
        "count": count,
        "pedigree": None if part is None else part.pedigree,
        "joules": None if joules is None else joules / count,
        "watts": None if joules is None else joules / took,
    }


def gpu_part(reading: Any) -> Any:
    """The GPU's in a reading of the machine."""
    return next((p for p in reading.parts if p.device.startswith("gpu")), None)


def counter(a: argparse.Namespace, meter: EnergyMeter) -> dict[str, Any]:
    """How often counter and power reading move, idle watts, error of short windows, and the meter
    against the raw counter read beside it."""
    import pynvml as n

    n.nvmlInit()
    gpu = n.nvmlDeviceGetHandleByIndex(0)

    def energy() -> int:
        return int(n.nvmlDeviceGetTotalEnergyConsumption(gpu))

    def moves(read: Callable[[], int], seconds: float) -> float | None:
        last, at, times = read(), time.perf_counter(), []
        until = at + seconds
        while time.perf_counter() < until:
            now = read()
            if now != last:
                t = time.perf_counter()
                times.append(t - at)
                last, at = now, t
        times = sorted(times[1:])
        return times[len(times) // 2] if times else None

    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    found: dict[str, Any] = {
        "name": n.nvmlDeviceGetName(gpu),
        "driver": n.nvmlSystemGetDriverVersion(),
    }
    time.sleep(2)
    begin, t0 = energy(), time.perf_counter()
    time.sleep(3 * a.scale)
    found["idle_watts"] = (energy() - begin) / 1e3 / (time.perf_counter() - t0)
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            for _ in range(8):
                x @ x
            torch.cuda.synchronize()

    thread = threading.Thread(target=load)
    thread.start()
    time.sleep(1.5)
    found["counter_period"] = moves(energy, 2 * a.scale)
    found["power_period"] = moves(lambda: n.nvmlDeviceGetPowerUsage(gpu), 2 * a.scale)
    begin, t0 = energy(), time.perf_counter()
    with meter.window("long") as window:
        time.sleep(4 * a.scale)
    raw = (energy() - begin) / 1e3
    took = time.perf_counter() - t0
    part = gpu_part(window.reading)
    found |= {
        "load_watts": raw / took,
        "raw_joules": raw,
        "meter_joules": part.joules,
        "meter_over_raw": part.joules / raw,
        "pedigree": part.pedigree,
        "device": part.device,
        "notes": list(window.reading.notes),
    }
    for length in (0.05, 0.1, 0.3, 1.0):
        errors = []
        for _ in range(max(3, int((2 if length < 1 else 4) * a.scale / length))):
            with meter.window("short") as window:
                t = time.perf_counter()
                time.sleep(length)
                t = time.perf_counter() - t
            joules = gpu_part(window.reading).joules
            errors.append(None if joules is None else joules / t / (raw / took) - 1)
        known = sorted(abs(e) for e in errors if e is not None)
        found[f"error_{length}s"] = {
            "median": known[len(known) // 2] if known else None,
            "most": known[-1] if known else None,
            "unknown": sum(e is None for e in errors),
            "windows": len(errors),
        }
    stop.set()
    thread.join()
    told = subprocess.run(
        [sys.executable, "-m", "joulesmith", "doctor"], capture_output=True, text=True, timeout=60
    )
    found["doctor"] = (told.stdout + told.stderr)[-6000:]
    print(json.dumps({k: v for k, v in found.items() if k != "doctor"}, indent=1))
    print(found["doctor"])
    return found


def tests(a: argparse.Namespace, meter: EnergyMeter) -> dict[str, Any]:
    """The tests of meters and of training, with the GPU visible."""
    words = ["tests/energy", "tests/train/test_loop.py", "tests/train/test_live.py", *a.tests]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "--maxfail=8", "-n", "8", *words],
            capture_output=True,
            text=True,
            timeout=a.limit,
        )
        out, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as e:
        out, code = str((e.stdout or b"").decode()), -1
    print(out[-5000:])
    return {"code": code, "output": out[-20000:]}


class Decoder:
    """A Llama of random weights in bfloat16 with a fixed cache."""

    def __init__(self, shape: tuple[int, int, int, int, int, int, bool]) -> None:
        self.w, self.f, self.l, self.h, self.kv, self.v, self.tied = shape
        self.d = self.w // self.h

        def weights(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * 0.02

        both = (self.h + 2 * self.kv) * self.d
        self.blocks = [
            (
                weights(both, self.w),
                weights(self.w, self.w),
                weights(2 * self.f, self.w),
                weights(self.w, self.f),
            )
            for _ in range(self.l)
        ]
        self.embed = weights(self.v, self.w)
        self.head = self.embed if self.tied else weights(self.v, self.w)
        self.norm = torch.ones(self.w, device="cuda", dtype=torch.bfloat16)

    @property
    def parameters(self) -> int:
        own = sum(p.numel() for b in self.blocks for p in b) + self.embed.numel()
        return own if self.tied else own + self.head.numel()

    def caches(self, batch: int, length: int) -> list[Tensor]:
        shape = (2, batch, self.kv, length, self.d)
        return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in self.blocks]

    def step(self, ids: Tensor, caches: list[Tensor] | None) -> Tensor:
        """ids (batch, n): with a cache one new token, without a whole prompt -> next ids."""
        f = torch.nn.functional
        x = self.embed[ids]
        b, n, _ = x.shape
        for i, (qkv, out, up, down) in enumerate(self.blocks):
            y = f.linear(f.rms_norm(x, (self.w,), self.norm), qkv)
            q, k, v = y.split((self.h * self.d, self.kv * self.d, self.kv * self.d), -1)
            q = q.view(b, n, self.h, self.d).transpose(1, 2)
            k = k.view(b, n, self.kv, self.d).transpose(1, 2)
            v = v.view(b, n, self.kv, self.d).transpose(1, 2)
            if caches is not None:
                caches[i][0, :, :, -1:] = k
                caches[i][1, :, :, -1:] = v
                k, v = caches[i][0], caches[i][1]
            o = f.scaled_dot_product_attention(q, k, v, is_causal=caches is None, enable_gqa=True)
            x = x + f.linear(o.transpose(1, 2).reshape(b, n, -1), out)
            gate, value = f.linear(f.rms_norm(x, (self.w,), self.norm), up).chunk(2, -1)
            x = x + f.linear(f.silu(gate) * value, down)
        return f.linear(f.rms_norm(x[:, -1:], (self.w,), self.norm), self.head).argmax(-1)


def captured(work: Callable[[], Any]) -> Callable[[], Any]:
    """The same as a CUDA graph, so that launching takes no part in it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def serving(a: argparse.Namespace, meter: EnergyMeter) -> dict[str, Any]:
    """Joules per decoded token by batch and context, and per token of a prompt."""
    rows = []
    plans = [("decode", b, 512) for b in (1, 8, 64, 256)]
    plans += [("decode", 1, 4096), ("decode", 64, 4096), ("prefill", 1, 2048), ("prefill", 8, 2048)]
    with torch.inference_mode():
        for name in a.shapes:
            m = Decoder(SHAPES[name])
            for phase, batch, context in plans:
                caches = m.caches(batch, context) if phase == "decode" else None
                ids = torch.randint(m.v, (batch, 1 if caches else context), device="cuda")
                work = captured(lambda m=m, ids=ids, caches=caches: m.step(ids, caches))
                found = steady(work, 1.5 * a.scale, meter)
                per = batch if phase == "decode" else batch * context
                joules = None if found["joules"] is None else found["joules"] / per
                rows.append(
                    {
                        "model": name,
                        "params": m.parameters,
                        "layers": m.l,
                        "hidden": m.w,
                        "heads": m.h,
                        "kv_heads": m.kv,
                        "head_dim": m.d,
                        "vocab": m.v,
                        "precision": "bfloat16",
                        "phase": phase,
                        "batch": batch,
                        "context": context,
                        "joules_per_token": joules,
                        "tokens_per_second": per / found["seconds"],
                        **found,
                    }
                )
                rate = per / found["seconds"]
                print(
                    f"| {name} | {phase} | {batch} | {context} | {joules or 0:.3g} J | "
                    f"{rate:.4g}/s | {found['watts'] or 0:.0f} W |",
                    flush=True,
                )
                del work, caches
            del m
            torch.cuda.empty_cache()
    return {"rows": rows}


def kernels(a: argparse.Namespace, meter: EnergyMeter) -> dict[str, Any]:
    """A linear layer of n x n on so many tokens: bfloat16, 2:4 zeros, FP8."""
    from torch.sparse import to_sparse_semi_structured

    rows = []
    f = torch.nn.functional
    with torch.inference_mode():
        for n in (4096, 8192):
            w = torch.randn(n, n, device="cuda", dtype=torch.bfloat16) * 0.02
            keep = torch.zeros_like(w, dtype=torch.bool).view(-1, 4)
            keep.scatter_(1, w.view(-1, 4).abs().topk(2, 1).indices, True)
            half = to_sparse_semi_structured(w * keep.view_as(w))
            w8 = (w / w.abs().max() * 448).to(torch.float8_e4m3fn)
            one = torch.ones((), device="cuda")
            for tokens in (16, 256, 4096):
                x = torch.randn(tokens, n, device="cuda", dtype=torch.bfloat16)
                x8 = (x / x.abs().max() * 448).to(torch.float8_e4m3fn)
                ways: dict[str, Callable[[], Tensor]] = {
                    "bfloat16": lambda x=x, w=w: f.linear(x, w),
                    "2:4": lambda x=x, half=half: f.linear(x, half),
                    "fp8": lambda x8=x8, w8=w8, one=one: torch._scaled_mm(
                        x8, w8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16
                    ),
                }
                for way, work in ways.items():
                    found = steady(captured(work), 1.0 * a.scale, meter)
                    rows.append({"n": n, "tokens": tokens, "way": way, **found})
                    base = next(r for r in rows if r["n"] == n and r["tokens"] == tokens)
                    print(
                        f"| {n} | {tokens} | {way} | {found['seconds'] * 1e6:.1f} us | "
                        f"{found['joules'] * 1e3:.3g} mJ | {found['joules'] / base['joules']:.2f} "
                        f"| {found['watts']:.0f} W |",
                        flush=True,
                    )
    return {"rows": rows}


PARTS = {"counter": counter, "tests": tests, "serving": serving, "kernels": kernels}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--scale", type=float, default=1.0, help="of the seconds measured")
    p.add_argument("--limit", type=float, default=90, help="seconds for the tests")
    p.add_argument("--tests", nargs="*", default=[])
    p.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    with EnergyMeter() as meter:
        for part in a.only:
            begun = time.time()
            try:
                found = PARTS[part](a, meter)
            except Exception:
                traceback.print_exc()
                found = {"error": traceback.format_exc()}
            found |= {
                "seconds_in_all": time.time() - begun,
                "command": sys.argv,
                "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                "torch": torch.__version__,
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
            (a.out / f"gpu-{part}.json").write_text(json.dumps(found, indent=1, default=str))


if __name__ == "__main__":
    main()
