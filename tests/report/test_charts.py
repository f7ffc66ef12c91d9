"""Charts: every point and tensor is drawn; colours are readable and told apart."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from joulesmith.report import charts, figures, labels, palette
from joulesmith.report.result import FrontPoint, Result

SVG = "{http://www.w3.org/2000/svg}"


def titles(svg: str | None) -> list[str]:
    assert svg is not None
    return [t.text or "" for t in ElementTree.fromstring(svg).iter(f"{SVG}title")]


def luminance(colour: str) -> float:
    """WCAG 2 relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    lin = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * lin[0] + 0.7152 * lin[1] + 0.0722 * lin[2]


def contrast(a: str, b: str) -> float:
    x, y = sorted((luminance(a), luminance(b)))
    return (y + 0.05) / (x + 0.05)


@pytest.mark.parametrize("mode", [0, 1])
def test_text_is_readable(mode: int) -> None:
    pair = {k: v[mode] for k, v in palette.PAIRS.items()}
    for ink in ("ink", "soft", "plan", "pass", "fail", "reference"):
        for ground in ("card", "paper", "wash"):
            assert contrast(pair[ink], pair[ground]) >= 4.5, (ink, ground)
    for ink in ("ink", "fail"):
        assert contrast(pair[ink], pair["failwash"]) >= 4.5
    for step in palette.BITS:
        assert contrast(pair[palette.on(step)], pair[step]) >= 4.5, step
    for ramp in (palette.BITS, palette.DAMAGE):
        steps = [luminance(pair[s]) for s in ramp]
        assert steps == sorted(steps, reverse=mode == 0)


def test_light_colours_are_unique() -> None:
    lights = [a for a, _ in palette.PAIRS.values()]
    assert len(lights) == len(set(lights))


def test_front_draws_every_point(passed: Result) -> None:
    pytest.importorskip("vl_convert")
    svg = charts.front(passed, 900, 400, "t")
    seen = titles(svg)
    for p in passed.front:
        how = "measured" if p.measured else "predicted"
        assert [s for s in seen if s.startswith(f"{p.name}: ") and s.endswith(how)]
    assert svg and "floor 0.99" in svg
    for name in ("BF16", "Q4_K_M", "IQ4_NL"):
        assert f">{name}<" in svg


def test_front_marks_points_below_the_picture(passed: Result) -> None:
    pytest.importorskip("vl_convert")
    low = FrontPoint(
        name="Q2_K", kind="uniform", joules_per_token=0.03, kept=0.41, kept_low=0.4, measured=True
    )
    svg = charts.front(passed.model_copy(update={"front": (*passed.front, low)}), 900, 400, "t")
    assert svg and ">Q2_K 0.410<" in svg


def test_front_without_points(passed: Result) -> None:
    pytest.importorskip("altair")
    assert charts.front(passed.model_copy(update={"front": ()}), 900, 400, "t") is None


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("what", ["type", "damage"])
def test_map_draws_every_layer_tensor(passed: Result, what: str, tall: bool) -> None:
    pytest.importorskip("vl_convert")
    svg = charts.layer_map(passed, what, "t", tall=tall)
    seen = titles(svg)
    inside = [t for t in passed.tensors if t.layer is not None]
    assert len(seen) == len(inside)
    for t in inside:
        assert [s for s in seen if s.startswith(f"{t.tensor}: {t.type},")]
    if what == "type":
        assert svg
        colours = {
            t.type: palette.light(charts.type_keys(passed.tensors)[t.type].colour) for t in inside
        }
        assert len(set(colours.values())) == 4
        cells = svg.count(f'fill="{colours["Q4_0"]}"')
        assert cells == sum(t.type == "Q4_0" for t in inside)


def test_experts_share_a_cell(passed: Result) -> None:
    pytest.importorskip("vl_convert")
    base = next(t for t in passed.tensors if t.layer == 0)
    experts = tuple(
        base.model_copy(
            update={"tensor": f"blk.0.ffn_gate.{i}.weight", "role": "ffn_gate", "type": kind}
        )
        for i, kind in enumerate(["Q8_0", "Q4_0", "Q4_0"])
    )
    svg = charts.layer_map(passed.model_copy(update={"tensors": experts}), "type", "t", tall=False)
    assert len(titles(svg)) == 1 and svg and ">mix<" in svg


def test_short_names_stay_distinct(passed: Result) -> None:
    base = passed.tensors[0]
    some = [base.model_copy(update={"type": t}) for t in ("Q4_0", "Q4_1", "Q4_K", "IQ4_NL", "Q8_0")]
    shorts = {k: v.short for k, v in charts.type_keys(some).items()}
    assert shorts == {"Q4_0": "Q4", "Q4_1": "Q41", "Q4_K": "Q4K", "IQ4_NL": "IQ4", "Q8_0": "Q8"}
    some.append(base.model_copy(update={"type": "IQ4_XS"}))
    assert {v.short for v in charts.type_keys(some).values()} == {""}


def test_labels_keep_apart_and_inside() -> None:
    points = [
        (100.0, 100.0, "first"),
        (104.0, 102.0, "second"),
        (98.0, 96.0, "third"),
        (395.0, 5.0, "corner"),
    ]
    spots = labels.place(points, [], 400, 200)
    boxes = []
    for (_, _, text), s in zip(points, spots, strict=True):
        w = 6.4 * len(text)
        left = s.x if s.align == "left" else s.x - w
        boxes.append((left, s.y - 7, left + w, s.y + 7))
    for i, a in enumerate(boxes):
        assert a[0] >= 0 and a[2] <= 400 and a[1] >= -7
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_figures() -> None:
    assert figures.joules(0.028) == "28.0 mJ"
    assert figures.joules(None) == figures.joules(float("nan")) == "unknown"
    assert figures.interval(0.031, 0.0932) == "31.0 to 93.2 mJ"
    assert figures.interval(0.634, 1.84) == "634 mJ to 1.84 J"
    assert figures.interval(None, 1.0) == "unknown"
    assert figures.change(100, 68) == "−32.0 %"
    assert figures.change(0, 68) == figures.change(None, 1) == "unknown"
    assert figures.rate(1 / 125) == "125" and figures.rate(0.0) == "unknown"
    assert figures.small(0.0011) == "0.00110" and figures.small(0) == "0"
    assert figures.clean("a\x1b[31m\u202eb") == "a\ufffd[31m\ufffdb"
