"""The short table that a run ends with. Knows a `Result` and a rich console."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from joulesmith.report import figures, view
from joulesmith.report.result import Energy, Ratio, Result, Run


def render_terminal(result: Result, console: Console, page: Path | None = None) -> None:
    """Print verdict, before/after and where the report is; fits 80 columns, plain in a pipe.

    page: the report's path, printed last when given.
    """

    def say(text: str, style: str = "") -> Text:
        """User text, never read as markup, in characters that the terminal has."""
        return Text(figures.printable(text, console.encoding), style=style, overflow="fold")

    passed = result.status == "passed"
    console.print(say(result.verdict, "bold green" if passed else "bold yellow"))
    head = view.headline(result)
    if head.number is not None:
        number, name = head.number.replace("×", "x"), result.headline_baseline
        console.print(say(f"{number} {head.claim} {name}{head.against} ({head.interval})"))

    before, after = view.baseline_run(result), view.plan_run(result)
    table = Table(box=SIMPLE, pad_edge=False, show_edge=False, padding=(0, 1))
    table.add_column("", no_wrap=True)
    table.add_column(say(f"before: {_clip(result.headline_baseline)}"), justify="right")
    table.add_column(say("after: plan" if passed else "nearest miss"), justify="right")
    table.add_column("change", justify="right", no_wrap=True)
    for phase in view.PHASES:
        a, b = view.phase_of(before, phase), view.phase_of(after, phase)
        ratio = view.ratio_for(result, phase)
        table.add_row(
            f"J/token, {phase}",
            say(_joules(a)),
            say(_joules(b)),
            say(_times(ratio)),
        )
    for label, cells in _rows(before, after):
        table.add_row(label, *(say(c) for c in cells))
    console.print(table)
    if after is not None and after.quality is not None:
        bound = after.quality.kept_low
        mark = "clears" if after.passes else "misses"
        console.print(
            say(f"lower 95 % bound {bound:.4f} {mark} the floor {result.keep:g}"),
        )
    console.print(say(_pedigree(before, after)))
    for caveat in result.caveats:
        console.print(say(f"note: {caveat}", "dim"))
    if page is not None:
        # A path is one word to copy: never broken by the console's width.
        console.print(say(f"report: {page}"), soft_wrap=True)


def _rows(before: Run | None, after: Run | None) -> list[tuple[str, tuple[str, str, str]]]:
    def pair(run: Run | None) -> dict[str, tuple[str, float | None]]:
        unknown: tuple[str, float | None] = (figures.UNKNOWN, None)
        names = ("tokens/s, decode", "tokens/s, prefill", "memory", "file", "bits per weight")
        out = dict.fromkeys((*names, "kept quality", "KL, nats/token", "top-1"), unknown)
        if run is None:
            return out
        for phase in ("decode", "prefill"):
            s = getattr(run, phase).seconds
            out[f"tokens/s, {phase}"] = figures.rate(s), 1 / s if s > 0 else None
        out["memory"] = figures.size(run.peak_rss), run.peak_rss
        out["file"] = figures.size(run.file_bytes), run.file_bytes
        out["bits per weight"] = figures.fixed(run.bits_per_weight, 2), run.bits_per_weight
        if run.quality is not None:
            q = run.quality
            out["kept quality"] = figures.fixed(q.kept, 4), q.kept
            out["KL, nats/token"] = figures.small(q.kl), None
            out["top-1"] = figures.percent(q.top1), None
        return out

    a, b = pair(before), pair(after)
    rows = []
    for name, (text, value) in a.items():
        other, other_value = b[name]
        change = figures.change(value, other_value)
        if "KL" in name or "top-1" in name or change == figures.UNKNOWN:
            change = ""
        rows.append((name, (text, other, change.replace("−", "-"))))
    return rows


def _joules(energy: Energy | None) -> str:
    return figures.joules(None if energy is None else energy.joules)


def _times(ratio: Ratio | None) -> str:
    """A ratio as a change: ``"1.28x less"``, ``"1.20x more"``."""
    if ratio is None or not figures.known(ratio.ratio) or ratio.ratio <= 0:
        return figures.UNKNOWN
    if ratio.ratio < 1:
        return f"{view.times(1 / ratio.ratio)}x more"
    return f"{view.times(ratio.ratio)}x less"


def _clip(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:10]}...{name[-11:]}"


def _pedigree(before: Run | None, after: Run | None) -> str:
    names = {e.pedigree for r in (before, after) if r for e in (r.prefill, r.decode, r.workload)}
    known = sorted(n for n in names if n is not None)
    if not known:
        return "joules: unknown on this machine"
    text = " and ".join(known)
    energy = after.workload if after is not None else None
    if energy is not None and figures.known(energy.low) and figures.known(energy.high):
        text += f"; workload {figures.interval(energy.low, energy.high)} per token (90 %)"
    return f"joules: {text}"
