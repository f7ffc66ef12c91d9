"""The table of a measured command: nothing unknown as 0, nothing broken by a narrow pipe."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from joulesmith.energy.carbon import bill, footprint
from joulesmith.energy.command import Measured, Report, Run, compare
from joulesmith.energy.reading import Part, Reading
from joulesmith.report.energy_tables import render_report

CPU = Part("package-0", 10.0, 9.0, 11.0, "measured", "RAPL")
CORE = Part("core-0", 6.0, 5.0, 7.0, "measured", "RAPL", within="package-0")
READING = Reading(
    10.0, 2.0, 9.0, 11.0, "measured", 4.0, 1.5, (CPU, CORE), ("a note",), device_memory_bytes=2**30
)
UNKNOWN = Reading(None, 2.0, notes=("why",))


def shown(
    *readings: Reading, other: Reading | None = None, encoding: str = "utf-8", label: str = "run me"
) -> str:
    both = [Measured(label, ("run",), tuple(Run(r, 0, None, None, 0.0) for r in readings))]
    if other is not None:
        both.append(
            Measured(
                "the other", ("other",), tuple(Run(other, 7, None, 5000, 0.0) for _ in readings)
            )
        )
    report = Report(
        tuple(both),
        tuple(footprint(m.typical, 100.0) for m in both),
        tuple(bill(m.typical, 0.25) for m in both),
        compare(*both) if other is not None else None,
        "by made-up counters", None, 1.0, False,
    )  # fmt: skip
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    render_report(report, Console(file=stream, width=80))
    stream.flush()
    return raw.getvalue().decode(encoding)


def test_every_figure_is_shown() -> None:
    text = shown(READING)
    lines = {line.strip().split("  ")[0]: line for line in text.splitlines()}
    assert "10.0 J" in lines["energy"] and "9.00 to 11.0 J" in lines["energy"]
    assert "measured" in lines["energy"]
    assert "4.00 J" in lines["above idle"] and "5.00 W" in lines["mean power"]
    assert "2.00 s" in lines["time"] and "1.50 s" in lines["CPU time"]
    assert "6.00 J" in lines["of it core-0"] and "1.07 GB" in lines["GPU memory"]
    assert f"{10 / 3.6e6 * 100 * 1e6:.0f}. µg" in text.replace("278 µg", "278. µg")
    assert "note: a note" in text and "joules here: by made-up counters" in text


def test_unknown_is_unknown() -> None:
    text = shown(UNKNOWN)
    for name in ("energy", "above idle", "mean power", "CPU time", "peak memory", "carbon", "cost"):
        line = next(x for x in text.splitlines() if x.strip().startswith(name))
        assert "unknown" in line and not any(c.isdigit() for c in line), line
    assert "note: why" in text


def test_several_runs_show_their_spread() -> None:
    text = shown(
        READING, replace(READING, joules=14.0, high=15.0), replace(READING, joules=12.0, high=13.0)
    )
    energy = next(x for x in text.splitlines() if x.startswith("energy"))
    assert "12.0 J" in energy and "10.0 to 14.0 J" in energy and "3 runs, medians" in text


@pytest.mark.parametrize(
    ("rounds", "said"), [(1, "no interval"), (3, "95 % interval 2 to 2, 3 rounds")]
)
def test_ratio(rounds: int, said: str) -> None:
    text = shown(*[READING] * rounds, other=replace(READING, joules=20.0))
    assert "the other takes, against run me:" in text and "2 x (" in text and said in text
    assert "exit code 7" in text and "modelled" not in text
    assert "joules: unknown" in shown(UNKNOWN, other=UNKNOWN)


def test_death_by_signal_has_its_name() -> None:
    m = Measured("x", ("x",), (Run(READING, 139, 11, None, 0.0),))
    report = Report(
        (m,), (footprint(READING, 1.0),), (bill(READING, 1.0),), None, "s", None, 1.0, False
    )
    console = Console(file=io.StringIO(), width=80)
    render_report(report, console)
    assert console.file.getvalue().startswith("x (killed by SIGSEGV)\n")  # type: ignore[attr-defined]


def test_terminals_of_old_and_names_of_evil() -> None:
    text = shown(READING, label="\x1b[2Jäh [bold]", encoding="ascii")
    assert "\x1b" not in text and "[bold]" in text and "ug CO2e" in text
    assert max(len(x) for x in shown(READING).splitlines()) <= 120
