"""Estimates of training in the terminal. Knows their answers and a rich console."""

from __future__ import annotations

from typing import TYPE_CHECKING

from joulesmith.report import estimate_tables as tables
from joulesmith.report import figures
from joulesmith.report.estimate_tables import Rows
from joulesmith.report.figures import quantity

if TYPE_CHECKING:
    from rich.console import Console

    from joulesmith.estimate.asked_training import TrainAnswer

PARTS = {
    "compute": "arithmetic", "memory": "memory", "communication": "communication",
    "storage": "storage", "host": "hosts", "idle": "waiting", "overhead": "the building (PUE)",
}  # fmt: skip
WAITS = {
    "data": "gradients", "tensor": "tensor parallelism", "pipeline": "the pipeline",
    "expert": "experts", "bubble": "the pipeline's bubble",
}  # fmt: skip


def render_train(a: TrainAnswer, console: Console) -> None:
    """Verdict, figures, and the same on more devices."""
    tables.say(console, train_headline(a))
    tables.grid(console, train_rows(a))
    if len(a.scaling) > 1:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for head in ("devices", "hours", "kWh", "speed-up", "of ideal", "joules", "waited"):
            table.add_column(head, justify="right", no_wrap=True)
        for cells in scaling_rows(a):
            table.add_row(*(tables.text(x, console) for x in cells))
        console.print(table)
    tables.notes(console, a.notes, a.shape)


def train_headline(a: TrainAnswer) -> str:
    t = a.training
    words = {"full": "training", "finetune": "fine-tuning", "lora": "LoRA", "distil": "distilling"}
    cost = "energy unknown" if t.kwh is None else tables.ranged(t.kwh.times(1000), "Wh")
    if cost.endswith(")"):
        cost = f"{cost[:-1]}, 90 %)"
    return (
        f"{a.shape.name}, {words[t.mode]} on {quantity(t.tokens, '').strip()} tokens with "
        f"{t.devices:,} x {t.device}: {tables.amount(t.hours.value)} hours, {cost}, modelled"
    )


def train_rows(a: TrainAnswer) -> Rows:
    t, shape = a.training, a.shape
    active = "" if shape.active == shape.parameters else (
        f", {quantity(shape.active, '').strip()} active"
    )  # fmt: skip
    rows: Rows = [
        ("parameters", f"{quantity(shape.parameters, '').strip()}{active}"),
        ("arithmetic", f"{t.flops:.3g} FLOP; activations computed again: {t.recompute}"),
        ("plan", plan_words(a)),
        ("hours", tables.plain(t.hours)),
        ("device-hours", tables.plain(t.device_hours)),
        (
            "utilisation",
            f"{figures.percent(t.utilisation.value)} "
            f"({figures.percent(t.utilisation.low)} to {figures.percent(t.utilisation.high)})",
        ),
        ("a step", step_words(a)),
        ("memory a device", quantity(t.device_bytes, "B")),
    ]
    if t.watts is not None:
        rows.append(("power a device, with host", tables.ranged(t.watts, "W")))
    if t.kwh is not None and t.joules_per_token is not None and t.joules_per_parameter is not None:
        rows += [
            ("energy", f"{tables.plain(t.kwh)} kWh"),
            ("  goes into", parts_words(a)),
            ("  per token", tables.ranged(t.joules_per_token, "J")),
            ("  per parameter", tables.ranged(t.joules_per_parameter, "J")),
        ]
    if t.kg_co2e is not None:
        rows.append(
            (
                "carbon",
                f"{tables.plain(t.kg_co2e)} kgCO2e; {t.grid.name}, {t.grid.gco2e_per_kwh:g} g/kWh",
            )
        )
    if t.energy_cost is not None:
        rows.append(
            ("electricity", f"{tables.plain(t.energy_cost)} {t.price.currency}; {t.price.name}")
        )
    if t.rent_usd is not None:
        rows.append(("rent of the devices", f"{tables.plain(t.rent_usd)} USD"))
    return rows


def plan_words(a: TrainAnswer) -> str:
    """Ranks of each kind, and what a step holds."""
    t = a.training
    kinds = ("data", "tensor", "pipeline", "expert")
    ranks = [f"{getattr(t.plan, k)} {k}" for k in kinds if getattr(t.plan, k) > 1]
    told = " x ".join(ranks[:3]) or "one device"
    if t.plan.data > 1:
        told += f", sharding {t.plan.sharding}"
    return f"{told}; {tables.whole(t.batch_tokens)} tokens a step, {t.sequence:,} a sequence"


def step_words(a: TrainAnswer) -> str:
    s = a.training.step
    waits = [f"{WAITS[k]} {figures.percent(getattr(s, k) / s.seconds, 0)}" for k in WAITS
             if getattr(s, k) > 0.005 * s.seconds]  # fmt: skip
    return f"{quantity(s.seconds, 's')}" + (f", of it {', '.join(waits)}" if waits else "")


def parts_words(a: TrainAnswer) -> str:
    p = a.training.parts
    if p is None:
        return figures.UNKNOWN
    found = [(PARTS[k], getattr(p, k) / p.total) for k in PARTS]
    return ", ".join(f"{name} {figures.percent(x, 0)}" for name, x in found if x > 0.005)


def scaling_rows(a: TrainAnswer) -> list[tuple[str, ...]]:
    """devices, hours, kWh, speed-up, its share of the ideal, joules over the fewest devices',
    and what of a step the plan waits for."""
    first = a.scaling[0].kwh if a.scaling else None
    rows: list[tuple[str, ...]] = []
    for x in a.scaling:
        ratio = None if x.kwh is None or not first else x.kwh / first
        rows.append((
            f"{x.devices:,}", tables.amount(x.hours),
            figures.UNKNOWN if x.kwh is None else tables.amount(x.kwh),
            f"{x.speedup:.2f}", figures.percent(x.speedup / x.ideal, 0),
            figures.UNKNOWN if ratio is None else f"x {ratio:.2f}", figures.percent(x.waits, 0),
        ))  # fmt: skip
    return rows
