"""joulesmith's meter beside CodeCarbon (offline) and Zeus: same programs, same machine.

    python benchmarks/meter_peers.py --peers PYTHON [--seconds 5] [--rounds 3]

PYTHON is an interpreter that has the peers (``pip install codecarbon zeus`` in an
environment of its own); what it lacks is left out. Four programs of the same duration
and clearly different work run inside each meter, in rounds whose order rotates:
nothing, one CPU for a tenth of the time, one CPU, all CPUs. A meter ranks them when
each step up in CPU seconds costs at least 5 % more joules than the one before, in the
medians.

Also: CPU that the meter itself takes while the program sleeps, time to set up and to
stop, time to import, and third-party packages installed and imported.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

WORK = ("sleep", "tenth", "one", "all")
TITLES = {
    "sleep": "sleeps",
    "tenth": "1 CPU, a tenth of the time",
    "one": "1 CPU",
    "all": "all CPUs",
}
TOOLS = ("joulesmith", "codecarbon", "codecarbon process", "zeus")
IMPORTS = {
    "joulesmith": "from joulesmith.energy import EnergyMeter",
    "codecarbon": "from codecarbon import OfflineEmissionsTracker",
    "zeus": "from zeus.monitor import ZeusMonitor",
}
STEP = 1.05
BUSY = 0.2
QUIET = 20.0  # CodeCarbon looks every 15 s


# ---- inside the metered program


def burn(seconds: float, duty: float = 1.0) -> None:
    end = time.perf_counter() + seconds
    while (now := time.perf_counter()) < end:
        while time.perf_counter() < now + 0.02 * duty:
            pass
        if duty < 1:
            time.sleep(0.02 * (1 - duty))


def work(name: str, seconds: float) -> None:
    if name == "sleep":
        time.sleep(seconds)
    elif name == "tenth":
        burn(seconds, 0.1)
    elif name == "one":
        burn(seconds)
    else:
        fork = multiprocessing.get_context("fork")
        others = [
            fork.Process(target=burn, args=(seconds,)) for _ in range((os.cpu_count() or 1) - 1)
        ]
        for p in others:
            p.start()
        burn(seconds)
        for p in others:
            p.join()


def children() -> float:
    """CPU seconds of children that have ended."""
    r = resource.getrusage(resource.RUSAGE_CHILDREN)
    return r.ru_utime + r.ru_stime


def meter(tool: str) -> tuple[Any, Any]:
    """Starts a meter; returns what stops it and what then reads it."""
    if tool == "joulesmith":
        from joulesmith.energy import EnergyMeter

        m = EnergyMeter()
        m.__enter__()
        window = m.window("work").start()

        def stop() -> Any:
            reading = window.stop()
            m.__exit__(None, None, None)
            return reading

        return stop, lambda r: (r.joules, r.low, r.high, r.marginal)
    if tool.startswith("codecarbon"):
        from codecarbon import OfflineEmissionsTracker

        tracker = OfflineEmissionsTracker(
            country_iso_code="DEU",
            save_to_file=False,
            log_level="error",
            allow_multiple_runs=True,
            tracking_mode="process" if tool.endswith("process") else "machine",
        )
        tracker.start()

        def told(_: Any) -> tuple[Any, ...]:
            return tracker.final_emissions_data.energy_consumed * 3.6e6, None, None, None

        return tracker.stop, told
    from zeus.monitor import ZeusMonitor

    monitor = ZeusMonitor(log_file=None)
    monitor.begin_window("work")

    def joules(m: Any) -> tuple[Any, ...]:
        parts = [*m.gpu_energy.values()]
        for more in (m.cpu_energy, m.dram_energy):
            parts += list((more or {}).values())
        return (sum(parts) if parts else None), None, None, None

    return lambda: monitor.end_window("work"), joules


def child(tool: str, name: str, seconds: float) -> None:
    """One metered program; prints what was found as JSON on the last line."""
    __import__(IMPORTS[tool.split()[0]].split()[1])
    begin = time.perf_counter()
    stop, read = meter(tool)
    ready, cpu, below = time.perf_counter(), time.process_time(), children()
    work(name, seconds)
    own, below, done = time.process_time() - cpu, children() - below, time.perf_counter()
    result = stop()
    ended = time.perf_counter()
    joules, low, high, marginal = read(result)
    places = [Path(p).resolve() for p in sys.path if p.endswith("-packages")]
    # Modules of one file are packages too; compiled helpers of a package are not its own.
    imported = {
        top
        for top, module in list(sys.modules.items())
        if "." not in top
        and not top.startswith("_")
        and getattr(module, "__file__", None)
        and any(p in Path(str(module.__file__)).resolve().parents for p in places)
    } - {"joulesmith", "distutils", "setuptools"}
    found = {
        "joules": joules, "low": low, "high": high, "marginal": marginal,
        "cpu": own, "work": own + below, "start": ready - begin, "stop": ended - done,
        "imported": sorted(imported),
    }  # fmt: skip
    print("\n" + json.dumps(found))


def closure(package: str) -> list[str]:
    """Distributions that installing a package pulls in, itself included, without extras."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        from packaging.requirements import Requirement
    except ImportError:
        from pip._vendor.packaging.requirements import Requirement

    seen: set[str] = set()
    left = [package]
    while left:
        name = left.pop().lower().replace("_", "-")
        if name in seen:
            continue
        try:
            needs = requires(name) or []
        except PackageNotFoundError:
            continue
        seen.add(name)
        for text in needs:
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                left.append(need.name)
    return sorted(seen)


# ---- outside


def run(python: str, *words: str) -> dict[str, Any] | None:
    """What a child found; ``None`` where it could not."""
    command = [python, str(Path(__file__).resolve()), "--child", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return None
    return found


def cpu_of(python: str, code: str) -> tuple[float, float] | None:
    """CPU and wall seconds of a Python that runs ``code``; ``None`` when it fails."""
    a, begin = os.times(), time.perf_counter()
    done = subprocess.run([python, "-c", code], capture_output=True, check=False)
    wall, b = time.perf_counter() - begin, os.times()
    cpu = b.children_user + b.children_system - a.children_user - a.children_system
    return (cpu, wall) if done.returncode == 0 else None


def busy_others(seconds: float = 2.0) -> float:
    import psutil

    return float(psutil.cpu_percent(seconds)) / 100


def ranks(joules: list[float | None], cpu: list[float | None]) -> str:
    """Whether joules rise where the CPU seconds that the programs got rise."""
    if None in joules:
        return "no: no figure"
    pairs = list(zip(joules, cpu, strict=True))
    real = [(a, b) for a, b in itertools.pairwise(pairs) if (b[1] or 0) > STEP * (a[1] or 0)]
    lost = sum((b[0] or 0) < STEP * (a[0] or 0) for a, b in real)
    return f"no: {lost} of {len(real)} steps lost" if lost else f"yes: {len(real)} steps"


def main() -> None:
    """Runs everything; the tables go to the screen and to benchmarks/results/."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--peers", default=sys.executable, help="Python that has the peers")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        if args.child[0] == "closure":
            print(json.dumps({"names": closure(args.child[1])}))
        else:
            child(args.child[0], args.child[1], float(args.child[2]))
        return

    python = {t: sys.executable if t == "joulesmith" else args.peers for t in TOOLS}
    others = busy_others()
    probes = {t: cpu_of(python[t], IMPORTS[t]) for t in IMPORTS}
    tools = [t for t in TOOLS if probes[t.split()[0]] is not None]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for i in range(args.rounds):
        jobs = [(t, w) for w in WORK for t in tools]
        shift = i % len(jobs)
        for t, w in jobs[shift:] + jobs[:shift]:
            got = run(python[t], t, w, str(args.seconds))
            if got is not None:
                found.setdefault((t, w), []).append(got)
                print(f"{t}, {w}: {got['joules']} J", file=sys.stderr, flush=True)

    def mid(t: str, w: str, key: str) -> float | None:
        values = [r[key] for r in found.get((t, w), []) if r[key] is not None]
        return median(values) if values else None

    def say(value: float | None, form: str) -> str:
        return "none" if value is None else format(value, form)

    lines = [
        f"# The meter beside its peers ({date.today()})",
        "",
        f"`python benchmarks/meter_peers.py --peers PYTHON --seconds {args.seconds:g} "
        f"--rounds {args.rounds}`",
        "",
        f"{os.cpu_count()} CPUs; other programs kept {others:.0%} of the machine busy before the "
        "start. Medians."
        + (
            " **Too busy for a fair comparison**: programs did not get the CPUs they asked for, "
            "meters of the whole machine counted the others."
            if others > BUSY
            else ""
        ),
        "",
        f"## Joules printed for programs of {args.seconds:g} s",
        "",
        "| meter | " + " | ".join(TITLES[w] for w in WORK) + " | ranks them |",
        "|---|" + "---|" * (len(WORK) + 1),
    ]
    rows = [(t, t, "joules") for t in tools]
    rows.insert(1, ("joulesmith, above idle", "joulesmith", "marginal"))
    for title, t, key in rows:
        joules = [mid(t, w, key) for w in WORK]
        cells = []
        for w, j in zip(WORK, joules, strict=True):
            low, high = (mid(t, w, k) if key == "joules" else None for k in ("low", "high"))
            between = f" ({low:.3g} to {high:.3g})" if low is not None and high is not None else ""
            cells.append(say(j, ".3g") + between)
        lines.append(
            f"| {title} | "
            + " | ".join(cells)
            + f" | {ranks(joules, [mid(t, w, 'work') for w in WORK])} |"
        )
    taken = [
        [r["work"] for (_, name), runs in found.items() if name == w for r in runs] for w in WORK
    ]
    lines += [
        "| CPU seconds that the programs got | "
        + " | ".join(f"{min(v):.2f} to {max(v):.2f}" for v in taken)
        + " | |",
    ]
    lines += [
        "",
        "## What metering costs",
        "",
        f"CPU share: of one CPU, by the metering process while the program sleeps {QUIET:g} s. "
        "Import: CPU "
        "and wall seconds of a Python that only imports the meter, less those of an empty one.",
        "",
        "| meter | CPU share | set-up s | stop s | import CPU s | import wall s "
        "| packages installed | third-party packages imported |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for t in tools:
        quiet = run(python[t], t, "sleep", str(QUIET))
        base = t.split()[0]
        pairs = [(cpu_of(python[t], IMPORTS[base]), cpu_of(python[t], "pass")) for _ in range(5)]
        good = [(a, b) for a, b in pairs if a and b]
        cpu = median(a[0] - b[0] for a, b in good)
        wall = median(a[1] - b[1] for a, b in good)
        names = (run(python[t], "closure", base) or {}).get("names")
        imported = found[t, "sleep"][0]["imported"] if (t, "sleep") in found else []
        shown = ", ".join(imported) if len(imported) <= 4 else ""
        lines.append(
            f"| {t} | {say(quiet and quiet['cpu'] / QUIET, '.2%')} "
            f"| {say(mid(t, 'sleep', 'start'), '.3f')} | {say(mid(t, 'sleep', 'stop'), '.3f')} "
            f"| {cpu:.3f} | {wall:.3f} | {len(names) if names else 'unknown'} "
            f"| {len(imported)}{f' ({shown})' if shown else ''} |"
        )
    absent = [t for t in TOOLS if t not in tools]
    if absent:
        lines += ["", f"Not there and left out: {', '.join(absent)}."]
    text = "\n".join(lines) + "\n"
    print(text)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "meter_peers.md").write_text(text)


if __name__ == "__main__":
    main()
