"""Charts as inline SVG: the front and the layer maps. Knows a `Result`, not the page.

Drawn by altair and vl-convert, without a browser, JavaScript or network. Each
SVG is then made fit for a page: unique ids, one label for screen readers,
hover titles on the marks, the page's own font.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from xml.etree import ElementTree

from joulesmith.errors import MissingExtraError
from joulesmith.report import figures, labels
from joulesmith.report.palette import BITS, DAMAGE, light, on, ramp
from joulesmith.report.result import FrontPoint, Result, TensorChoice

_SVG = "http://www.w3.org/2000/svg"
_ROLES = (
    "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output",
    "ffn_gate", "ffn_up", "ffn_down", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps",
)  # fmt: skip
_DECIMALS = re.compile(r"(\.\d\d)\d+")
_DROPPED = ("font-family", "aria-roledescription", "aria-hidden", "pointer-events", "class")


@dataclass(frozen=True)
class Key:
    """One entry of a legend: a colour of the palette, what it means, the map's short text."""

    colour: str
    text: str
    short: str = ""


# --- the front: kept quality against joules per token ---------------------------------------


def front(result: Result, width: int, height: int, name: str) -> str | None:
    """Kept quality (y) against J/token (x), ``None`` when no point is known.

    Points far below the floor would flatten everything of interest: they sit
    on the lower edge, pointing down, with their figure written out.
    """
    alt = altair()
    points = [
        p for p in result.front if figures.known(p.joules_per_token) and figures.known(p.kept)
    ]
    points = [p for p in points if p.joules_per_token > 0]
    if not points:
        return None
    least = max(min(p.kept for p in points), 1 - 8 * max(1 - result.keep, 0.002))
    top = max(1.0, *(p.kept for p in points))
    pad = 0.07 * max(top - min(least, result.keep), 1e-4)
    y0, y1 = min(least, result.keep) - 1.4 * pad, top + pad
    xs = [p.joules_per_token * 1e3 for p in points]
    spread = max(max(xs) - min(xs), 0.05 * max(xs))
    x0, x1 = max(0.0, min(xs) - 0.09 * spread), max(xs) + 0.13 * spread

    def px(mj: float) -> float:
        return (mj - x0) / (x1 - x0) * width

    def py(kept: float) -> float:
        return (y1 - kept) / (y1 - y0) * height

    rows = [_front_row(p, y0 + 0.5 * pad) for p in points]
    if any(p.kind == "plan" and p.measured for p in points):
        for p, row in zip(points, rows, strict=True):
            if p.kind == "plan" and not p.measured:
                row["label"] = ""  # the hollow mark beside the plan's; the legend names it
    named = sorted((r for r in rows if r["label"]), key=lambda r: r["order"])
    spots = labels.place(
        [(px(r["x"]), py(r["y"]), r["label"]) for r in named],
        [(px(r["x"]), py(r["y"])) for r in rows if not r["label"]],
        width,
        height,
    )
    texts = [
        {
            "x": x0 + s.x / width * (x1 - x0),
            "y": y1 - s.y / height * (y1 - y0),
            "text": r["label"],
            "colour": r["ink"],
        }
        | {"align": s.align, "bold": r["kind"] == "plan"}
        for r, s in zip(named, spots, strict=True)
    ]

    x = alt.X("x:Q", title="← better · millijoules per token of the workload")
    x = x.scale(domain=[x0, x1], nice=False)
    y = alt.Y("y:Q", title="kept quality").scale(domain=[y0, y1], nice=False)
    x = x.axis(tickCount=max(3, width // 110), grid=False)
    y = y.axis(tickCount=6, titlePadding=12, format=".3f" if y1 - y0 < 0.05 else ".2f")
    layers = [
        alt.Chart(data([{"y": result.keep}]))
        .mark_rule(stroke=light("fail"), strokeWidth=1.5, strokeDash=[6, 4])
        .encode(y=y),
        alt.Chart(data([{"x": x1, "y": result.keep, "text": f"floor {result.keep:g}"}]))
        .mark_text(align="right", dx=-4, dy=-8, fontSize=12, fill=light("fail"))
        .encode(x=x, y=y, text="text:N"),
        alt.Chart(data([r for r in rows if r["kind"] == "front"]))
        .mark_line(stroke=light("front"), strokeWidth=1.5, interpolate="monotone", clip=True)
        .encode(x=x, y=y),
        alt.Chart(data([r for r in rows if r["low"] is not None]))
        .mark_rule(strokeWidth=1.5)
        .encode(x=x, y=alt.Y("low:Q"), y2="y:Q", stroke=alt.Stroke("ink:N", scale=None)),
        alt.Chart(data(rows))
        .mark_point(strokeWidth=1.6, opacity=1)
        .encode(
            x=x,
            y=y,
            shape=alt.Shape("shape:N", scale=None),
            size=alt.Size("size:Q", scale=None),
            fill=alt.Fill("fill:N", scale=None),
            stroke=alt.Stroke("ink:N", scale=None),
            description="title:N",
        ),
    ]
    for align in ("left", "right"):
        for bold in (False, True):
            some = [t for t in texts if t["align"] == align and t["bold"] is bold]
            if some:
                mark = {"align": align, "baseline": "middle", "fontSize": 12}
                layers.append(
                    alt.Chart(data(some))
                    .mark_text(fontWeight=600 if bold else 400, **mark)
                    .encode(x=x, y=y, text="text:N", fill=alt.Fill("colour:N", scale=None))
                )
    chart = alt.layer(*layers).properties(width=width, height=height)
    return svg(chart, name, _front_label(result, points))


def _front_row(p: FrontPoint, edge: float) -> dict[str, Any]:
    """One point as the chart's data; ``edge`` is the lowest place a point may take."""
    ink = {"plan": "plan", "front": "front", "uniform": "reference"}.get(p.kind, "ink")
    below = p.kept < edge
    shape = {"plan": "diamond", "baseline": "square", "given": "square"}.get(p.kind, "circle")
    big = {"plan": 170, "front": 26, "uniform": 62}.get(p.kind, 80)
    text = "" if p.kind == "front" else figures.clean(p.name)[:28]
    if below:
        shape, text = "triangle-down", f"{text} {p.kept:.3f}".strip()
    how = "measured" if p.measured else "predicted"
    title = f"{figures.clean(p.name)}: {figures.joules(p.joules_per_token)} per token, "
    title += f"kept {p.kept:.4f}"
    if p.kept_low is not None:
        title += f" (at least {p.kept_low:.4f})"
    return {
        "x": p.joules_per_token * 1e3,
        "y": edge if below else p.kept,
        "low": None if p.kept_low is None or below else max(p.kept_low, edge),
        "kind": p.kind,
        "order": {"plan": 0, "given": 1, "baseline": 1}.get(p.kind, 2 + p.joules_per_token),
        "ink": light(ink),
        "fill": light(ink) if p.measured else light("card"),
        "shape": shape,
        "size": big,
        "label": text,
        "title": f"{title}, {how}",
    }


def _front_label(result: Result, points: Sequence[FrontPoint]) -> str:
    plan = next((p for p in points if p.kind == "plan" and p.measured), None)
    text = f"Kept quality against joules per token, {len(points)} points, floor {result.keep:g}."
    if plan is not None:
        text += f" The plan: {figures.joules(plan.joules_per_token)}, kept {plan.kept:.4f}."
    return text + " The figures are in the tables of this page."


# --- the layer map: one cell a tensor ---------------------------------------------------------


def type_keys(tensors: Sequence[TensorChoice], words: str = "bits per weight") -> dict[str, Key]:
    """A colour and a short text for each type, most bits (or whatever ``words`` say) first."""
    bits: dict[str, float] = {}
    for t in tensors:
        bits[t.type] = max(bits.get(t.type, 0.0), t.bits_per_weight)
    types = sorted(bits, key=lambda k: (bits[k], k))
    names = ramp(BITS, len(types))
    short = {t: _short(t) for t in types}
    if len(set(short.values())) < len(short):
        short = dict.fromkeys(types, "")
    keys = {
        t: Key(
            c,
            figures.clean(t)
            if words == GONE
            else f"{figures.clean(t)}, {figures.small(bits[t])} {words}",
            figures.clean(short[t]),
        )
        for t, c in zip(types, names, strict=True)
    }
    return dict(reversed(keys.items()))


def _short(kind: str) -> str:
    """``Q4_K -> Q4K``, ``Q8_0 -> Q8``, ``INT4-G64 -> INT4``; the legend gives it in full."""
    head, _, rest = kind.partition("-")[0].partition("_")
    return (head + (rest[0] if rest[:1] in ("K", "1") else ""))[:5]


def damage_keys(tensors: Sequence[TensorChoice]) -> tuple[list[float], list[Key]]:
    """Upper edges (all but the last class) and legend of the damage classes, log spaced."""
    some = [t.damage for t in tensors if figures.known(t.damage) and t.damage > 0]
    if not some:
        return [], [Key(DAMAGE[0], "no predicted damage")]
    low, high = math.log(max(min(some), max(some) * 1e-4)), math.log(max(some))
    n = len(DAMAGE) if high - low > 0.2 else 1
    edges = [float(f"{math.exp(low + (high - low) * i / n):.2g}") for i in range(1, n)]
    keys = [Key(c, f"up to {e:.2g}") for c, e in zip(DAMAGE, edges, strict=False)]
    keys.append(Key(DAMAGE[n - 1], f"up to {max(some):.2g} nats"))
    return edges, keys


class Map(Protocol):
    """What a layer map is drawn from: a `Result`, or tensors alone."""

    @property
    def tensors(self) -> Sequence[TensorChoice]: ...


GONE = "per cent gone"


def words_of(found: Map) -> str:
    """What ``bits_per_weight`` of a map's cells counts."""
    return GONE if getattr(found, "unit", "") == "gone" else "bits per weight"


def role_order(found: set[str]) -> list[str]:
    """Roles in the order that a block computes them, others after."""
    return [r for r in _ROLES if r in found] + sorted(found.difference(_ROLES))


def layer_map(result: Map, what: str, name: str, *, tall: bool) -> str | None:
    """Layer x role, coloured by type (``what="type"``) or by damage (``what="damage"``).

    ``tall`` puts layers downwards, for narrow screens. ``None`` without layers.
    """
    alt = altair()
    cells: dict[tuple[int, str], list[TensorChoice]] = {}
    for t in result.tensors:
        if t.layer is not None:
            cells.setdefault((t.layer, t.role), []).append(t)
    if not cells:
        return None
    layers = sorted({layer for layer, _ in cells})
    roles = role_order({role for _, role in cells})
    types = type_keys(result.tensors, words_of(result))
    edges, damages = damage_keys(result.tensors)
    rows = []
    for (layer, role), group in cells.items():
        if what == "type":
            first = max(group, key=lambda t: t.rows * t.columns)
            colour, text = types[first.type].colour, types[first.type].short
            if any(t.type != first.type for t in group):
                text = "mix"
        else:
            damage = sum(t.damage for t in group if figures.known(t.damage))
            colour, text = damages[sum(damage > e for e in edges)].colour, ""
        rows.append(
            {
                "layer": layer,
                "role": figures.clean(role)[:24],
                "fill": light(colour),
                "on": light(on(colour)),
                "text": text,
                "title": "; ".join(_tensor_title(t, words_of(result)) for t in group[:12]),
            }
        )
    step = (44.0 if len(roles) <= 7 else 300 / len(roles), 21.0) if tall else (0.0, 27.0)
    across, down = (roles, layers) if tall else (layers, roles)
    if not tall:
        step = (min(35.0, 1030 / len(layers)), 27.0)
    every = max(1, round(13 / step[0])) if not tall else 1
    layer_axis: dict[str, Any] = {"title": "layer", "values": layers[::every], "labelAngle": 0}
    role_axis: dict[str, Any] = {"title": None, "labelLimit": 150, "labelPadding": 6}
    # The renderer measures text in its own font; the page's may be wider.
    room = 7.4 * max(len(figures.clean(r)[:24]) for r in roles) + 8
    role_axis["minExtent"] = room * 0.77 if tall else room
    if tall:
        role_axis |= {"orient": "top", "labelAngle": -50}
    names = [figures.clean(r)[:24] for r in roles]
    sides = [
        ("layer:O", layer_axis, layers),
        ("role:N", role_axis, names),
    ]
    if tall:
        sides.reverse()
    x = alt.X(sides[0][0], sort=sides[0][2]).axis(domain=False, ticks=False, **sides[0][1])
    y = alt.Y(sides[1][0], sort=sides[1][2]).axis(domain=False, ticks=False, **sides[1][1])
    stroke = 1 if step[0] > 6 else 0
    parts = [
        alt.Chart(data(rows))
        .mark_rect(stroke=light("card"), strokeWidth=stroke)
        .encode(x=x, y=y, fill=alt.Fill("fill:N", scale=None), description="title:N")
    ]
    longest = max(len(str(r["text"])) for r in rows)
    size = min(10.0, (step[0] - 3) / max(longest, 1) / 0.62)
    if size >= 6.5 and longest:
        parts.append(
            alt.Chart(data([{k: v for k, v in r.items() if k != "title"} for r in rows]))
            .mark_text(fontSize=size, baseline="middle")
            .encode(x=x, y=y, text="text:N", fill=alt.Fill("on:N", scale=None))
        )
    chart = alt.layer(*parts).properties(width=step[0] * len(across), height=step[1] * len(down))
    kind = "type" if what == "type" else "predicted damage"
    label = f"Map of {len(layers)} layers by {len(roles)} roles, coloured by {kind}."
    return svg(chart, name, f"{label} Every tensor is in the table below the maps.")


def _tensor_title(t: TensorChoice, words: str) -> str:
    title = (
        f"{figures.clean(t.tensor)}: {figures.clean(t.type)}, "
        f"{figures.small(t.bits_per_weight)} {words}"
    )
    if figures.known(t.damage):
        title += f", damage {figures.small(t.damage)} nats"
    return title + (f", {figures.joules(t.joules)} per token" if figures.known(t.joules) else "")


# --- from altair to an SVG for the page ---------------------------------------------------------


def altair() -> Any:
    """The package, with what renders its charts. Raises `MissingExtraError`."""
    try:
        import altair
        import vl_convert  # noqa: F401  (altair finds it by itself)
    except ImportError as e:
        raise MissingExtraError(e.name or "altair") from e
    return altair


def data(rows: list[dict[str, Any]]) -> Any:
    """Rows of a chart, written into it."""
    return altair().Data(values=rows)


def svg(chart: Any, name: str, label: str) -> str:
    """Render and make fit for the page; ``name`` prefixes ids, ``label`` is read aloud."""
    soft, rule = light("soft"), light("rule")
    chart = (
        chart.configure(background=light("card"), padding=4)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=soft,
            titleColor=soft,
            gridColor=rule,
            domainColor=rule,
            tickColor=rule,
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight=400,
            labelOverlap=False,
        )
    )
    buffer = io.StringIO()
    chart.save(buffer, format="svg")
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(buffer.getvalue())
    for node in list(root.iter()):
        text = node.attrib.pop("aria-label", None)
        if node.attrib.pop("role", None) == "graphics-symbol" and text and node.get("d"):
            title = ElementTree.Element(f"{{{_SVG}}}title")
            title.text = text
            node.insert(0, title)
        for attribute in _DROPPED:
            node.attrib.pop(attribute, None)
        for key, value in list(node.attrib.items()):
            if key == "id":
                node.set(key, f"{name}-{value}")
            elif "url(#" in value:
                node.set(key, value.replace("url(#", f"url(#{name}-"))
            elif key in ("d", "transform"):
                node.set(key, _DECIMALS.sub(r"\1", value))
    width = float(root.get("width", "0"))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", figures.clean(label))
    root.set("style", f"max-width:{width:.0f}px")
    return ElementTree.tostring(root, encoding="unicode")
