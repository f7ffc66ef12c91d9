"""One HTML file that tells the whole run, without network or JavaScript. Knows no measuring.

Everything a user or a model file named is escaped by the template engine; a
content policy in the page forbids scripts and every fetch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from joulesmith.atomic import atomic_path
from joulesmith.errors import MissingExtraError
from joulesmith.report import charts, figures, palette, view
from joulesmith.report.result import Result

if TYPE_CHECKING:
    from jinja2 import Environment


def write_page(result: Result, path: Path) -> None:
    """Write the report as one self-contained HTML file, whole or not at all.

    Raises `MissingExtraError` where the chart or template packages are absent.
    """
    html = render_page(result)
    with atomic_path(path) as temporary:
        temporary.write_bytes(html.encode("utf-8", "replace"))


def render_page(result: Result) -> str:
    """The page as text."""
    env = environment()
    safe = _safe()
    pictures = {
        key: None if svg is None else safe(svg)
        for key, svg in {
            "front_wide": charts.front(result, 1060, 440, "fw"),
            "front_narrow": charts.front(result, 290, 350, "fn"),
            "types_wide": charts.layer_map(result, "type", "tw", tall=False),
            "types_narrow": charts.layer_map(result, "type", "tn", tall=True),
            "damage_wide": charts.layer_map(result, "damage", "dw", tall=False),
            "damage_narrow": charts.layer_map(result, "damage", "dn", tall=True),
        }.items()
    }
    return env.get_template("page.html.j2").render(
        r=result,
        style=safe(palette.style()),
        charts=pictures,
        headline=view.headline(result),
        before=view.baseline_run(result),
        after=view.plan_run(result),
        energy_cards=_energy_cards(result),
        kept_at=view.kept_share(result),
        ratios=_ratios(result),
        table=_joule_table(result),
        type_keys=charts.type_keys(result.tensors),
        damage_keys=charts.damage_keys(result.tensors)[1],
        type_counts=_type_counts(result),
        outside=[t for t in result.tensors if t.layer is None],
        pedigrees=figures.PEDIGREES,
        kinds=view.KINDS,
    )


def environment() -> Environment:
    """The templates, with the filters for figures; all text is escaped."""
    try:
        import jinja2
    except ImportError as e:
        raise MissingExtraError("jinja2") from e

    def tidy(value: Any) -> Any:
        """Clean what was not marked as markup; ``None`` must never reach the page bare."""
        if value is None:
            return figures.UNKNOWN
        return figures.clean(value) if type(value) is str else value

    env = jinja2.Environment(
        loader=jinja2.PackageLoader("joulesmith.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=tidy,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {
        "joules": figures.joules,
        "seconds": figures.seconds,
        "rate": figures.rate,
        "size": figures.size,
        "fixed": figures.fixed,
        "small": figures.small,
        "count": figures.count,
        "percent": figures.percent,
        "times": view.times,
        "duration": figures.duration,
        "short_number": figures.parameters,
    }
    env.globals |= {
        "interval": figures.interval,
        "change": figures.change,
        "known": figures.known,
    }
    return env


def _safe() -> Any:
    """Marks our own SVG and CSS as markup."""
    from markupsafe import Markup

    return Markup


def _energy_cards(result: Result) -> list[dict[str, Any]]:
    """Per phase: both energies, and the ratio in words where there is one."""
    before, after = view.baseline_run(result), view.plan_run(result)
    names = {"decode": "Decode", "prefill": "Prefill", "workload": "Whole workload"}
    cards = []
    for phase in view.PHASES:
        ratio = view.ratio_for(result, phase)
        cards.append(
            {
                "phase": phase,
                "name": names[phase],
                "before": view.phase_of(before, phase),
                "after": view.phase_of(after, phase),
                "ratio": ratio,
                "claim": None if ratio is None else view.claim(ratio),
            }
        )
    return cards


def _ratios(result: Result) -> list[dict[str, Any]]:
    """Phases with their ratios, and each ratio's places on a scale common to the phase table."""
    if not result.ratios:
        return []
    kinds = {r.name: r.kind for r in result.runs}
    # One far-off reference (an engine ten times slower) must not flatten the rest.
    near = sorted(r.high for r in result.ratios)[int(0.75 * (len(result.ratios) - 1))]
    most = max(r.high for r in result.ratios)
    low = min(1.0, *(r.low for r in result.ratios)) - 0.02
    high = max(1.0, most if most < 2 * near else 1.15 * near) + 0.02
    groups = []
    for phase in ("workload", "decode", "prefill"):
        rows = []
        for r in (r for r in result.ratios if r.phase == phase):
            at = {
                key: 100 * min(1.0, max(0.0, (value - low) / (high - low)))
                for key, value in (("low", r.low), ("mid", r.ratio), ("high", r.high), ("one", 1.0))
            }
            row = {"ratio": r, "at": at, "off": r.high > high, "claim": view.claim(r)}
            row["kind"] = view.KINDS.get(kinds.get(r.baseline, ""), "")
            row["headline"] = phase == "workload" and r.baseline == result.headline_baseline
            rows.append(row)
        if rows:
            groups.append({"phase": phase, "rows": rows})
    return groups


def _joule_table(result: Result) -> list[dict[str, Any]]:
    """The joule table by shape, largest first; bars are relative to the shape's dearest type."""
    shapes: dict[tuple[int, int], list[Any]] = {}
    for cell in result.table:
        shapes.setdefault((cell.rows, cell.columns), []).append(cell)
    used: dict[tuple[int, int, str], int] = {}
    for t in result.tensors:
        key = (t.rows, t.columns, t.type)
        used[key] = used.get(key, 0) + 1
    out = []
    for (rows, columns), cells in sorted(shapes.items(), key=lambda kv: -kv[0][0] * kv[0][1]):
        most = {
            k: max([getattr(c, k) for c in cells if figures.known(getattr(c, k))] or [0.0])
            for k in ("decode_joules", "prefill_joules")
        }
        lines = []
        for c in sorted(cells, key=lambda c: c.decode_joules):
            bars = {k: _bar(getattr(c, k), top) for k, top in most.items()}
            lines.append({"cell": c, "bars": bars, "used": used.get((rows, columns, c.type), 0)})
        out.append({"rows": rows, "columns": columns, "lines": lines})
    return out


def _bar(value: float, most: float) -> float:
    return 100 * value / most if figures.known(value) and most > 0 else 0.0


def _type_counts(result: Result) -> list[dict[str, Any]]:
    """Per type: tensors, their share of the weights and of the predicted joules."""
    weights = sum(t.rows * t.columns for t in result.tensors) or 1
    out = []
    for kind in charts.type_keys(result.tensors):
        some = [t for t in result.tensors if t.type == kind]
        share = sum(t.rows * t.columns for t in some) / weights
        out.append({"type": kind, "tensors": len(some), "share": share})
    return out
