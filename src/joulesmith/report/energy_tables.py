"""Terminal tables of energy: what a command cost. Knows figures and a rich console."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from joulesmith.report import figures

if TYPE_CHECKING:
    from rich.console import Console

    from joulesmith.energy.carbon import Amount
    from joulesmith.energy.command import Measured, Report
    from joulesmith.energy.reading import Part, Reading
    from joulesmith.paired import PairedRatio

_CLIP = 60


def render_report(report: Report, console: Console) -> None:
    """Energy, power, time, memory, carbon, cost and the split by device of each command."""
    from joulesmith.energy.command import merged

    notes: list[str] = []
    for m, carbon, money in zip(report.measured, report.carbon, report.money, strict=True):
        typical = m.typical
        _render(m, typical, carbon, money, console)
        notes += [*typical.notes, *carbon.notes, *money.notes]
    if report.stopped and any(len(m.runs) > 1 for m in report.measured):
        notes.append("stopped by a signal: the figures are of the runs shown")
    if report.comparison is not None:
        _render_ratio(report, console)
    _line(console, f"joules here: {report.source}")
    for note in merged(notes):
        _line(console, f"note: {note}")


def _render(m: Measured, typical: Reading, carbon: Amount, money: Amount, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    several = len(m.runs) > 1
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    head = ", ".join(filter(None, (f"{len(m.runs)} runs, medians" if several else "", _end(m))))
    _line(console, f"{_clip(m.label)}{f' ({head})' if head else ''}")
    table.add_column("", no_wrap=True)
    table.add_column("median" if several else "", justify="right", no_wrap=True)
    table.add_column("90 % interval", justify="right", no_wrap=True)
    if several:
        table.add_column("least to most", justify="right", no_wrap=True)
    table.add_column("pedigree", no_wrap=True)

    def row(name: str, value: str, interval: str = "", spread: str = "", said: str = "") -> None:
        cells = [name, value, interval, *([spread] if several else []), said]
        table.add_row(*(Text(figures.printable(c, console.encoding)) for c in cells))

    def between(of: Callable[[Reading], float | None], unit: str) -> str:
        found = m.figure(of)
        return "" if found is None else figures.interval(found.least, found.most, unit)

    def energy(name: str, part: Part | Reading, spread: str = "") -> None:
        interval = "" if part.joules is None else figures.interval(part.low, part.high)
        row(name, figures.joules(part.joules), interval, spread, part.pedigree or "")

    energy("energy", typical, between(lambda r: r.joules, "J"))
    row(
        "  above idle",
        figures.joules(typical.marginal),
        spread=between(lambda r: r.marginal, "J"),
    )
    for part in typical.parts:
        energy(f"  {part.device}" if part.within is None else f"    of it {part.device}", part)
    if typical.machine is not None:
        energy("  whole machine", typical.machine)
    row("mean power", figures.quantity(typical.watts, "W"), spread=between(lambda r: r.watts, "W"))
    row("time", figures.seconds(typical.seconds), spread=between(lambda r: r.seconds, "s"))
    row(
        "CPU time",
        figures.seconds(typical.cpu_seconds),
        spread=between(lambda r: r.cpu_seconds, "s"),
    )
    row("peak memory", figures.size(m.peak_memory_bytes))
    if typical.device_memory_bytes is not None:
        row("GPU memory", figures.size(typical.device_memory_bytes))
    row("carbon", *_grams(carbon), said=carbon.pedigree or "")
    row("cost", *_money(money), said=money.pedigree or "")
    console.print(table)
    for name, amount in (("carbon", carbon), ("cost", money)):
        if amount.source:
            _line(console, f"{name}: {amount.source}")


def _end(m: Measured) -> str:
    """How it ended, where not well."""
    run = next((r for r in m.runs if r.exit_code), None)
    if run is None:
        return ""
    if run.signal is None:
        return f"exit code {run.exit_code}"
    known = {int(s): s.name for s in signal.Signals}
    return f"killed by {known.get(run.signal, f'signal {run.signal}')}"


def _grams(amount: Amount) -> tuple[str, str]:
    if amount.value is None:
        return figures.UNKNOWN, ""
    interval = figures.interval(amount.low, amount.high, "g")
    return f"{figures.quantity(amount.value, 'g')} CO2e", "" if amount.low is None else interval


def _money(amount: Amount) -> tuple[str, str]:
    """Powers of ten: a prefix before a currency reads as another currency."""
    if amount.value is None:
        return figures.UNKNOWN, ""
    ends = amount.low, amount.high
    interval = "" if None in ends else " to ".join(figures.small(x) for x in ends)
    return f"{figures.small(amount.value)} {amount.unit}".strip(), interval


def _render_ratio(report: Report, console: Console) -> None:
    ours, other = report.measured
    found = report.comparison
    assert found is not None
    _line(console, f"{_clip(other.label)} takes, against {_clip(ours.label)}:")
    for ratio, what in (
        (found.joules, "the joules"),
        (found.marginal, "the joules above idle"),
        (found.seconds, "the time"),
    ):
        if ratio is not None:
            _line(console, f"  {_times(ratio)} {what}")
    if found.joules is None:
        _line(console, "  joules: unknown")
    elif "modelled" in (ours.typical.pedigree, other.typical.pedigree):
        _line(
            console,
            "  (joules are modelled from CPU time and wall time: the ratio is one of those, "
            "and what the model is off by on both cancels)",
        )


def _times(ratio: PairedRatio) -> str:
    if ratio.pairs == 1:
        return f"{ratio.ratio:.3g} x (one round: no interval)"
    return (
        f"{ratio.ratio:.3g} x (95 % interval {ratio.low:.3g} to {ratio.high:.3g}, "
        f"{ratio.pairs} rounds)"
    )


def _clip(text: str) -> str:
    text = " ".join(figures.clean(text).split())
    return text if len(text) <= _CLIP else f"{text[: _CLIP - 3]}..."


def _line(console: Console, text: str) -> None:
    from rich.text import Text

    # Never broken by the console's width: a line is one fact, in a log too.
    console.print(Text(figures.printable(text, console.encoding)), soft_wrap=True)
