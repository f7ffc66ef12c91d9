"""One HTML file that tells an estimate: the roof, the batch curve, the split, what it rests on.
Without network or JavaScript. Knows answers of `joulesmith.estimate`, no physics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from joulesmith._version import __version__
from joulesmith.atomic import atomic_path
from joulesmith.report import estimate_charts as charts
from joulesmith.report import estimate_tables as tables
from joulesmith.report import estimate_training_tables as training
from joulesmith.report import figures, palette
from joulesmith.report.charts import Key
from joulesmith.report.page import environment

if TYPE_CHECKING:
    from joulesmith.estimate.answer import Constant, Figure
    from joulesmith.estimate.asked import CompareAnswer, ServeAnswer
    from joulesmith.estimate.asked_training import TrainAnswer
    from joulesmith.estimate.model.shape import Shape

WIDE, NARROW = 1060, 290


@dataclass(frozen=True)
class Card:
    """A figure on its own: its name, the figure, its interval, a line more."""

    name: str
    figure: str
    interval: str = ""
    more: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page; what is empty is left out. rows: of a table with that head."""

    id: str
    title: str
    lede: str = ""
    wide: str | None = None
    narrow: str | None = None
    caption: str = ""
    keys: Sequence[Key] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    marked: int = -1
    facts: Sequence[tuple[str, str]] = ()
    lines: Sequence[str] = ()


def write(html: str, path: Path) -> None:
    """Whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(html.encode("utf-8", "replace"))


def serve_page(a: ServeAnswer) -> str:
    """The page of `estimate serve`. Raises `MissingExtraError` without the packages it needs."""
    environment()  # says what is missing before anything is drawn
    s, t = a.served, a.served.traffic
    limit = "" if a.latency_s is None else f" within {a.latency_s * 1e3:g} ms a step"
    best = f"at the best batch{limit}, {tables.whole(t.batch)}" if a.chosen else (
        f"at a batch of {tables.whole(t.batch)}"
    )  # fmt: skip
    verdict = (
        f"{figures.joules(s.joules_per_token.value)} per output token {best}, on "
        f"{s.setup.devices} × {s.setup.device.name}"
    )
    cards = [
        _card("Per output token", s.joules_per_token, "J",
              f"with host and PUE {a.pue:g}: {figures.joules(s.joules_per_token_whole.value)}"),
        _card("Per request", s.joules_per_request, "J", tables.request_words(t)),
        _card("Per token and parameter", s.joules_per_token_and_parameter, "J",
              f"{figures.quantity(a.shape.parameters, '').strip()} parameters"),
        _card("Speed", s.tokens_per_second, "", "tokens a second, all sequences"),
        _card("A step", s.seconds, "s", f"limited by {tables.LIMITS[s.limit]}"),
        _card("Power", s.watts, "W", f"{s.setup.devices} × {s.setup.device.name}"),
    ]  # fmt: skip
    if a.charge is not None:
        cards.append(
            _card(
                "A battery charge", a.charge.tokens, "", f"tokens from {a.charge.watt_hours:g} Wh"
            )
        )
    bars = charts.serve_bars(a)
    sections = [
        Section(
            "curve", "Joules by batch",
            "Weights are read once a step, whatever the batch: sequences side by side share them.",
            wide=charts.batch_curve(a, WIDE, 360, "bw"),
            narrow=charts.batch_curve(a, NARROW, 300, "bn"),
            caption="The band is the 90 % interval; the diamond is the batch told above.",
            head=("Batch", "J/token", "90 %", "Tokens/s", "A step", "Memory", "Limited by"),
            rows=[
                (
                    tables.whole(x.traffic.batch), figures.joules(x.joules_per_token.value),
                    figures.interval(x.joules_per_token.low, x.joules_per_token.high),
                    figures.quantity(x.tokens_per_second.value, "").strip(),
                    figures.seconds(x.seconds.value), figures.quantity(x.memory_bytes, "B"),
                    tables.LIMITS[x.limit],
                )
                for x in tables.thinned(a)
            ],
            marked=_at([x.traffic.batch for x in tables.thinned(a)], t.batch),
        ),
        Section(
            "split", "Where the joules go", "Per output token, prompts included.",
            wide=charts.shares(bars, charts.SERVE_KEYS, WIDE, "sw", "Energy split."),
            narrow=charts.shares(bars, charts.SERVE_KEYS, NARROW, "sn", "Energy split."),
            keys=_used(charts.SERVE_KEYS, bars),
        ),
        Section(
            "roof", "Under the roof",
            "What the devices may do by their data sheet (line), what is reached of it (dashed), "
            "and where this model's passes are.",
            wide=charts.roofline(a, WIDE, 380, "rw"), narrow=charts.roofline(a, NARROW, 300, "rn"),
            caption="Circles: writing, by batch; the diamond: reading one prompt. Left of the bend "
            "memory limits, right of it arithmetic.",
            facts=[
                (name, f"{figures.quantity(peak, 'FLOP/s')}, {figures.quantity(rate, 'B/s')}")
                for name, peak, rate in (
                    ("by the data sheet", a.roof.peak, a.roof.bandwidth),
                    ("reached", a.roof.reached_peak, a.roof.reached_bandwidth),
                )
            ],
        ),
    ]  # fmt: skip
    if a.mixed is not None:
        m = a.mixed
        sections.append(
            Section(
                "mix", f"Prompts on {m.prefill.device.name}, answers on {m.decode.device.name}",
                f"{m.ratio:.2f} times the joules of a request on {m.decode.device.name} alone.",
                head=("Part", "J per request", "90 %"),
                rows=[
                    (name, figures.joules(f.value), figures.interval(f.low, f.high))
                    for name, f in (
                        (f"prompt, on {m.prefill.devices} × {m.prefill.device.name}", m.prompt),
                        (f"sending {figures.quantity(m.sent_bytes, 'B')} of cache", m.transfer),
                        (f"answer, on {m.decode.devices} × {m.decode.device.name}", m.output),
                        ("together", m.joules_per_request),
                        (f"{m.decode.device.name} alone", m.alone.joules_per_request),
                    )
                ],
                marked=3,
                facts=[
                    ("first token after", tables.ranged(m.first_token_s, "s")),
                    ("devices for prompts", f"{m.prefill_per_decode:.3g} for each that writes"),
                ],
            )
        )  # fmt: skip
    if a.fleet is not None:
        sections.append(
            Section("days", "Over days", facts=[
                (n.strip(), v) for n, v in tables.fleet_rows(a.fleet)
            ])
        )  # fmt: skip
    return _page("Serving", verdict, _eyebrow(a.shape, tables.model_rows(a.shape, a.work)[1][1]),
                 cards, sections, a.notes, a.constants, a.shape)  # fmt: skip


def compare_page(a: CompareAnswer) -> str:
    """The page of `estimate compare`. Raises `MissingExtraError`."""
    environment()
    works = [r for r in a.rows if r.served is not None]
    best = min(works, key=lambda r: r.ratio or 1.0)
    verdict = (
        f"{best.name} needs the fewest joules per token: {figures.factor(best.ratio)} times those "
        f"of {works[0].name}" if best is not works[0] else
        f"{best.name} needs the fewest joules per token"
    )  # fmt: skip
    if best.within:
        verdict += ", within the uncertainty"
    rows = []
    for r in works:
        s = r.served
        assert s is not None and r.low is not None and r.high is not None
        e = s.joules_per_token
        rows.append((
            f"{s.setup.devices} × {r.name}", figures.joules(e.value),
            figures.interval(e.low, e.high), figures.factor(r.ratio),
            "" if r.within is None else f"{figures.factor(r.low)} to {figures.factor(r.high)}",
            tables.whole(s.traffic.batch), figures.quantity(s.tokens_per_second.value, "").strip(),
            figures.seconds(s.seconds.value), tables.LIMITS[s.limit],
        ))  # fmt: skip
    limit = "" if a.latency_s is None else f", a step within {a.latency_s * 1e3:g} ms"
    bars = []
    for r in works:
        assert r.served is not None
        bars.append((f"{r.served.setup.devices} × {r.name}", dict(r.served.split)))
    sections = [
        Section(
            "devices", "Side by side",
            f"{tables.request_words(a.traffic)}{limit}; each on the fewest devices that do, at its "
            "best batch.",
            wide=charts.devices(a, WIDE, "dw"), narrow=charts.devices(a, NARROW, "dn"),
            caption="Lines are 90 % intervals.",
            head=("Setup", "J/token", "90 %", "Of the first", "90 %", "Batch", "Tokens/s", "A step",
                  "Limited by"),
            rows=rows, lines=tables.verdicts(a),
        ),
        Section(
            "split", "Where the joules go", "Of the devices alone, per output token.",
            wide=charts.shares(bars, charts.SERVE_KEYS, WIDE, "sw", "Energy split."),
            narrow=charts.shares(bars, charts.SERVE_KEYS, NARROW, "sn", "Energy split."),
            keys=_used(charts.SERVE_KEYS, bars),
        ),
    ]  # fmt: skip
    fleets = [
        (f"{r.name}: {n.strip()}", v) for r, f in zip(a.rows, a.fleets, strict=False)
        if f is not None for n, v in tables.fleet_rows(f)
    ]  # fmt: skip
    if fleets:
        sections.append(Section("days", "Over days", facts=fleets))
    return _page("Devices side by side", verdict, _eyebrow(a.shape, ""), [], sections, a.notes,
                 a.constants, a.shape)  # fmt: skip


def train_page(a: TrainAnswer) -> str:
    """The page of `estimate train`. Raises `MissingExtraError`."""
    environment()
    t = a.training
    cards = [
        _plain("Hours", t.hours, "", f"{t.devices:,} × {t.device}"),
        _plain("Device-hours", t.device_hours, ""),
        _card("Utilisation", t.utilisation.times(100), "%", "model FLOPs of the 16-bit peak"),
    ]
    if t.kwh is not None and t.joules_per_token is not None and t.joules_per_parameter is not None:
        tokens = figures.quantity(t.tokens, "").strip()
        cards += [
            _card("Energy", t.kwh.times(1000), "Wh", "with hosts and building"),
            _card("Per token", t.joules_per_token, "J", f"{tokens} tokens"),
            _card("Per parameter", t.joules_per_parameter, "J"),
        ]
    if t.kg_co2e is not None:
        by, unit = (1000, "tCO₂e") if t.kg_co2e.value >= 1000 else (1, "kgCO₂e")
        cards.append(_plain("Carbon", t.kg_co2e.per(by), unit, f"grid: {t.grid.name}"))
    if t.energy_cost is not None:
        cards.append(_plain("Electricity", t.energy_cost, t.price.currency, t.price.name))
    sections = []
    if t.parts is not None:
        parts = {k: getattr(t.parts, k) for k in charts.TRAIN_KEYS}
        bars = [("all of it", parts)] if t.kwh is None else [
            (f"{figures.quantity(1000 * t.kwh.value, 'Wh')} in all", parts)
        ]  # fmt: skip
        sections.append(
            Section(
                "split", "Where the joules go",
                wide=charts.shares(bars, charts.TRAIN_KEYS, WIDE, "sw", "Energy split."),
                narrow=charts.shares(bars, charts.TRAIN_KEYS, NARROW, "sn", "Energy split."),
                keys=_used(charts.TRAIN_KEYS, bars),
            )
        )  # fmt: skip
    if len(a.scaling) > 1:
        sections.append(
            Section(
                "wider", "More devices",
                "The same training on fewer and on more devices: what a doubling gains and costs.",
                wide=charts.speed_up(a, WIDE, 320, "uw"),
                narrow=charts.speed_up(a, NARROW, 280, "un"),
                caption="Dashed: nothing lost. The diamond is the estimate above.",
                head=("Devices", "Hours", "kWh", "Speed-up", "Of the ideal", "Joules", "Waited"),
                rows=training.scaling_rows(a),
                marked=_at([x.devices for x in a.scaling], t.devices),
            )
        )  # fmt: skip
        if charts.scaling_kwh(a, NARROW, 220, "x") is not None:
            sections.append(
                Section(
                    "price", "What being faster costs",
                    wide=charts.scaling_kwh(a, WIDE, 260, "kw"),
                    narrow=charts.scaling_kwh(a, NARROW, 240, "kn"),
                    caption="Dashed: the fewest devices'.",
                )
            )  # fmt: skip
    facts = [(n.strip(), v) for n, v in training.train_rows(a)]
    sections.append(Section("how", "How it is trained", facts=facts))
    return _page("Training", training.train_headline(a), _eyebrow(a.shape, ""), cards, sections,
                 a.notes, a.constants, a.shape)  # fmt: skip


def _page(
    title: str, verdict: str, eyebrow: str, cards: Sequence[Card], sections: Sequence[Section],
    notes: Sequence[str], constants: Sequence[Constant], shape: Shape,
) -> str:  # fmt: skip
    from markupsafe import Markup

    drawn = {
        s.id: (None if s.wide is None else Markup(s.wide), None if s.narrow is None else
               Markup(s.narrow)) for s in sections
    }  # fmt: skip
    return (
        environment()
        .get_template("estimate.html.j2")
        .render(
            style=Markup(palette.style()), title=title, model=shape.name, verdict=verdict,
            eyebrow=eyebrow, cards=cards, sections=sections, drawn=drawn,
            notes=[*notes, *(f"assumed: {rule}" for rule in shape.assumed)],
            constants=[(c.name, f"{c.value:.4g}", c.unit, c.basis, c.source) for c in constants],
            version=__version__, pedigrees=figures.PEDIGREES,
        )
    )  # fmt: skip


def _card(name: str, f: Figure, unit: str, more: str = "") -> Card:
    told = " ".join(figures.quantity(f.value, unit).split())
    if f.low == f.high:
        return Card(name, told, "", more)
    between = " ".join(figures.interval(f.low, f.high, unit).split())
    return Card(name, told, f"90 %: {between}", more)


def _plain(name: str, f: Figure, unit: str, more: str = "") -> Card:
    """Without prefixes: hours, tonnes, money."""
    between = f"90 %: {tables.amount(f.low)} to {tables.amount(f.high)} {unit}".rstrip()
    told = f"{tables.amount(f.value)} {unit}".rstrip()
    return Card(name, told, between if f.low < f.high else "", more)


def _eyebrow(shape: Shape, weights: str) -> str:
    told = f"{figures.quantity(shape.parameters, '').strip()} parameters"
    if shape.active != shape.parameters:
        told += f", {figures.quantity(shape.active, '').strip()} active"
    return f"{told} · {weights}" if weights else told


def _at(found: Sequence[float], one: float) -> int:
    return list(found).index(one) if one in found else -1


def _used(keys: dict[str, Key], bars: Sequence[tuple[str, dict[str, float]]]) -> list[Key]:
    return [key for k, key in keys.items() if any(parts.get(k, 0) > 0 for _, parts in bars)]
