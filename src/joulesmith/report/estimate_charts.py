"""Charts of estimates as inline SVG: the roof, the batch curve, splits, devices, speed-up.

Knows answers of `joulesmith.estimate`, no page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from joulesmith.report import figures, labels
from joulesmith.report.charts import Key, altair, data, svg
from joulesmith.report.palette import light

if TYPE_CHECKING:
    from joulesmith.estimate.asked import CompareAnswer, ServeAnswer
    from joulesmith.estimate.asked_training import TrainAnswer
    from joulesmith.estimate.serving.serve import Served

SERVE_KEYS = {
    "static": Key("front", "drawn while a step runs, whatever it does"),
    "bytes": Key("plan", "moving bytes between memory and chip"),
    "flops": Key("pass", "arithmetic"),
    "host": Key("damage2", "the host beside"),
    "building": Key("damage1", "the building (PUE)"),
}
TRAIN_KEYS = {
    "compute": Key("pass", "arithmetic"),
    "memory": Key("plan", "memory"),
    "communication": Key("fail", "communication"),
    "storage": Key("bits2", "storage"),
    "idle": Key("front", "waiting"),
    "host": Key("damage2", "hosts"),
    "overhead": Key("damage1", "the building (PUE)"),
}


def roofline(a: ServeAnswer, width: int, height: int, name: str) -> str:
    """FLOP/s reached (y) against FLOPs a byte (x), both logarithmic, under the device's roof."""
    alt = altair()
    r = a.roof
    xs = [p.flops_per_byte for p in r.points]
    x0, x1 = min(*xs, r.ridge / 8) / 2, max(*xs, r.ridge * 8) * 2
    ys = [p.flops_per_second for p in r.points]
    y0, y1 = min(*ys, x0 * r.bandwidth) / 1.6, r.peak * 2.2
    x = alt.X("x:Q", title="FLOPs per byte moved →").scale(type="log", domain=[x0, x1], nice=False)
    y = alt.Y("y:Q", title="FLOP/s").scale(type="log", domain=[y0, y1], nice=False)
    x = x.axis(grid=False, format="~s", values=_powers(x0, x1))
    y = y.axis(format="~s", values=_powers(y0, y1), titlePadding=10)

    def line(bandwidth: float, peak: float, **mark: Any) -> Any:
        start = max(x0, y0 / bandwidth)
        points = [(start, bandwidth * start), (peak / bandwidth, peak), (x1, peak)]
        rows = [{"x": u, "y": v} for u, v in points]
        return alt.Chart(data(rows)).mark_line(strokeWidth=1.6, **mark).encode(x=x, y=y)

    rows: list[dict[str, Any]] = []
    for p in r.points:
        here = p.phase == "prefill" or p.batch == a.served.traffic.batch
        rows.append({
            "x": p.flops_per_byte, "y": p.flops_per_second,
            "fill": light("pass" if p.phase == "prefill" else "plan") if here else light("card"),
            "ink": light("pass" if p.phase == "prefill" else "plan"),
            "shape": "diamond" if p.phase == "prefill" else "circle",
            "size": 120 if here else 52,
            "title": f"{p.phase}, batch {p.batch:,.0f}: {figures.quantity(p.flops_per_byte, '')}"
            f"FLOPs a byte, {figures.quantity(p.flops_per_second, 'FLOP/s')}, limited by {p.limit}",
        })  # fmt: skip
    told = _named(a, width, x0, x1)
    others = [(r["x"], r["y"]) for r in rows]
    texts = _placed(told, others, (x0, x1), (y0, y1), width, height)
    layers = [
        line(r.bandwidth, r.peak, stroke=light("ink")),
        line(r.reached_bandwidth, r.reached_peak, stroke=light("soft"), strokeDash=[5, 4]),
        alt.Chart(data([row for row in rows if row["shape"] == "circle"]))
        .mark_line(stroke=light("plan"), strokeWidth=1.2, opacity=0.5)
        .encode(x=x, y=y),
        alt.Chart(data(rows))
        .mark_point(strokeWidth=1.6, opacity=1)
        .encode(
            x=x, y=y, shape=alt.Shape("shape:N", scale=None), size=alt.Size("size:Q", scale=None),
            fill=alt.Fill("fill:N", scale=None), stroke=alt.Stroke("ink:N", scale=None),
            description="title:N",
        ),
        *(_texts(texts, x, y, side) for side in ("left", "right") if _some(texts, side)),
    ]  # fmt: skip
    chart = alt.layer(*layers).properties(width=width, height=height)
    label = (
        f"Roofline of {a.served.setup.devices} x {a.served.setup.device.name}: "
        f"{figures.quantity(r.peak, 'FLOP/s')}, {figures.quantity(r.bandwidth, 'B/s')}."
    )
    return svg(chart, name, label)


def _named(a: ServeAnswer, width: int, x0: float, x1: float) -> list[tuple[float, float, str]]:
    """Points of the roof that are told by name: the chosen batch, the prompt, and the first and the
    last batch where they are apart from it."""
    decode = [p for p in a.roof.points if p.phase == "decode"]
    one = next(p for p in decode if p.batch == a.served.traffic.batch)
    prompts = [p for p in a.roof.points if p.phase == "prefill"]
    told = [(one, f"batch {one.batch:,.0f}"), *((p, "prompt") for p in prompts)]
    for p in (decode[0], decode[-1]):
        apart = abs(math.log(p.flops_per_byte / one.flops_per_byte)) / math.log(x1 / x0) * width
        if apart > 40:
            told.append((p, f"batch {p.batch:,.0f}"))
    return [(p.flops_per_byte, p.flops_per_second, text) for p, text in told]


def batch_curve(a: ServeAnswer, width: int, height: int, name: str) -> str | None:
    """Joules per output token (y) against the batch (x), both logarithmic, with the 90 % band, the
    largest batch within the latency limit, and where memory is full."""
    if len(a.curve) < 2:
        return None
    alt = altair()
    rows = [_curve_row(s) for s in a.curve]
    last = a.curve[-1].traffic.batch
    x0, x1 = 0.9, last * 1.25
    y0 = min(r["low"] for r in rows) / 1.3
    y1 = max(r["high"] for r in rows) * 1.2
    x = alt.X("x:Q", title="batch: sequences side by side →")
    x = x.scale(type="log", domain=[x0, x1], nice=False)
    x = x.axis(grid=False, format=",.0f", values=_doublings(last, width))
    y = alt.Y("y:Q", title="joules per output token").scale(type="log", domain=[y0, y1], nice=False)
    y = y.axis(format="~s", values=_powers(y0, y1, steps=(1, 2, 5)), titlePadding=10)
    band = data(rows)
    layers = [
        alt.Chart(band)
        .mark_area(fill=light("plan"), fillOpacity=0.16)
        .encode(x=x, y=alt.Y("low:Q"), y2="high:Q"),
        alt.Chart(band).mark_line(stroke=light("plan"), strokeWidth=2).encode(x=x, y=y),
        alt.Chart(data([r for r in rows if r["told"]]))
        .mark_point(filled=True, size=34, fill=light("plan"), stroke=light("card"), opacity=1)
        .encode(x=x, y=y, description="title:N"),
    ]
    marks = []
    if a.most is not None and a.most == last:
        marks.append((float(last), "memory full", "soft"))
    if a.latency_s is not None:
        fast = [s.traffic.batch for s in a.curve if s.seconds.value <= a.latency_s]
        if fast and max(fast) < last:
            marks.append((float(max(fast)), f"{a.latency_s * 1e3:g} ms a step", "fail"))
    for at, _, ink in marks:
        layers.append(
            alt.Chart(data([{"x": at, "y": y0, "end": y1}]))
            .mark_rule(stroke=light(ink), strokeWidth=1.4, strokeDash=[6, 4])
            .encode(x=x, y=alt.Y("y:Q"), y2="end:Q")
        )
    for at, words, ink in marks:
        text = alt.Chart(data([{"x": at, "y": y1, "text": words}]))
        place = {"align": "right", "dx": -6, "dy": 12 if ink == "soft" else 28, "fontSize": 12}
        halo = text.mark_text(stroke=light("card"), strokeWidth=5, fill=light("card"), **place)
        layers += [
            mark.encode(x=x, y=y, text="text:N")
            for mark in (halo, text.mark_text(fill=light(ink), **place))
        ]
    one = _curve_row(a.served)
    layers.append(
        alt.Chart(data([one]))
        .mark_point(
            shape="diamond", size=170, fill=light("plan"), stroke=light("card"), opacity=1,
            strokeWidth=1.6,
        )
        .encode(x=x, y=y, description="title:N")
    )  # fmt: skip
    chart = alt.layer(*layers).properties(width=width, height=height)
    label = f"Joules per output token against the batch, 1 to {last:,.0f}. {one['title']}."
    return svg(chart, name, label)


def _curve_row(s: Served) -> dict[str, Any]:
    e, b = s.joules_per_token, s.traffic.batch
    return {
        "x": b, "y": e.value, "low": e.low, "high": e.high, "told": int(b) & (int(b) - 1) == 0,
        "title": f"batch {b:,.0f}: {figures.joules(e.value)} per output token "
        f"({figures.interval(e.low, e.high)}), a step {figures.seconds(s.seconds.value)}",
    }  # fmt: skip


def shares(
    bars: Sequence[tuple[str, Mapping[str, float]]],
    keys: Mapping[str, Key],
    width: int,
    name: str,
    label: str,
) -> str:
    """Bars of parts that add up to a hundred per cent, one a row."""
    alt = altair()
    rows, texts = [], []
    for at, (bar, parts) in enumerate(bars):
        whole, start = sum(parts.values()) or 1.0, 0.0
        for k, key in keys.items():
            share = parts.get(k, 0.0) / whole
            if share > 0:
                rows.append({
                    "bar": at, "x": start, "end": start + share, "fill": light(key.colour),
                    "title": f"{figures.clean(bar)}: {key.text} {figures.percent(share)}",
                })  # fmt: skip
            if share * width > 44:
                pale = key.colour in ("damage1", "bits2", "damage2", "front")
                texts.append({
                    "bar": at, "x": start + share / 2, "text": f"{100 * share:.0f} %",
                    "fill": light("onpale" if pale else "ondeep"),
                })  # fmt: skip
            start += share
    names = [figures.clean(b)[:40] for b, _ in bars]
    order = list(range(len(bars)))
    x = alt.X("x:Q", title=None).scale(domain=[0, 1], nice=False).axis(None)
    y = alt.Y("bar:O", title=None, sort=order).axis(None)
    layers = [
        alt.Chart(data(rows))
        .mark_bar(size=26, stroke=light("card"), strokeWidth=1.2)
        .encode(x=x, x2="end:Q", y=y, fill=alt.Fill("fill:N", scale=None), description="title:N"),
        alt.Chart(data(texts))
        .mark_text(fontSize=12, baseline="middle")
        .encode(x=x, y=y, text="text:N", fill=alt.Fill("fill:N", scale=None)),
        alt.Chart(data([{"bar": i, "x": 0, "text": n} for i, n in enumerate(names)]))
        .mark_text(align="left", dy=-22, fontSize=12, fill=light("soft"))
        .encode(x=x, y=y, text="text:N"),
    ]
    chart = alt.layer(*layers).properties(width=width, height=56 * len(bars))
    return svg(chart, name, label)


def serve_bars(a: ServeAnswer) -> list[tuple[str, dict[str, float]]]:
    """Parts of a token's joules at the first, the told and the last batch."""
    from joulesmith.estimate.told import host_of

    chosen = [a.curve[0], a.served, a.curve[-1]] if a.curve else [a.served]
    bars = {}
    for s in sorted(chosen, key=lambda s: s.traffic.batch):
        host = host_of(s) * s.setup.devices * s.seconds.value / s.traffic.batch
        parts = {**s.split, "host": host}
        parts["building"] = (a.pue - 1) * sum(parts.values())
        told = figures.joules(s.joules_per_token_whole.value)
        bars[f"batch {s.traffic.batch:,.0f}: {told} a token"] = parts
    return list(bars.items())


def devices(a: CompareAnswer, width: int, name: str) -> str:
    """Joules per output token of each way, with its 90 % interval."""
    alt = altair()
    rows: list[dict[str, Any]] = []
    for i, r in enumerate(x for x in a.rows if x.served is not None):
        assert r.served is not None
        e = r.served.joules_per_token
        said = f"{r.served.setup.devices} x {figures.clean(r.name)}"[:44]
        told = figures.joules(e.value)
        rows.append({
            "row": i, "x": e.value, "zero": 0.0, "low": e.low, "high": e.high, "name": said,
            "text": told if i == 0 or r.ratio is None else f"{told}, x {figures.factor(r.ratio)}",
            "fill": light("reference" if i == 0 else "front"),
            "title": f"{said}: {told} ({figures.interval(e.low, e.high)}) per output token",
        })  # fmt: skip
    top = 1.04 * max(r["high"] for r in rows)
    x = alt.X("x:Q", title="joules per output token").scale(domain=[0, top], nice=False)
    x = x.axis(tickCount=max(3, width // 130), format="~s")
    y = alt.Y("row:O", title=None).axis(None)
    layers = [
        alt.Chart(data(rows))
        .mark_bar(size=20)
        .encode(x=x, x2="zero:Q", y=y, fill=alt.Fill("fill:N", scale=None), description="title:N"),
        alt.Chart(data(rows))
        .mark_rule(stroke=light("ink"), strokeWidth=1.6)
        .encode(x=alt.X("low:Q"), x2="high:Q", y=y),
        *(
            alt.Chart(data(rows))
            .mark_tick(stroke=light("ink"), thickness=1.6, size=9)
            .encode(x=alt.X(f"{end}:Q"), y=y)
            for end in ("low", "high")
        ),
        alt.Chart(data(rows))
        .mark_text(align="left", dy=-20, fontSize=12, fill=light("soft"))
        .encode(x=alt.X("zero:Q"), y=y, text="name:N"),
        alt.Chart(data([{**r, "end": top} for r in rows]))
        .mark_text(align="right", dy=-20, fontSize=12, fill=light("ink"))
        .encode(x=alt.X("end:Q"), y=y, text="text:N"),
    ]
    chart = alt.layer(*layers).properties(width=width, height=54 * len(rows))
    return svg(chart, name, f"Joules per output token of {len(rows)} ways of serving.")


def speed_up(a: TrainAnswer, width: int, height: int, name: str) -> str | None:
    """Speed-up (y) against devices (x), both logarithmic, under the ideal line."""
    return _scaling(
        a, width, height, name, "speed-up", [x.speedup for x in a.scaling],
        [x.ideal for x in a.scaling], "over the fewest", log=True,
    )  # fmt: skip


def scaling_kwh(a: TrainAnswer, width: int, height: int, name: str) -> str | None:
    """kWh (y) against devices (x)."""
    kwh = [x.kwh for x in a.scaling if x.kwh is not None]
    if len(kwh) != len(a.scaling):
        return None
    return _scaling(a, width, height, name, "kWh", kwh, [kwh[0]] * len(kwh), "in all",
                    log=False)  # fmt: skip


def _scaling(
    a: TrainAnswer, width: int, height: int, name: str, what: str, values: list[float],
    ideal: list[float], more: str, *, log: bool,
) -> str | None:  # fmt: skip
    if len(a.scaling) < 2:
        return None
    alt = altair()
    own = a.training.devices
    counts = [x.devices for x in a.scaling]
    rows = [
        {
            "x": n, "y": v, "ideal": i, "size": 170 if n == own else 44,
            "shape": "diamond" if n == own else "circle",
            "title": f"{n:,} devices: {figures.quantity(v, '').strip()} {what}",
        }
        for n, v, i in zip(counts, values, ideal, strict=True)
    ]  # fmt: skip
    low, high = min(*values, *ideal), max(*values, *ideal)
    x0, x1 = counts[0] / 1.2, counts[-1] * 1.2
    y0, y1 = (low / 1.25, high * 1.25) if log else (0.0, 1.1 * high)
    x = alt.X("x:Q", title="devices →").scale(type="log", domain=[x0, x1], nice=False)
    x = x.axis(grid=False, format=",.0f", values=counts if width > 400 else counts[::2])
    y = alt.Y("y:Q", title=f"{what} {more}")
    y = y.scale(type="log" if log else "linear", domain=[y0, y1], nice=False)
    ticks = {"values": _powers(y0, y1, steps=(1, 2, 5))} if log else {"tickCount": 5}
    y = y.axis(format="~s", titlePadding=10, **ticks)
    chart = alt.layer(
        alt.Chart(data(rows))
        .mark_line(stroke=light("soft"), strokeWidth=1.4, strokeDash=[5, 4])
        .encode(x=x, y=alt.Y("ideal:Q")),
        alt.Chart(data(rows)).mark_line(stroke=light("plan"), strokeWidth=2).encode(x=x, y=y),
        alt.Chart(data(rows))
        .mark_point(fill=light("plan"), stroke=light("card"), strokeWidth=1.6, opacity=1)
        .encode(
            x=x, y=y, shape=alt.Shape("shape:N", scale=None), size=alt.Size("size:Q", scale=None),
            description="title:N",
        ),
    ).properties(width=width, height=height)  # fmt: skip
    return svg(chart, name, f"{what} against {counts[0]:,} to {counts[-1]:,} devices.")


# ---- axes and labels


def _powers(low: float, high: float, steps: tuple[int, ...] = (1,)) -> list[float]:
    """Round numbers of a logarithmic axis."""
    found = [s * 10.0**e for e in range(-30, 31) for s in steps]
    inside = [x for x in found if low <= x <= high]
    return inside if len(inside) > 1 or steps != (1,) else _powers(low, high, (1, 2, 5))


def _doublings(last: float, width: int) -> list[int]:
    """Powers of two, as many as have room."""
    all_ = [1 << k for k in range(20) if 1 << k <= last]
    every = max(1, round(len(all_) * 52 / width + 0.3))
    return all_[::every]


def _placed(
    points: Sequence[tuple[float, float, str]], others: Sequence[tuple[float, float]],
    xs: tuple[float, float], ys: tuple[float, float], width: int, height: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Labels beside points of two logarithmic axes, in data units."""

    def at(v: float, ends: tuple[float, float], n: int) -> float:
        return (math.log(v / ends[0]) / math.log(ends[1] / ends[0])) * n

    def back(v: float, ends: tuple[float, float], n: int) -> float:
        return float(ends[0] * (ends[1] / ends[0]) ** (v / n))

    spots = labels.place(
        [(at(x, xs, width), height - at(y, ys, height), text) for x, y, text in points],
        [(at(x, xs, width), height - at(y, ys, height)) for x, y in others], width, height,
    )  # fmt: skip
    return [
        {
            "x": back(s.x, xs, width), "y": back(height - s.y, ys, height), "text": text,
            "side": s.align,
        }
        for (_, _, text), s in zip(points, spots, strict=True)
    ]  # fmt: skip


def _some(texts: Sequence[dict[str, Any]], side: str) -> bool:
    return any(t["side"] == side for t in texts)


def _texts(texts: Sequence[dict[str, Any]], x: Any, y: Any, side: str) -> Any:
    some = [t for t in texts if t["side"] == side]
    mark = {"align": side, "baseline": "middle", "fontSize": 12, "fill": light("ink")}
    return altair().Chart(data(some)).mark_text(**mark).encode(x=x, y=y, text="text:N")
