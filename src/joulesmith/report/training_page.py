"""One HTML file that tells a training: what it cost, what it gained, the curve of one against the
other. Without network or JavaScript. Knows a `TrainingResult`, no training."""

from __future__ import annotations

import math
from pathlib import Path

from joulesmith.atomic import atomic_path
from joulesmith.report import charts, figures, palette
from joulesmith.report.page import environment
from joulesmith.report.training_result import TrainingResult

TITLES = {"train": "Training", "distill": "Distillation", "recover": "Recovery"}


def write_training_page(result: TrainingResult, path: Path) -> None:
    """Whole or not at all. Raises `MissingExtraError` without the packages of charts and pages."""
    html = render_training_page(result)
    with atomic_path(path) as temporary:
        temporary.write_bytes(html.encode("utf-8", "replace"))


def render_training_page(result: TrainingResult) -> str:
    """The page as text."""
    from markupsafe import Markup

    drawn = {
        "curve_wide": curve_chart(result, 1060, 380, "cw"),
        "curve_narrow": curve_chart(result, 290, 300, "cn"),
        "loss_wide": loss_chart(result, 1060, 240, "lw"),
        "loss_narrow": loss_chart(result, 290, 220, "ln"),
    }
    return (
        environment()
        .get_template("training.html.j2")
        .render(
            r=result,
            style=Markup(palette.style()),
            charts={k: None if v is None else Markup(v) for k, v in drawn.items()},
            title=TITLES[result.kind],
            verdict=verdict(result),
            next_percent=next_words(result),
            learning=learning(result),
            pedigrees=figures.PEDIGREES,
        )
    )


def verdict(r: TrainingResult) -> str:
    """The outcome in a sentence."""
    cost = "joules unknown" if r.joules is None else f"{figures.joules(r.joules)}"
    after = f"{r.after.perplexity:.4g}"
    if r.before is not None and r.recovered is not None:
        told = (
            f"perplexity {r.before.perplexity:.4g} became {after}, the teacher has "
            f"{r.after.reference_perplexity:.4g}"
        )
        if r.recovered < 0:
            return f"Further from the teacher than before, for {cost}: {told}"
        if r.recovered >= 1:
            return f"Better than the teacher on this text, for {cost}: {told}"
        return (
            f"{figures.percent(r.recovered, 0)} of the gap to the teacher closed for {cost}: {told}"
        )
    if r.before is not None:
        return f"Perplexity {r.before.perplexity:.4g} became {after} for {cost}"
    return f"Perplexity {r.after.reference_perplexity:.4g} became {after} for {cost}"


def next_words(r: TrainingResult) -> str:
    """What one more percent would cost."""
    if r.next_percent is None:
        return figures.UNKNOWN
    if math.isinf(r.next_percent):
        return "more than it could tell: the held-out loss no longer falls"
    return figures.joules(r.next_percent)


def learning(r: TrainingResult) -> list[tuple[str, str]]:
    """How it was trained, as (what, value) for a list."""
    train, distil, how, data = (r.settings[k] for k in ("train", "distil", "how", "data"))
    found = [
        ("optimizer", f"{train['optimizer']}, rate {train['rate']:g}, {train['schedule']}"),
        ("batch", f"{train['batch']} windows of {r.length} tokens, {train['micro']} at a time"),
        ("precision", train["precision"] + (", activations again" if train["recompute"] else "")),
        ("seed", str(train["seed"])),
    ]
    weights = [f"{k} {distil[k]:g}" for k in ("hard", "soft", "hidden", "attention") if distil[k]]
    found.append(("loss", ", ".join(weights)))
    if distil["soft"]:
        found.append(("temperature", f"{distil['temperature']:g}"))
    if distil["on_policy"]:
        found.append(("text of its own", figures.percent(distil["on_policy"], 0)))
    if r.settings["cache"]:
        found.append(("teacher", f"asked once, {r.settings['cache']} likeliest tokens kept"))
    if how["mode"] != "full":
        more = {"lora": f", rank {how['rank']}", "quantized": f", {how['types']}"}
        found.append(("what trains", how["mode"] + more.get(how["mode"], "")))
    if r.settings["sparse"] is not None:
        found.append(("zeros", r.settings["sparse"]["method"]))
    if data["share"] < 1:
        found.append(("windows chosen", f"{data['share']:.0%}, {data['keep']} {data['by']}"))
    return found


def curve_chart(r: TrainingResult, width: int, height: int, name: str) -> str | None:
    """Held-out loss (y) against joules (x), None where there are no two points that are known."""
    points = [(j, x) for j, x in r.curve if j is not None and math.isfinite(x)]
    if len(points) < 2:
        return None
    alt = charts.altair()
    factor, unit = _unit(max(j for j, _ in points))
    rows = [
        {
            "x": j / factor, "y": x,
            "title": f"{figures.joules(j)}: {x:.4f} nats, perplexity {math.exp(x):.4g}",
        }
        for j, x in points
    ]  # fmt: skip
    low, high = min(x for _, x in points), max(x for _, x in points)
    pad = 0.08 * max(high - low, 1e-4)
    x = alt.X("x:Q", title=f"{unit} spent on training").axis(grid=False, tickCount=width // 110)
    y = alt.Y("y:Q", title="held-out loss, nats a token")
    y = y.scale(domain=[low - pad, high + pad], nice=False).axis(tickCount=6, titlePadding=12)
    data = charts.data(rows)
    chart = alt.layer(
        alt.Chart(data).mark_line(stroke=palette.light("plan"), strokeWidth=2).encode(x=x, y=y),
        alt.Chart(data)
        .mark_point(
            filled=True, size=46, fill=palette.light("plan"), stroke=palette.light("card"),
            opacity=1,
        )
        .encode(x=x, y=y, description="title:N"),
    ).properties(width=width, height=height)  # fmt: skip
    last = rows[-1]
    label = f"Held-out loss against joules, {len(rows)} points. The last: {last['title']}."
    return charts.svg(chart, name, label)


def loss_chart(r: TrainingResult, width: int, height: int, name: str) -> str | None:
    """Training loss against steps."""
    some = [(n, x) for n, x in r.losses if math.isfinite(x)]
    if len(some) < 2:
        return None
    alt = charts.altair()
    data = charts.data([{"x": n, "y": x} for n, x in some])
    x = alt.X("x:Q", title="step").axis(grid=False, tickCount=width // 110)
    y = alt.Y("y:Q", title="training loss").scale(zero=False, nice=False).axis(tickCount=5)
    chart = (
        alt.Chart(data)
        .mark_line(stroke=palette.light("reference"), strokeWidth=1.4)
        .encode(x=x, y=y)
        .properties(width=width, height=height)
    )
    return charts.svg(chart, name, f"Training loss over {r.steps} steps.")


def _unit(most: float) -> tuple[float, str]:
    for factor, word in ((1e9, "gigajoules"), (1e6, "megajoules"), (1e3, "kilojoules")):
        if most >= factor:
            return factor, word
    return 1.0, "joules"
