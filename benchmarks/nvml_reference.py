"""A GPU's energy counter against its own power readings, integrated.

    python benchmarks/nvml_reference.py [--seconds 30] [--gpu 0]

Under steady load (matrix products that keep the board busy) and under a square wave
(half a second busy, half a second idle), the counter's joules (`Gpu` with the counter)
and the trapezoid of sampled power (`Gpu` without it, read every 20 ms) are taken over
the same span. Needs an NVIDIA GPU and a torch that runs on it; without one it says so
and exits with 2. Prints a table in Markdown; keep it as benchmarks/results/nvml_reference.md.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable
from datetime import date
from typing import Any

from joulesmith.energy.nvml import Gpu

EVERY = 0.02
"""Seconds between power samples; boards refresh theirs every 20 to 100 ms."""
HALF_WAVE = 0.5


class PowerOnly:
    """The driver's library without its energy counter, so that `Gpu` samples power."""

    def __init__(self, lib: Any) -> None:
        self._lib = lib

    def __getattr__(self, name: str) -> Any:
        if name == "nvmlDeviceGetTotalEnergyConsumption":
            raise AttributeError(name)
        return getattr(self._lib, name)


def both(
    lib: Any, handle: Any, index: int, work: Callable[[float], None], seconds: float
) -> tuple[float, float, int]:
    """Joules by the counter, joules by power samples, and how many samples, while ``work`` runs.

    work(seconds): keeps the board as busy as it shall be. Raises `SystemExit` where the
    board has no counter or tells no power.
    """
    counter, power = Gpu(lib, handle, index), Gpu(PowerOnly(lib), handle, index)
    if not counter.counts:
        raise SystemExit(f"GPU {index} ({counter.name}) has no energy counter to check")
    done, samples = threading.Event(), 0

    def sample() -> None:
        nonlocal samples
        while not done.is_set():
            power.read(time.perf_counter())
            samples += 1
            done.wait(EVERY)

    thread = threading.Thread(target=sample)
    first = counter.read(time.perf_counter())
    start = power.read(time.perf_counter())
    thread.start()
    try:
        work(seconds)
    finally:
        done.set()
        thread.join()
    last = counter.read(time.perf_counter())
    stop = power.read(time.perf_counter())
    if first is None or last is None or start is None or stop is None:
        raise SystemExit(f"GPU {index} stopped answering: {[*counter.notes, *power.notes]}")
    return last.joules - first.joules, stop.joules - start.joules, samples


def steady(torch: Any, device: str) -> Callable[[float], None]:
    """Matrix products without a pause."""
    a = torch.randn(4096, 4096, device=device, dtype=torch.float16)

    def work(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for _ in range(10):
                a @ a
            torch.cuda.synchronize(device)

    return work


def square(busy: Callable[[float], None]) -> Callable[[float], None]:
    """Half a wave of ``busy``, half a wave of nothing, in turn."""

    def work(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            busy(HALF_WAVE)
            time.sleep(HALF_WAVE)

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--gpu", type=int, default=0)
    given = parser.parse_args()
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(given.gpu)
    except Exception as e:
        print(f"no NVIDIA GPU to check: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    if not torch.cuda.is_available():
        print("this torch does not run on the GPU: install a CUDA build", file=sys.stderr)
        raise SystemExit(2)
    busy = steady(torch, f"cuda:{given.gpu}")
    busy(3.0)  # clocks and temperature settle
    print(f"# NVML's counter against integrated power ({date.today()})\n")
    print(f"`python benchmarks/nvml_reference.py --seconds {given.seconds:g}`\n")
    print(f"{pynvml.nvmlDeviceGetName(handle)}, power read every {1000 * EVERY:g} ms.\n")
    print("| load | counter, J | integrated power, J | difference | samples |")
    print("|---|---|---|---|---|")
    for name, work in (("steady", busy), ("square wave, 0.5 s + 0.5 s", square(busy))):
        counted, integrated, n = both(pynvml, handle, given.gpu, work, given.seconds)
        print(
            f"| {name} | {counted:.1f} | {integrated:.1f} | "
            f"{100 * (integrated / counted - 1):+.1f} % | {n} |"
        )


if __name__ == "__main__":
    main()
