"""What metering costs the program that is metered.

    python benchmarks/meter_overhead.py [--seconds 20]

Three figures: the CPU time of the background thread at the default rate as a share of
one CPU, for a plain program and for one with 64 idle threads; the ratio of a busy
loop's speed (per CPU second of its own thread) with and without the meter around it,
in interleaved rounds, beside the same ratio with nothing around it, which is the noise;
and the time to import the meter (fresh processes, as ``-X importtime`` counts it).
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from pathlib import Path
from statistics import median

from joulesmith.energy import EnergyMeter

ROUNDS, WORK_SECONDS = 60, 0.2
IMPORTS = ("joulesmith.energy", "joulesmith.energy.meter")


def share(seconds: float) -> float:
    """CPU seconds per second that an idle program spends while a meter is open."""
    with EnergyMeter():
        time.sleep(0.5)
        cpu, wall = time.process_time(), time.perf_counter()
        time.sleep(seconds)
        return (time.process_time() - cpu) / (time.perf_counter() - wall)


def share_with_threads(seconds: float, threads: int) -> float:
    """The same with threads that wait: the meter looks through them for children."""
    stop = threading.Event()
    idle = [threading.Thread(target=stop.wait, daemon=True) for _ in range(threads)]
    for t in idle:
        t.start()
    try:
        return share(seconds)
    finally:
        stop.set()
        for t in idle:
            t.join()


def loops(seconds: float, walls: list[float]) -> float:
    """Iterations of a busy loop per CPU second of the thread that runs it; notes its wall time."""
    wall, begin, n, x = time.perf_counter(), time.thread_time(), 0, 0
    while time.thread_time() - begin < seconds:
        for k in range(2000):
            x = (x * 1103515245 + k) & 0xFFFFFFFF
        n += 1
    walls.append(time.perf_counter() - wall)
    return n / (time.thread_time() - begin)


def ratio(around: Callable[[], AbstractContextManager[object]]) -> str:
    """Speed with / without ``around``, interleaved; median and a 95 % bootstrap interval."""
    ratios: list[float] = []
    walls: list[float] = []
    for k in range(ROUNDS):
        found = {}
        for metered in (k % 2 == 0, k % 2 == 1):
            if metered:
                with around():
                    found[True] = loops(WORK_SECONDS, walls)
            else:
                found[False] = loops(WORK_SECONDS, walls)
        ratios.append(found[True] / found[False])
    rng = random.Random(0)
    medians = sorted(median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    got = WORK_SECONDS * len(walls) / sum(walls)
    return (
        f"{median(ratios):.4f} ({medians[50]:.4f} to {medians[1949]:.4f}), "
        f"the loop having {got:.0%} of a CPU"
    )


def window_cost(n: int = 200) -> float:
    """Seconds of CPU time that opening and closing one window takes."""
    with EnergyMeter() as m:
        begin = time.process_time()
        for _ in range(n):
            with m.window("w"):
                pass
        return (time.process_time() - begin) / n


def import_seconds(module: str, runs: int = 7) -> tuple[float, float]:
    """Least and median seconds of ``import module`` in a fresh process, Python's start left out."""
    found = []
    for _ in range(runs):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", f"import {module}"],
            capture_output=True,
            text=True,
            check=True,
        )
        package = module.split(".")[0]
        total = 0
        for line in done.stderr.splitlines():
            cumulative, _, name = line.removeprefix("import time:").rpartition("|")
            # Imports of the top level only: what they pull in is inside their own figure.
            if name.startswith(f" {package}"):
                total += int(cumulative.split("|")[1])
        found.append(total * 1e-6)
    return min(found), median(found)


def beside() -> str:
    """How busy the machine is with other work, which makes the figures worse."""
    try:
        return f"Load average: {os.getloadavg()[0]:.1f}."
    except (AttributeError, OSError):
        return ""


def main() -> None:
    """The table goes to the screen and to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=20.0)
    seconds = parser.parse_args().seconds
    rows = [
        ("background thread, share of one CPU", f"{share(seconds):.2%}"),
        ("the same, program of 64 threads", f"{share_with_threads(seconds, 64):.2%}"),
    ]
    meter = EnergyMeter()  # made once: what it costs to make one is no part of a long run
    rows.append(("busy loop with / without the meter, speed", ratio(lambda: meter)))
    rows.append(("busy loop with / without nothing (noise)", ratio(nullcontext)))
    rows.append(("one window, CPU time", f"{window_cost() * 1e6:.0f} µs"))
    for module in IMPORTS:
        least, typical = import_seconds(module)
        rows.append((f"import {module}", f"{least:.3f} s least, {typical:.3f} s median"))
    with EnergyMeter() as m:
        source = m.source
    lines = [
        f"# What metering costs ({date.today()})",
        "",
        "`python benchmarks/meter_overhead.py`",
        "",
        f"{os.cpu_count()} CPUs, {platform.system()}, Python {platform.python_version()}; joules:",
        f"{source}.",
        f"Busy loop: median of interleaved rounds, 95 % interval. {beside()}",
        "The meter looks by wall time, so a loop with part of a CPU loses more of its time.",
        "",
        "| what | figure |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "meter_overhead.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
