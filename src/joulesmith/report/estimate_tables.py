"""Estimates in the terminal. Knows answers of `joulesmith.estimate` and a rich console."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from joulesmith.report import figures
from joulesmith.report.figures import quantity
from joulesmith.units import duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from joulesmith.estimate.answer import Constant, Figure
    from joulesmith.estimate.asked import CompareAnswer, ServeAnswer, Work
    from joulesmith.estimate.model.shape import Shape
    from joulesmith.estimate.serving.daily import Fleet
    from joulesmith.estimate.serving.serve import Served
    from joulesmith.estimate.serving.setup import Traffic

Rows = list[tuple[str, str]]
LIMITS = {
    "memory": "memory bandwidth", "compute": "compute", "overhead": "the engine's overhead",
    "links": "links between devices", "power": "the power limit",
}  # fmt: skip
SPLIT = {"static": "power drawn whatever it does", "bytes": "moving bytes", "flops": "arithmetic"}


def render_serve(a: ServeAnswer, console: Console) -> None:
    """Verdict, figures, and the curve over batches where the batch was not given."""
    say(console, headline(a))
    grid(console, [*model_rows(a.shape, a.work), *serve_rows(a)])
    if a.chosen and len(a.curve) > 1:
        _curve(a, console)
    notes(console, a.notes, a.shape)


def headline(a: ServeAnswer) -> str:
    s = a.served
    e = s.joules_per_token
    on = f"{s.setup.devices} x {s.setup.device.name}"
    best = "batch" if not a.chosen else "best batch"
    return (
        f"{a.shape.name} on {on}: {quantity(e.value, 'J')} per output token "
        f"({figures.interval(e.low, e.high)}, 90 %), modelled, {best} {whole(s.traffic.batch)}"
    )


def model_rows(shape: Shape, work: Work) -> Rows:
    active = "" if shape.active == shape.parameters else (
        f", {quantity(shape.active, '').strip()} active"
    )  # fmt: skip
    kept = f"{quantity(work.cache_bytes_per_token, 'B')} of cache per token"
    if work.state_bytes:
        kept += f", {quantity(work.state_bytes, 'B')} of state per sequence"
    flops = f"{quantity(work.decode_flops, 'FLOP')} written"
    if work.prefill_flops is not None:
        flops += f", {quantity(work.prefill_flops, 'FLOP')} read"
    return [
        ("parameters", f"{quantity(shape.parameters, '').strip()}{active}"),
        ("weights", f"{quantity(work.weight_bytes, 'B')}, {work.bits_per_weight:.3g} bits each"),
        ("kept", kept),
        ("per token", flops),
    ]


def serve_rows(a: ServeAnswer) -> Rows:
    s, t = a.served, a.served.traffic
    split = ", ".join(
        f"{SPLIT[k]} {100 * v / s.joules_per_token.value:.0f} %" for k, v in s.split.items()
    )
    rows: Rows = [
        ("request", f"{request_words(t)}, batch {whole(t.batch)}"),
        ("J per output token", ranged(s.joules_per_token, "J")),
        (f"  with host, PUE {a.pue:g}", ranged(s.joules_per_token_whole, "J")),
        ("  written alone", ranged(s.decode, "J")),
    ]
    if s.prefill is not None:
        rows.append(("J per prompt token", f"{ranged(s.prefill, 'J')}, one prompt read alone"))
    rows += [
        ("J per request", ranged(s.joules_per_request, "J")),
        ("J per token and parameter", ranged(s.joules_per_token_and_parameter, "J")),
        ("energy goes into", split),
        ("tokens per second", ranged(s.tokens_per_second, "")),
        ("a step takes", f"{ranged(s.seconds, 's')}; limited by {LIMITS[s.limit]}"),
        ("power of the devices", ranged(s.watts, "W")),
        ("memory", memory_words(s)),
    ]
    if a.most is not None:
        rows.append(("sequences that fit", f"{a.most:,}"))
    if a.mixed is not None:
        m = a.mixed
        rows += [
            ("prompts on", f"{m.prefill.devices} x {m.prefill.device.name}"),
            (
                "  J per request",
                f"{ranged(m.joules_per_request, 'J')}; {m.ratio:.2f} times those above",
            ),
            (
                "  of it",
                f"{quantity(m.prompt.value, 'J')} prompt, {quantity(m.transfer.value, 'J')} "
                f"sending {quantity(m.sent_bytes, 'B')}, {quantity(m.output.value, 'J')} output",
            ),
            ("  first token after", ranged(m.first_token_s, "s")),
            ("  devices for prompts", f"{m.prefill_per_decode:.3g} for each that writes"),
        ]
    if a.fleet is not None:
        rows += fleet_rows(a.fleet)
    if a.charge is not None:
        c = a.charge
        rows.append((
            "a battery charge",
            f"{c.watt_hours:g} Wh: {ranged(c.tokens, '')} tokens, "
            f"{quantity(c.requests.value, '').strip()} requests in "
            f"{duration(c.hours.value * 3600)}",
        ))  # fmt: skip
    return rows


def fleet_rows(f: Fleet) -> Rows:
    """Of a day and of a year."""
    rows = [
        ("requests", f"{whole(f.requests_per_day)} a day: {f.setups:.3g} of these busy all day"),
        ("  energy", _daily(f.kwh_per_day, "kWh")),
        ("  carbon", f"{_daily(f.kgco2e_per_day, 'kgCO2e')}; {f.grid}"),
    ]
    if f.money_per_day is not None:
        rows.append(("  money", f"{_daily(f.money_per_day, f.currency or 'as given')}; {f.price}"))
    return rows


def _daily(x: Figure, unit: str) -> str:
    year = x.times(365)
    return (
        f"{amount(x.value)} {unit} a day, {amount(year.value)} a year "
        f"({amount(year.low)} to {amount(year.high)})"
    )


def amount(x: float) -> str:
    """Without prefix: ``"1,230"``, ``"0.0456"``."""
    if x == 0:
        return "0"
    digits = f"{x:.3g}" if x < 1000 else f"{float(f'{x:.3g}'):,.0f}"
    return f"{float(digits):g}" if "e" in digits and x < 1000 else digits


def render_compare(a: CompareAnswer, console: Console) -> None:
    """A row a way, ratios against the first that works."""
    from rich.table import Table

    t = a.traffic
    limit = "" if a.latency_s is None else f", a step within {a.latency_s * 1e3:g} ms"
    say(
        console,
        f"{a.shape.name}, {request_words(t)}{limit}: modelled, 90 % intervals",
    )
    grid(console, model_rows(a.shape, a.work)[:1])
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    for head in ("J/token", "90 %", "ratio", "batch", "tokens/s", "step"):
        table.add_column(head, justify="right", no_wrap=True)
    for r in a.rows:
        if r.served is None:
            continue
        s, e = r.served, r.served.joules_per_token
        table.add_row(*(
            text(x, console) for x in (
                f"{s.setup.devices} x {r.name}", quantity(e.value, "J"),
                figures.interval(e.low, e.high), figures.factor(r.ratio),
                whole(s.traffic.batch), quantity(s.tokens_per_second.value, "").strip(),
                quantity(s.seconds.value, "s"),
            )
        ))  # fmt: skip
    console.print(table)
    for line in verdicts(a):
        say(console, line)
    for f, r in zip(a.fleets, a.rows, strict=False):
        if f is not None:
            grid(console, [("on", r.name), *fleet_rows(f)])
    notes(console, a.notes, a.shape)


SAME = 0.02
"""Of a ratio: what its counterpart with host and building differs by, at least, to be told."""


def verdicts(a: CompareAnswer) -> list[str]:
    """What each row says against the first, in words."""
    works = [r for r in a.rows if r.served is not None]
    first = works[0]
    lines = []
    for r in works[1:]:
        assert r.ratio and r.low and r.high
        told = f"{figures.factor(r.ratio)} times the joules per token of {first.name}"
        said = f"{r.name}: {told} ({figures.factor(r.low)} to {figures.factor(r.high)})"
        if r.within:
            said += ", within the uncertainty: either may need fewer"
        if r.served and first.served and r.served.setup.device == first.served.setup.device:
            said += "; one device, so they share most of the error"
        if r.served and first.served:
            paid, of = (
                r.served.joules_per_token_whole.value,
                first.served.joules_per_token_whole.value,
            )
            if abs(paid / of / r.ratio - 1) > SAME:
                said += f"; with host and PUE {a.pue:g}: {figures.factor(paid / of)} times"
        lines.append(said)
    lines += [f"{r.name}: no: {r.why_not}" for r in a.rows if r.served is None]
    return lines


def render_constants(constants: Sequence[Constant], shape: Shape, console: Console) -> None:
    """What an estimate rests on: rules for the shape's numbers that nobody gave, and constants."""
    from rich.table import Table

    for rule in shape.assumed:
        say(console, f"assumed: {rule}")

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in ("constant", "value", "unit", "basis", "source"):
        table.add_column(head, justify="right" if head == "value" else "left",
                         no_wrap=head in ("value", "basis"))  # fmt: skip
    for c in constants:
        cells = (c.name, f"{c.value:.4g}", c.unit, c.basis, c.source)
        table.add_row(*(text(x, console) for x in cells))
    console.print(table)


def ranged(f: Figure, unit: str) -> str:
    """ "1.23 J (1.00 to 1.50 J)"; without the interval where there is none."""
    told = quantity(f.value, unit).strip()
    if f.low == f.high:
        return told
    between = " ".join(figures.interval(f.low, f.high, unit).split())
    return f"{told} ({between})"


def request_words(t: Traffic) -> str:
    return f"{whole(t.prompt)} tokens read, {whole(t.output)} written"


def whole(x: float) -> str:
    """ "1,000,000", "2.5": a count as it is given."""
    return f"{x:,.0f}" if x == int(x) or x >= 1000 else f"{x:,.4g}"


def memory_words(s: Served) -> str:
    told = quantity(s.memory_bytes, "B")
    return told if s.room_bytes is None else f"{told} of {quantity(s.room_bytes, 'B')} usable"


def _curve(a: ServeAnswer, console: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in ("batch", "J/token", "90 %", "tokens/s", "step", "limit", ""):
        table.add_column(head, justify="left" if head in ("limit", "") else "right", no_wrap=True)
    for s in thinned(a):
        e, b = s.joules_per_token, s.traffic.batch
        marks = []
        if b == a.served.traffic.batch:
            marks.append("<- best")
        elif a.latency_s is not None and s.seconds.value > a.latency_s:
            marks.append("too slow")
        table.add_row(*(
            text(x, console) for x in (
                whole(b), quantity(e.value, "J"), figures.interval(e.low, e.high),
                quantity(s.tokens_per_second.value, "").strip(), quantity(s.seconds.value, "s"),
                s.limit, ", ".join(marks),
            )
        ))  # fmt: skip
    console.print(table)


def thinned(a: ServeAnswer) -> list[Served]:
    """Batches that are powers of two, the one that is told, and the last."""
    last = a.curve[-1].traffic.batch
    return [
        s for s in a.curve
        if s.traffic.batch in (last, a.served.traffic.batch)
        or int(s.traffic.batch) & (int(s.traffic.batch) - 1) == 0
    ]  # fmt: skip


def notes(console: Console, notes: Sequence[str], shape: Shape) -> None:
    if shape.assumed:
        found = ", ".join(rule.partition(":")[0].replace(" = ", " ") for rule in shape.assumed)
        say(console, f"assumed: {found} (--explain says why)")
    for note in notes:
        say(console, f"note: {note}")


def grid(console: Console, rows: Rows) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(text(name, console), text(value, console))
    console.print(table)


def say(console: Console, line: str) -> None:
    console.print(text(line, console))


def text(words: str, console: Console) -> Text:
    """Names come from files: made harmless, never read as markup."""
    from rich.text import Text

    return Text(figures.printable(words, console.encoding))


def plain(f: Figure) -> str:
    """Without prefix: ``"1,230 (900 to 1,500)"``."""
    return f"{amount(f.value)} ({amount(f.low)} to {amount(f.high)})"
