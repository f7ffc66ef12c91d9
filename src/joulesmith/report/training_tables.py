"""A training in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from joulesmith.units import duration, si, size

if TYPE_CHECKING:
    from rich.console import Console

    from joulesmith.report.training_result import TrainingResult


def render_training(r: TrainingResult, console: Console) -> None:
    """What was gained, what it cost, where it is. Names come from files: made harmless."""
    from rich.table import Table
    from rich.text import Text

    from joulesmith.report import figures
    from joulesmith.report.training_page import next_words, verdict

    def say(text: str) -> Text:
        return Text(figures.printable(text, console.encoding))

    console.print(say(verdict(r)))
    grid = Table(box=None, show_header=False, pad_edge=False)
    grid.add_column()
    grid.add_column()

    def row(name: str, text: str) -> None:
        grid.add_row(name, say(text))

    spread = "" if r.low is None else f", 90 %: {figures.interval(r.low, r.high)}"
    row("energy of steps", f"{si(r.joules, 'J')} {r.pedigree or ''}{spread}".strip())
    if r.beside:
        parts = ", ".join(f"{si(j, 'J')} {what}" for what, j in r.beside.items())
        row("beside it", parts)
        row("in all", f"{si(r.joules_in_all, 'J')} {r.pedigree_in_all or ''}".strip())
    row("per token", f"{si(r.joules_per_token, 'J')} of {r.tokens:,} tokens trained on")
    row("per parameter", f"{si(r.joules_per_parameter, 'J')} of {si(r.parameters, '').strip()}")
    row("one percent more", next_words(r))
    if r.gco2e is not None:
        money = "" if r.cost is None else f"; {r.cost:.3g} {r.currency} at {r.price}"
        row("carbon", f"{r.gco2e:.3g} gCO2e, grid {r.grid}{money}")
    row("steps", f"{r.steps:,} in {duration(r.seconds)}: {r.stopped}")
    row("optimizer", f"{r.settings['train']['optimizer']}, {size(r.optimizer_bytes)} of state")
    if (s := r.scaling) is not None:
        row("ranks", f"{s.ranks}, {s.plan}")
        row("speed-up T1/Tn", f"{figures.fixed(s.speed_up, 2)} {s.note}".strip())
        row("joules Jn/J1", figures.fixed(s.joules_ratio, 2))
        row("communication", f"{figures.percent(s.communication)} of a step")
    if r.teacher is not None:
        was = "" if r.before is None else f", before {r.before.kept:.4f}"
        row("kept", f"{r.after.kept:.4f} of the teacher (at least {r.after.kept_low:.4f}){was}")
        row("KL", f"{r.after.kl:.4g} nats a token from the teacher")
    if r.engine_quality is not None:
        row("in the engine", f"{r.engine_quality.kept:.4f}, {r.engine}")
    if r.sparsity is not None:
        row("zeros", f"{r.sparsity:.1%} of the weights of the pruned layers")
    row("judged on", f"{r.after.tokens:,} tokens of {r.after.text}")
    row("written", f"{r.out}, {r.format}, {size(r.bytes)}")
    console.print(grid)
    for note in r.notes:
        console.print(say(f"note: {note}"))
