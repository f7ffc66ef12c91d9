"""What a GPU's own counter says: how good it is and whether our meter agrees with it, joules of
decoding and of prefill by batch, of products in several forms, of training; whether tests pass.

    python benchmarks/gpu.py --out DIR [--only counter tests serving kernels training] [--minutes 5]

Each part runs in a process and a time of its own; one that fails is noted and the rest goes on.
Joules are the board's, by NVML, idle draw included. A peer process reads the raw counter beside the
meter all the while. Weights are random, of the shapes of public models. Writes DIR/gpu.md and
DIR/gpu.json and changes no setting of the board. ``--tiny`` tries the script itself, on any device.
"""

from __future__ import annotations

import argparse
import bisect
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
LIMITS = {"counter": 75.0, "tests": 75.0, "serving": 95.0, "kernels": 65.0, "training": 60.0}
"""Most seconds of each part, its start included."""
SHAPES = {
    "135M": (576, 1536, 30, 9, 3, 49152, True),
    "1.1B": (2048, 5632, 22, 32, 4, 32000, False),
    "8B": (4096, 14336, 32, 32, 8, 128256, False),
    "tiny": (64, 96, 2, 4, 2, 256, True),
}
"""Width, neurons, layers, heads, key-value heads, vocabulary, tied: SmolLM2-135M, TinyLlama-1.1B,
Llama-3-8B, and one to try the script with."""
TESTS = (
    "tests/energy", "tests/train/test_devices.py", "tests/train/test_loop.py",
    "tests/train/test_live.py", "tests/train/test_sparse.py", "tests/train/test_teacher.py",
    "tests/train/test_distil.py", "tests/train/test_recover.py",
)  # fmt: skip


# ---- the peer: the raw counter, in a process of its own


def peer(path: Path) -> None:
    """Writes "seconds millijoules milliwatts instant-milliwatts" whenever one of them changed, and
    every 20 ms, until standard input ends."""
    import select

    import pynvml as n

    n.nvmlInit()
    gpu = n.nvmlDeviceGetHandleByIndex(0)

    def ask(read: Callable[[], Any]) -> float:
        try:
            return float(read())
        except Exception:
            return math.nan

    def instant() -> Any:
        found = n.nvmlDeviceGetFieldValues(gpu, [n.NVML_FI_DEV_POWER_INSTANT])[0]
        return found.value.uiVal if found.nvmlReturn == 0 else math.nan

    last: tuple[float, ...] = ()
    told = 0.0
    with path.open("w", buffering=1) as out:
        while not select.select([sys.stdin], [], [], 0.0005)[0]:
            begun = time.perf_counter()
            energy = ask(lambda: n.nvmlDeviceGetTotalEnergyConsumption(gpu))
            at = 0.5 * (begun + time.perf_counter())
            now = (energy, ask(lambda: n.nvmlDeviceGetPowerUsage(gpu)), ask(instant))
            if now != last or at - told > 0.02:
                out.write(f"{at:.6f} {now[0]:.0f} {now[1]:.0f} {now[2]:.0f}\n")
                last, told = now, at


@dataclass
class Trace:
    """What the peer saw: seconds on `time.perf_counter`, joules, watts averaged and at once."""

    t: list[float]
    joules: list[float]
    watts: list[float]
    instant: list[float]

    def ticks(self) -> tuple[list[float], list[float]]:
        """When the counter moved, and to what."""
        moved = [i for i in range(1, len(self.t)) if self.joules[i] != self.joules[i - 1]]
        return [self.t[i] for i in moved], [self.joules[i] for i in moved]

    def period(self, of: Sequence[float]) -> float | None:
        """Median seconds between two changes."""
        moved = [self.t[i] for i in range(1, len(of)) if of[i] != of[i - 1]]
        return float(np.median(np.diff(moved))) if len(moved) > 2 else None

    def between(self, a: float, b: float) -> float | None:
        """Joules of a span, the counter's movement by straight lines between its ticks."""
        t, joules = self.ticks()
        if len(t) < 2 or t[0] > a or t[-1] < b - 0.5:
            return None
        low, high = np.interp([a, b], t, joules)
        if b > t[-1]:
            high += (b - t[-1]) * (joules[-1] - joules[-2]) / (t[-1] - t[-2])
        return float(high - low)

    def slope(self, a: float, b: float) -> float | None:
        """Watts from the first tick to the last within a span."""
        t, joules = self.ticks()
        i, j = bisect.bisect_left(t, a), bisect.bisect_right(t, b) - 1
        return (joules[j] - joules[i]) / (t[j] - t[i]) if j > i else None

    def integral(self, of: Sequence[float], a: float, b: float) -> float | None:
        """Joules of a span from readings of power, by the trapezoid rule."""
        inner = [i for i, t in enumerate(self.t) if a <= t <= b]
        if len(inner) < 2:
            return None
        t = [a, *(self.t[i] for i in inner), b]
        watts = [of[inner[0]], *(of[i] for i in inner), of[inner[-1]]]
        found = float(np.trapezoid(watts, t))
        return found if math.isfinite(found) else None


class Peer:
    """The peer process, and what it has written so far."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp()) / "peer.txt"
        self.process: Any = subprocess.Popen(
            [sys.executable, __file__, "--peer", str(self.path)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    def close(self) -> None:
        """Ends it."""
        with suppress(Exception):
            self.process.stdin.close()
            self.process.wait(5)

    def trace(self, since: float = -math.inf) -> Trace:
        """From a second before ``since`` on; waits for the tick after now."""
        time.sleep(0.15)
        rows = []
        with suppress(OSError):
            for line in self.path.read_text().splitlines():
                values = [float(x) for x in line.split()]
                if len(values) == 4 and values[0] >= since - 1:
                    rows.append(values)
        return Trace(
            [r[0] for r in rows], [r[1] / 1e3 for r in rows],
            [r[2] / 1e3 for r in rows], [r[3] / 1e3 for r in rows],
        )  # fmt: skip


# ---- a part of the benchmark at work


@dataclass
class Bench:
    """Of one part: its device, meter, peer, deadline, and where its results go."""

    a: argparse.Namespace
    device: Any
    meter: Any
    peer: Any
    until: float
    path: Path
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU."""
        return str(self.device) == "cuda"

    @property
    def scale(self) -> float:
        """Of the seconds measured."""
        return 0.1 if self.a.tiny else self.a.scale

    def wait(self) -> None:
        """Until the device has done its work."""
        import torch

        if self.cuda:
            torch.cuda.synchronize()

    def late(self, needed: float = 3.0) -> bool:
        """Whether less than so many seconds are left."""
        return time.time() + needed > self.until

    def keep(self) -> None:
        """Results so far, for a process that may be ended."""
        self.path.write_text(json.dumps(self.found, default=str))

    def part(self, reading: Any) -> Any:
        """The board's in a reading of the machine, without a GPU the processor's."""
        name = "gpu" if self.cuda else "cpu"
        return next((p for p in reading.parts if p.device.startswith(name)), None)

    def steady(self, work: Callable[[], Any], seconds: float, each: int = 1) -> dict[str, Any]:
        """``work``, which does ``each`` of what is counted, again and again for so long: seconds
        and joules of one, watts; by the meter and by the peer's ticks."""
        seconds *= self.scale
        for _ in range(3):
            work()
        self.wait()
        begun = time.perf_counter()
        work()
        self.wait()
        chunk = max(1, min(1000, int(0.03 / max(1e-6, time.perf_counter() - begun))))

        def run(span: float) -> tuple[int, float]:
            count, start = 0, time.perf_counter()
            while True:
                for _ in range(chunk):
                    work()
                count += chunk
                self.wait()
                took = time.perf_counter() - start
                if took >= span:
                    return count, took

        run(0.3 * self.scale)  # power settles
        opened = time.perf_counter()
        with self.meter.window("steady") as window:
            opened = time.perf_counter()
            count, took = run(seconds)
        part = self.part(window.reading)
        joules = None if part is None else part.joules
        raw = self.peer.trace(opened).slope(opened, opened + took)
        done = count * each
        return {
            "seconds": took / done, "count": done,
            "watts": None if joules is None else joules / window.reading.seconds,
            "joules": None if joules is None else joules / window.reading.seconds * took / done,
            "pedigree": None if part is None else part.pedigree,
            "peer_watts": raw, "peer_joules": None if raw is None else raw * took / done,
        }  # fmt: skip

    def captured(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """The same as a CUDA graph, so that launching takes no part in it."""
        import torch

        if not self.cuda:
            return work
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay


def ratio(a: float | None, b: float | None) -> float | None:
    """None where either is unknown."""
    return None if a is None or not b else a / b


def told(x: Any, digits: int = 3) -> str:
    """A figure of a table."""
    if x is None or (isinstance(x, float) and not math.isfinite(x)):
        return "unknown"
    return f"{x:.{digits}g}" if isinstance(x, float) else str(x)


# ---- 1. the counter


def counter(b: Bench) -> None:
    """How often counter and power move, what idling draws, short windows against the long mean, the
    meter against the raw counter and against two integrals of power."""
    import torch

    b.found |= board()
    b.keep()
    time.sleep(2.5 * b.scale)
    now = time.perf_counter()
    b.found["idle_watts_no_context"] = b.peer.trace().slope(now - 2 * b.scale, now)

    n, dtype = (8192, torch.bfloat16) if b.cuda else (512, torch.float32)
    x = torch.randn(n, n, device=b.device, dtype=dtype)

    def busy(seconds: float) -> float:
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            for _ in range(4):
                x @ x
            b.wait()
        return time.perf_counter() - start

    busy(0.1)
    time.sleep(1.5 * b.scale)  # until the averaged power has forgotten it
    begun = time.perf_counter()
    b.meter.measure_idle(2 * b.scale)
    b.found["idle_watts"] = b.peer.trace(begun).slope(begun, time.perf_counter())
    b.found["meter_idle_watts"] = b.meter.idle_watts

    costs = []
    for _ in range(40):
        t = time.perf_counter()
        with b.meter.window("empty"):
            pass
        costs.append(time.perf_counter() - t)
    b.found["window_ms"] = 1e3 * float(np.median(costs))
    b.found["window_ms_most"] = 1e3 * max(costs)
    b.keep()

    busy(1.5 * b.scale)
    spans: list[tuple[float, float, float, Any]] = []
    first = time.perf_counter()
    for length, count in ((0.03, 20), (0.1, 20), (0.3, 10), (1.0, 5), (3.0, 2)):
        for _ in range(count):
            with b.meter.window("short") as window:
                start = time.perf_counter()
                busy(length * b.scale)
            spans.append((length, start, time.perf_counter(), window.reading))
    last = time.perf_counter()
    trace = b.peer.trace(first)
    mean = trace.slope(first, last)
    b.found |= {
        "load_watts": mean, "counter_period": trace.period(trace.joules),
        "power_period": trace.period(trace.watts), "instant_period": trace.period(trace.instant),
        "peer_samples_per_second": len(trace.t) / (trace.t[-1] - trace.t[0]) if trace.t else None,
    }  # fmt: skip
    rows = []
    for length in (0.03, 0.1, 0.3, 1.0, 3.0):
        errors, inside = [], 0
        for _, _, _, reading in (s for s in spans if s[0] == length):
            part = b.part(reading)
            if part is None or part.joules is None or not mean:
                errors.append(None)
                continue
            wanted = mean * reading.seconds
            errors.append(part.joules / wanted - 1)
            inside += part.low <= wanted <= part.high
        known = [abs(e) for e in errors if e is not None]
        rows.append(
            {
                "length": length, "windows": len(errors), "unknown": len(errors) - len(known),
                "median_error": float(np.median(known)) if known else None,
                "most": max(known, default=None), "in_interval": inside,
            }
        )  # fmt: skip
    b.found["windows"] = rows

    def against(name: str, work: Callable[[], Any]) -> None:
        """The meter, the raw counter and integrals of power, of one span."""
        with b.meter.window(name) as window:
            start = time.perf_counter()
            work()
            end = time.perf_counter()
        part, trace = b.part(window.reading), b.peer.trace(start)
        raw = trace.between(start, end)
        joules = None if part is None else part.joules
        b.found.setdefault("against", []).append(
            {
                "load": name, "seconds": end - start, "meter": joules, "counter": raw,
                "meter_over_counter": ratio(joules, raw),
                "power_over_counter": ratio(trace.integral(trace.watts, start, end), raw),
                "instant_over_counter": ratio(trace.integral(trace.instant, start, end), raw),
                "marginal": window.reading.marginal, "all": window.reading.joules,
                "low": None if part is None else part.low,
                "high": None if part is None else part.high,
                "notes": list(window.reading.notes),
            }
        )  # fmt: skip
        b.keep()

    def wave() -> None:
        for _ in range(8):
            busy(0.25 * b.scale)
            time.sleep(0.25 * b.scale)

    against("steady", lambda: busy(4 * b.scale))
    against("idle after load", lambda: time.sleep(3 * b.scale))
    against("square wave, 0.25 s on and off", wave)
    lines = b.peer.trace(time.perf_counter() - 12 * b.scale)
    step = max(1, len(lines.t) // 1500)
    b.found["trace"] = [
        [round(t - lines.t[0], 4), j, w, i]
        for t, j, w, i in zip(
            lines.t[::step], lines.joules[::step], lines.watts[::step], lines.instant[::step],
            strict=True,
        )
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "joulesmith", "doctor"], capture_output=True, text=True, timeout=60
    )
    b.found["doctor"] = (done.stdout + done.stderr)[-6000:]
    done = subprocess.run(
        [
            sys.executable, "-m", "joulesmith", "measure", "--idle", "1", "--",
            sys.executable, "-c", "import time; time.sleep(1)",
        ], capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    b.found["measure"] = (done.stdout + done.stderr)[-4000:]
    b.found["source"] = b.meter.source


def board() -> dict[str, Any]:
    """What the driver says of the board; nothing is set."""
    try:
        import pynvml as n

        n.nvmlInit()
        gpu = n.nvmlDeviceGetHandleByIndex(0)
    except Exception as e:
        return {"nvml": str(e)}
    asked: dict[str, Callable[[], Any]] = {
        "board": lambda: n.nvmlDeviceGetName(gpu),
        "driver": n.nvmlSystemGetDriverVersion,
        "limit_watts": lambda: n.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1e3,
        "persistence": lambda: n.nvmlDeviceGetPersistenceMode(gpu),
        "sm_mhz": lambda: n.nvmlDeviceGetClockInfo(gpu, n.NVML_CLOCK_SM),
        "mig": lambda: n.nvmlDeviceGetMigMode(gpu),
        "processes": lambda: [p.pid for p in n.nvmlDeviceGetComputeRunningProcesses(gpu)],
    }
    costs: dict[str, Callable[[], Any]] = {
        "energy": lambda: n.nvmlDeviceGetTotalEnergyConsumption(gpu),
        "power": lambda: n.nvmlDeviceGetPowerUsage(gpu),
        "processes": lambda: n.nvmlDeviceGetComputeRunningProcesses(gpu),
        "memory": lambda: n.nvmlDeviceGetMemoryInfo(gpu),
    }
    found: dict[str, Any] = {}
    for name, ask in asked.items():
        try:
            found[name] = ask()
        except Exception as e:
            found[name] = f"not told: {e}"
    for name, ask in costs.items():
        with suppress(Exception):
            times = []
            for _ in range(20):
                t = time.perf_counter()
                ask()
                times.append(time.perf_counter() - t)
            found[f"call_ms_{name}"] = 1e3 * float(np.median(times))
    return found


# ---- 2. the tests


def tests(b: Bench) -> None:
    """Those of meters and of training, where a GPU is."""
    words = [t for t in (b.a.tests or TESTS) if Path(t).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=12", "-p", "no:cacheprovider"]
    if not b.a.tiny:
        command += ["-n", "14", "--durations=8"]
    left = max(10.0, b.until - time.time() - 3)
    try:
        done = subprocess.run(
            [*command, *words], capture_output=True, text=True, timeout=left, check=False
        )
        out, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as e:
        out, code = ((e.stdout or b"") + (e.stderr or b"")).decode(errors="replace"), -1
    b.found |= {"code": code, "output": out[-30000:], "tests": words}
    print(out[-4500:])


# ---- 3. serving


class Decoder:
    """A Llama of random weights in bfloat16, its cache of fixed length. No rotary embedding and no
    sampling but the likeliest token; norms and products are torch's own, one kernel each."""

    def __init__(self, shape: tuple[int, int, int, int, int, int, bool], device: Any) -> None:
        import torch

        self.w, self.f, self.l, self.h, self.kv, self.v, self.tied = shape
        self.d, self.device = self.w // self.h, device
        self.torch = torch

        def matrix(rows: int, columns: int) -> Any:
            m = torch.empty(rows, columns, device=device, dtype=torch.bfloat16)
            return m.normal_(0, 0.02)

        both = (self.h + 2 * self.kv) * self.d
        self.blocks = [
            [
                matrix(both, self.w), matrix(self.w, self.w), matrix(2 * self.f, self.w),
                matrix(self.w, self.f),
            ]
            for _ in range(self.l)
        ]  # fmt: skip
        self.embed = matrix(self.v, self.w)
        self.head = self.embed if self.tied else matrix(self.v, self.w)
        self.norm = torch.ones(self.w, device=device, dtype=torch.bfloat16)

    @property
    def parameters(self) -> int:
        """Of all matrices."""
        own = sum(p.numel() for block in self.blocks for p in block) + self.embed.numel()
        return own if self.tied else own + self.head.numel()

    def caches(self, batch: int, length: int) -> list[Any]:
        """Keys and values of so many tokens, layer by layer."""
        shape = (2, batch, self.kv, length, self.d)
        return [
            self.torch.empty(shape, device=self.device, dtype=self.torch.bfloat16).normal_()
            for _ in self.blocks
        ]

    def step(self, ids: Any, caches: list[Any] | None) -> Any:
        """ids (batch, n): with a cache one new token, its last; without, a whole prompt -> ids."""
        f = self.torch.nn.functional
        x = self.embed[ids]
        b, n, _ = x.shape
        for i, (qkv, out, up, down) in enumerate(self.blocks):
            y = f.linear(f.rms_norm(x, (self.w,), self.norm), qkv)
            q, k, v = (
                part.view(b, n, -1, self.d).transpose(1, 2)
                for part in y.split((self.h * self.d, self.kv * self.d, self.kv * self.d), -1)
            )
            if caches is not None:
                caches[i][0, :, :, -1:] = k
                caches[i][1, :, :, -1:] = v
                k, v = caches[i][0], caches[i][1]
            o = f.scaled_dot_product_attention(q, k, v, is_causal=caches is None, enable_gqa=True)
            x = x + f.linear(o.transpose(1, 2).reshape(b, n, -1), out)
            gate, value = f.linear(f.rms_norm(x, (self.w,), self.norm), up).chunk(2, -1)
            x = x + f.linear(f.silu(gate) * value, down)
        return f.linear(f.rms_norm(x[:, -1], (self.w,), self.norm), self.head).argmax(-1)


def serving(b: Bench) -> None:
    """Joules of a decoded token by batch and context, and of a token of a prompt."""
    import torch

    rows: list[dict[str, Any]] = []
    b.found["rows"] = rows
    begun = time.perf_counter()
    time.sleep(1.5 * b.scale)
    b.found["idle_watts"] = b.peer.trace(begun).slope(begun, time.perf_counter())
    names = ["tiny"] if b.a.tiny else b.a.shapes
    long = 64 if b.a.tiny else 512
    plans: list[tuple[str, int, int, bool]] = [
        ("decode", 1, long, True), ("decode", 8, long, True), ("decode", 64, long, True),
        ("decode", 256, long, True), ("prefill", 1, 4 * long, True), ("decode", 64, 8 * long, True),
        ("decode", 1, long, False), ("prefill", 8, 4 * long, True), ("decode", 1, 8 * long, True),
    ]  # fmt: skip
    with torch.inference_mode():
        for name in names:
            m = Decoder(SHAPES[name], b.device)
            for phase, batch, context, graph in plans:
                if b.late() or (not graph and name == "8B"):
                    continue
                row: dict[str, Any] = {
                    "model": name, "params": m.parameters, "layers": m.l, "hidden": m.w,
                    "heads": m.h, "kv_heads": m.kv, "head_dim": m.d, "neurons": m.f, "vocab": m.v,
                    "precision": "bfloat16", "phase": phase, "batch": batch, "context": context,
                    "launch": "graph" if graph else "eager",
                }  # fmt: skip
                rows.append(row)
                try:
                    caches = m.caches(batch, context) if phase == "decode" else None
                    ids = torch.randint(m.v, (batch, 1 if caches else context), device=b.device)

                    def work(ids: Any = ids, caches: Any = caches, m: Any = m) -> Any:
                        return m.step(ids, caches)

                    found = b.steady(b.captured(work) if graph else work, 1.4)
                    per = batch if phase == "decode" else batch * context
                    read = 2 * (m.parameters - (0 if m.tied else m.embed.numel()))
                    if caches is not None:
                        read += sum(2 * c.numel() for c in caches)
                    row |= {
                        **found, "joules_per_token": ratio(found["joules"], per),
                        "peer_joules_per_token": ratio(found["peer_joules"], per),
                        "tokens_per_second": per / found["seconds"],
                        "bytes_per_step": read, "gb_per_second": read / found["seconds"] / 1e9,
                    }  # fmt: skip
                    del caches, ids, work
                except Exception as e:
                    row["error"] = f"{type(e).__name__}: {str(e)[:200]}"
                print(serving_line(row), flush=True)
                b.keep()
            del m
            if b.cuda:
                torch.cuda.empty_cache()


def serving_line(r: dict[str, Any]) -> str:
    """A row of the table."""
    head = f"| {r['model']} | {r['phase']} | {r['batch']} | {r['context']} | {r['launch']} | "
    if "error" in r:
        return f"{head}{r['error']} |||||"
    return head + (
        f"{told(r['joules_per_token'])} | {told(r['peer_joules_per_token'])} | "
        f"{told(r['tokens_per_second'], 4)} | {told(r['watts'])} | {told(r['gb_per_second'])} |"
    )


# ---- 4. products


def kernels(b: Bench) -> None:
    """A linear layer of n x n on so many tokens: bfloat16, half its rows removed, 2:4 zeros, FP8.
    Each product takes the next of several weights, more than a cache holds."""
    import torch
    from torch.nn.functional import linear

    rows: list[dict[str, Any]] = []
    b.found["rows"] = rows
    dtype = torch.bfloat16
    sizes = ((256, 2),) if b.a.tiny else ((4096, 16), (8192, 4))
    counts = (16,) if b.a.tiny else (1, 16, 256, 4096)
    with torch.inference_mode():
        for n, ring in sizes:
            dense, removed, eights = [], [], []
            zeros: list[Any] = []
            for _ in range(ring):
                w = torch.empty(n, n, device=b.device, dtype=dtype).normal_(0, 0.02)
                dense.append(w)
                removed.append(w[: n // 2].clone())
                eights.append((w.float() * (448 / w.abs().max().float())).to(torch.float8_e4m3fn))
                zeros.append(_halved(w))
            one = torch.ones((), device=b.device)
            for tokens in counts:
                x = torch.randn(tokens, n, device=b.device, dtype=dtype)
                factor = 448 / x.abs().max().float()
                x8 = (x.float() * factor).to(torch.float8_e4m3fn)
                right = x.float() @ dense[0].float().T
                scale_x, scales = one / factor, [w.abs().max().float() / 448 for w in dense]

                def eight(
                    i: int, x8: Any = x8, w8: Any = eights, s: Any = scales, sx: Any = scale_x
                ):  # type: ignore[no-untyped-def]
                    return torch._scaled_mm(
                        x8, w8[i].t(), scale_a=sx.float(), scale_b=s[i], out_dtype=dtype,
                        use_fast_accum=True,
                    )  # fmt: skip

                for z in zeros:  # its own search, so that it is at its best
                    with suppress(Exception):
                        z.alg_id_cusparselt = _best(z, x)
                        break
                for z in zeros[1:]:
                    z.alg_id_cusparselt = getattr(zeros[0], "alg_id_cusparselt", 0)
                ways: dict[str, tuple[Callable[[int], Any], Any]] = {
                    "bfloat16": (lambda i, x=x, w=dense: linear(x, w[i]), right),
                    "half the rows removed": (
                        lambda i, x=x, w=removed: linear(x, w[i]), right[:, : n // 2],
                    ),
                    "2:4 zeros": (
                        lambda i, x=x, w=zeros: linear(x, w[i]),
                        x.float() @ _masked(dense[0]).float().T,
                    ),
                    "fp8": (eight, right),
                }  # fmt: skip
                for way, (one_of, wanted) in ways.items():
                    if b.late():
                        return
                    row: dict[str, Any] = {"n": n, "tokens": tokens, "way": way, "ring": ring}
                    rows.append(row)
                    try:
                        got = one_of(0).float()
                        row["error_of_product"] = float((got - wanted).norm() / wanted.norm())

                        def work(one_of: Any = one_of, ring: int = ring) -> None:
                            for i in range(ring):
                                one_of(i)

                        row["launch"] = "graph"
                        try:
                            ready = b.captured(work)
                        except Exception as e:
                            row["launch"] = f"eager ({str(e)[:80]})"
                            ready = work
                        row |= b.steady(ready, 0.8, each=ring)
                        base = next(
                            r
                            for r in rows
                            if (r["n"], r["tokens"]) == (n, tokens) and "joules" in r
                        )
                        row["joules_ratio"] = ratio(row["joules"], base["joules"])
                        row["seconds_ratio"] = ratio(row["seconds"], base["seconds"])
                    except Exception as e:
                        row["error"] = f"{type(e).__name__}: {str(e)[:160]}"
                    print(kernel_line(row), flush=True)
                    b.keep()


def _masked(w: Any) -> Any:
    """The two largest of every four."""
    four = w.abs().view(-1, 4)
    keep = four.new_zeros(four.shape, dtype=bool).scatter_(1, four.topk(2, 1).indices, True)
    return w * keep.view_as(w)


def _halved(w: Any) -> Any:
    """2:4 zeros in torch's own form; on a processor, which has none, the dense matrix."""
    from torch.sparse import to_sparse_semi_structured

    return to_sparse_semi_structured(_masked(w)) if w.is_cuda else _masked(w)


def _best(z: Any, x: Any) -> int:
    """cuSPARSELt's quickest algorithm for this product."""
    import torch

    wide = x.t() if x.shape[0] >= 16 else x.new_zeros(16, x.shape[1]).t()
    return int(torch._cslt_sparse_mm_search(z.packed, wide.contiguous()))


def kernel_line(r: dict[str, Any]) -> str:
    """A row of the table."""
    head = f"| {r['n']} | {r['tokens']} | {r['way']} | "
    if "error" in r:
        return f"{head}{r['error']} ||||||"
    return head + (
        f"{r['seconds'] * 1e6:.4g} | {told(None if r['joules'] is None else r['joules'] * 1e3)} | "
        f"{told(r['seconds_ratio'])} | {told(r['joules_ratio'])} | {told(r['watts'])} | "
        f"{r['error_of_product']:.1g} |"
    )


# ---- 5. training


@dataclass(frozen=True)
class Plan:
    """One way to train. size: width, layers, heads, key-value heads, neurons, vocabulary."""

    name: str
    size: tuple[int, int, int, int, int, int]
    batch: int
    length: int
    how: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


_SMALL, _SMOL = (192, 6, 6, 6, 512, 256), (576, 30, 9, 3, 1536, 49152)
_LARGE = (2048, 22, 32, 4, 5632, 32000)
PLANS = (
    Plan("2.8M", _SMALL, 64, 256),
    Plan("2.8M", _SMALL, 64, 256, "muon", {"optimizer": "muon"}),
    Plan("2.8M", _SMALL, 64, 256, "RigL, 80 % zeros"),
    Plan("2.8M", _SMALL, 64, 256, "distilled, teacher there"),
    Plan("135M", _SMOL, 8, 1024),
    Plan("135M", _SMOL, 8, 1024, "recomputed", {"recompute": True}),
    Plan("135M", _SMOL, 8, 1024, "float32", {"precision": "float32"}),
    Plan("1.1B", _LARGE, 8, 1024),
    Plan("1.1B", _LARGE, 8, 1024, "recomputed", {"recompute": True}),
    Plan("2.8M", _SMALL, 64, 256, "adafactor", {"optimizer": "adafactor"}),
    Plan("2.8M", _SMALL, 64, 256, "momentum", {"optimizer": "momentum"}),
    Plan("2.8M", _SMALL, 16, 256, "a small batch"),
    Plan("2.8M", _SMALL, 256, 256, "a large batch"),
)


def training(b: Bench) -> None:
    """Joules of a trained token of random text, in the loop of `joulesmith.train`."""
    import torch
    from small_llamas import HARD, Board, llama

    from joulesmith.train.distil import Distil
    from joulesmith.train.loop import train
    from joulesmith.train.recover_settings import DistilSettings
    from joulesmith.train.settings import TrainSettings
    from joulesmith.train.sparse import SparseTraining
    from joulesmith.train.sparse_settings import SparseSettings

    rows: list[dict[str, Any]] = []
    b.found["rows"] = rows
    meter, device = Board(b.meter), torch.device(b.device)
    for plan in PLANS:
        if b.late(8):
            return
        width, layers, heads, kv, neurons, vocab = (64, 2, 2, 2, 96, 256) if b.a.tiny else plan.size
        batch, length = (2, 32) if b.a.tiny else (plan.batch, plan.length)
        row: dict[str, Any] = {
            "model": plan.name,
            "how": plan.how,
            "batch": batch,
            "length": length,
        }
        rows.append(row)
        try:
            module = llama(
                width, layers, 0, device, vocab, length, heads,
                num_key_value_heads=kv, intermediate_size=neurons,
                tie_word_embeddings=vocab > 40000,
            )  # fmt: skip
            objective = Distil(HARD)
            if plan.how.startswith("distilled"):
                teacher = llama(2 * width, layers, 1, device, vocab, length).requires_grad_(False)
                objective = Distil(DistilSettings(hard=0.5, soft=0.5), teacher=teacher)
            windows = np.random.default_rng(0).integers(0, vocab, (512, length)).astype(np.int32)

            def run(
                steps: int, module: Any = module, plan: Plan = plan, objective: Any = objective,
                batch: int = batch, windows: Any = windows,
            ) -> Any:  # fmt: skip
                usual = {"optimizer": "adamw", "rate": 1e-4, "precision": "bfloat16"}
                s = TrainSettings(
                    steps=steps, batch=batch, micro=batch, **{**usual, **plan.settings}
                )
                hook = None
                if plan.how.startswith("RigL"):
                    chosen = SparseSettings(
                        method="rigl", sparsity=0.8, layers=("*.layers.*",), every=10, until=steps
                    )
                    hook = SparseTraining(module, chosen, s)
                return train(module, windows, objective, s, meter=meter, hook=hook)

            run(3)
            if b.cuda:
                torch.cuda.reset_peak_memory_stats()
            begun = time.perf_counter()
            run(4)
            b.wait()
            one = (time.perf_counter() - begun) / 4
            found = run(max(4, int(2.0 * b.scale / one)))
            tokens = found.steps * batch * (length - 1)
            params = sum(p.numel() for p in module.parameters())
            row |= {
                "params": params, "precision": plan.settings.get("precision", "bfloat16"),
                "steps": found.steps, "seconds_per_step": found.seconds / found.steps,
                "joules": found.joules, "pedigree": found.pedigree,
                "joules_per_token": ratio(found.joules, tokens),
                "tokens_per_second": tokens / found.seconds,
                "watts": ratio(found.joules, found.seconds),
                "peak_bytes": torch.cuda.max_memory_allocated() if b.cuda else None,
                "tflops": 6 * params * tokens / found.seconds / 1e12, "notes": list(found.notes),
            }  # fmt: skip
        except Exception as e:
            row["error"] = f"{type(e).__name__}: {str(e)[:200]}"
            traceback.print_exc()
        module = objective = run = None  # type: ignore[assignment]
        if b.cuda:
            torch.cuda.empty_cache()
        print(training_line(row), flush=True)
        b.keep()


def training_line(r: dict[str, Any]) -> str:
    """A row of the table."""
    head = f"| {r['model']} | {r['how'] or 'AdamW, bfloat16'} | {r['batch']} x {r['length']} | "
    if "error" in r:
        return f"{head}{r['error']} ||||||"
    peak = None if r["peak_bytes"] is None else r["peak_bytes"] / 1e9
    return head + (
        f"{told(1e3 * r['seconds_per_step'])} | {told(ratio(r['joules'], r['steps']))} | "
        f"{told(r['joules_per_token'])} | {told(r['watts'])} | {told(peak)} | {told(r['tflops'])} |"
    )


PARTS: dict[str, Callable[[Bench], None]] = {
    "counter": counter, "tests": tests, "serving": serving, "kernels": kernels,
    "training": training,
}  # fmt: skip


# ---- all of them


@contextmanager
def bench(a: argparse.Namespace) -> Iterator[Bench]:
    """For the part that this process runs."""
    import torch

    from joulesmith.energy.meter import EnergyMeter

    device = a.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if a.part == "tests":  # has nothing of its own to measure
        yield Bench(a, device, None, None, a.until, a.path)
        return
    other = Peer()
    try:
        with EnergyMeter() as meter:
            yield Bench(a, device, meter, other, a.until, a.path)
            meter.close()
    finally:
        other.close()


def one(a: argparse.Namespace) -> None:
    """The part, in this process."""
    import torch

    with bench(a) as b:
        try:
            PARTS[a.part](b)
        except Exception:
            traceback.print_exc()
            b.found["error"] = traceback.format_exc()[-3000:]
        b.found |= {
            "device": torch.cuda.get_device_name() if b.cuda else platform.processor() or "cpu",
            "torch": torch.__version__, "python": platform.python_version(),
        }  # fmt: skip
        b.keep()


def markdown(a: argparse.Namespace, found: dict[str, Any]) -> str:
    """The report."""
    any_part = next(iter(found.values()), {})
    c = found.get("counter", {})
    out = [
        "# Joules of a GPU, by its own counter\n",
        f"{datetime.now(timezone.utc):%Y-%m-%d}, {any_part.get('device', 'unknown')}, driver "
        f"{c.get('driver', 'unknown')}, torch {any_part.get('torch')}, Python "
        f"{any_part.get('python')}, {os.cpu_count()} CPUs. "
        "`python benchmarks/gpu.py " + " ".join(_command(a)) + "`\n",
        "Joules are the whole board's, idle draw included, by NVML's energy counter through "
        "`EnergyMeter`; *peer* is the raw counter, read by another process, from its first tick to "
        "its last in the same span. Weights are random, of the shapes of public models.\n",
    ]
    if c:
        out += [
            "## The counter\n", "| | |", "| --- | --- |",
            *(
                f"| {k.replace('_', ' ')} | {told(v)} |"
                for k, v in c.items()
                if isinstance(v, int | float | str) and len(str(v)) < 120
            ),
            "\nWindows of a steady load against its long mean:\n",
            "| window, s | windows | median error | most | unknown | mean within our interval |",
            "| --- | --- | --- | --- | --- | --- |",
            *(
                f"| {r['length']} | {r['windows']} | {told(r['median_error'])} | "
                f"{told(r['most'])} | {r['unknown']} | {r['in_interval']} |"
                for r in c.get("windows", [])
            ),
            "\nThe meter, the raw counter, and readings of power integrated:\n",
            "| load | s | meter, J | counter, J | meter / counter | power / counter | "
            "instant power / counter | machine above idle, J |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            *(
                f"| {r['load']} | {told(r['seconds'])} | {told(r['meter'], 4)} | "
                f"{told(r['counter'], 4)} | {told(r['meter_over_counter'], 4)} | "
                f"{told(r['power_over_counter'], 4)} | {told(r['instant_over_counter'], 4)} | "
                f"{told(r['marginal'], 4)} |"
                for r in c.get("against", [])
            ),
        ]  # fmt: skip
    if rows := found.get("serving", {}).get("rows"):
        out += [
            "\n## Serving\n",
            f"Idle {told(found['serving'].get('idle_watts'))} W. One step as a CUDA graph, or "
            "eager. GB/s: weights and cache over time.\n",
            "| model | phase | batch | context | launch | J/token | by peer | tokens/s | W | "
            "GB/s |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            *map(serving_line, rows),
        ]
    if rows := found.get("training", {}).get("rows"):
        out += [
            "\n## Training\n", training.__doc__ or "",
            "\n| model | how | batch | ms/step | J/step | J/token | W | peak GB | TFLOP/s |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            *map(training_line, rows),
        ]  # fmt: skip
    if rows := found.get("kernels", {}).get("rows"):
        out += [
            "\n## Products\n", kernels.__doc__ or "",
            "\n| n | tokens | form | us | mJ | time / bf16 | joules / bf16 | W | error |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            *map(kernel_line, rows),
        ]  # fmt: skip
    both = [
        r["watts"] / r["peer_watts"]
        for part in ("serving", "kernels")
        for r in found.get(part, {}).get("rows", [])
        if r.get("watts") and r.get("peer_watts")
    ]
    if both:
        out.append(
            f"\nMeter over peer in the {len(both)} windows of both tables: median "
            f"{np.median(both):.4f}, {min(both):.3f} to {max(both):.3f}."
        )
    for name in found:
        if "error" in found[name]:
            out.append(f"\n{name} failed:\n\n```\n{found[name]['error'][-1500:]}\n```")
    return "\n".join(out) + "\n"


def _command(a: argparse.Namespace) -> list[str]:
    """As it was called, but for where the results went."""
    words = ["--only", *a.only]
    return [*words, "--scale", f"{a.scale:g}"] if a.scale != 1 else words


def csv(rows: list[dict[str, Any]]) -> str:
    """Of serving, for the estimator."""
    names = (
        "device", "model", "params", "layers", "hidden", "heads", "kv_heads", "head_dim", "neurons",
        "vocab", "phase", "batch", "context", "precision", "launch", "watts", "joules_per_token",
        "peer_joules_per_token", "tokens_per_second", "gb_per_second", "pedigree",
    )  # fmt: skip
    lines = [",".join(names)]
    lines += [",".join(str(r.get(n, "")) for n in names) for r in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path)
    p.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--device", default="auto")
    p.add_argument("--scale", type=float, default=1.0, help="of the seconds measured")
    p.add_argument("--minutes", type=float, default=5.0, help="for all parts")
    p.add_argument("--tests", nargs="*", default=[])
    p.add_argument("--shapes", nargs="+", choices=SHAPES, default=["135M", "1.1B", "8B"])
    p.add_argument("--tiny", action="store_true", help="try the script")
    p.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    p.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    p.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    p.add_argument("--until", type=float, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.peer:
        return peer(a.peer)
    if a.part:
        return one(a)
    a.out.mkdir(parents=True, exist_ok=True)
    end = time.time() + 60 * a.minutes
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in a.only:
            begun = time.time()
            until = min(end, begun + LIMITS[name])
            if until - begun < 8:
                found[name] = {"error": "no time was left"}
                continue
            path = Path(folder) / f"{name}.json"
            words = [*sys.argv[1:], "--part", name, "--path", str(path), "--until", str(until)]
            process = subprocess.Popen([sys.executable, __file__, *words])
            try:
                process.wait(until - begun + 4)
                note = "" if process.returncode == 0 else f"exit {process.returncode}"
            except subprocess.TimeoutExpired:
                process.kill()
                note = "stopped at its time"
            found[name] = json.loads(path.read_text()) if path.exists() else {}
            if note and "error" not in found[name]:
                found[name]["error"] = note
            found[name]["seconds_in_all"] = time.time() - begun
            print(f"== {name}: {time.time() - begun:.0f} s {note}", flush=True)
            (a.out / "gpu.json").write_text(json.dumps(found, indent=1, default=str))
            (a.out / "gpu.md").write_text(markdown(a, found))
            if name == "serving":
                rows = found[name].get("rows", [])
                device = found[name].get("device", "")
                (a.out / "serving.csv").write_text(csv([{"device": device, **r} for r in rows]))
    print(markdown(a, found))
    return None


if __name__ == "__main__":
    main()
