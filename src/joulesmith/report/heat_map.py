"""Where a quantized model was hurt: layers by roles, bits and predicted damage, as a page
and in the terminal. Knows tensor names and figures; no models and no files of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from joulesmith.atomic import atomic_path
from joulesmith.errors import MissingExtraError
from joulesmith.formats.packed import place
from joulesmith.report import charts, figures, palette
from joulesmith.report.result import TensorChoice

if TYPE_CHECKING:
    from rich.console import Console

    from joulesmith.inspection import Inspection
    from joulesmith.job.quantize import Made

_UNKNOWN_BITS = float("nan")


@dataclass(frozen=True)
class HeatMap:
    """Cells of a map. title: of the page. note: a line about the model. unit: of ``value``
    in the terminal's map: "nats" (damage), "bits", or "gone" (per cent of the weights, which
    then stand in the place of bits)."""

    title: str
    note: str
    tensors: tuple[TensorChoice, ...]
    unit: str = "nats"


def damage_of(
    damage: Mapping[str, float],
    types: Mapping[str, str] | str,
    bits: Mapping[str, float] | float | None = None,
    *,
    title: str,
    note: str = "",
) -> HeatMap:
    """The map of a `Made`'s damage.

    damage: tensor name (GGUF's or torch's) -> predicted KL, nats a token. types, bits: of
    each tensor by name, or one for all; bits default to those of the type's grid.
    """
    cells = []
    for name, loss in damage.items():
        kind = types if isinstance(types, str) else types.get(name, "unknown")
        width = bits.get(name) if isinstance(bits, Mapping) else bits
        cells.append(_choice(name, kind, _grid_bits(kind) if width is None else width, loss))
    return HeatMap(title, note, tuple(cells))


def bits_of(found: Inspection) -> HeatMap:
    """The map of a model file's bits per weight; vectors are left out."""
    cells = [
        _choice(t.name, t.type, t.bits_per_weight, math.nan)
        for t in found.tensors
        if t.bits_per_weight is not None and len(t.shape) > 1
    ]
    return HeatMap(found.name or found.path, found.format, tuple(cells), unit="bits")


def removed_of(found: Made, *, title: str) -> HeatMap:
    """What pruning and shrinking took from each matrix, in the numbers of the given model.

    For a shrunk model the parts that went, "attention" and "mlp", a whole layer as both.
    """
    cells = [_removed(p.name, p.sparsity, p.damage) for p in found.pruned]
    note = "; ".join(found.notes)
    shrunk = found.shrunk
    if shrunk is not None and not cells:
        whole = shrunk.before
        gone = {d.layer for d in shrunk.decisions if d.part == "layer"}
        for i in range(whole.layers):
            heads = 1 - shrunk.after.kv * shrunk.after.queries / (whole.kv * whole.queries)
            neurons = 1 - shrunk.after.neurons / whole.neurons
            for part, share in (("attention", heads), ("mlp", neurons)):
                cells.append(_removed(f"blk.{i}.{part}.weight", 1.0 if i in gone else share, None))
    return HeatMap(title, note, tuple(cells), unit="gone")


def _removed(name: str, share: float, damage: float | None) -> TensorChoice:
    tenths = round(10 * share)
    kind = f"{10 * tenths} %"
    return _choice(name, kind, 100 * share, math.nan if damage is None else damage)


def _choice(name: str, kind: str, bits: float, damage: float) -> TensorChoice:
    layer, role = place(name)
    return TensorChoice(
        tensor=name, layer=layer, role=role, type=kind, rows=1, columns=1,
        bits_per_weight=bits, damage=damage, joules=math.nan,
    )  # fmt: skip


def _grid_bits(kind: str) -> float:
    """Bits per weight of a grid's name; not a number where it is none."""
    from joulesmith.compress.quantize.grids import grid
    from joulesmith.errors import JoulesmithError

    try:
        return grid(kind).bits_per_weight
    except JoulesmithError:
        return _UNKNOWN_BITS


# --- the page ------------------------------------------------------------------------------


def heat_map_page(found: HeatMap, path: Path) -> None:
    """Write the map as one HTML file without scripts or network, whole or not at all.

    Raises `MissingExtraError` where the chart or template packages are absent.
    """
    html = render_heat_map(found)
    with atomic_path(path) as temporary:
        temporary.write_bytes(html.encode("utf-8", "replace"))


def render_heat_map(found: HeatMap) -> str:
    """The page as text."""
    try:
        from markupsafe import Markup
    except ImportError as e:
        raise MissingExtraError("jinja2") from e
    from joulesmith.report.page import environment

    worst = sorted((t for t in found.tensors if figures.known(t.damage)), key=lambda t: -t.damage)
    pictures = {
        f"{what}_{name}": None if svg is None else Markup(svg)
        for what in ("damage", "type")
        for name, tall in (("wide", False), ("narrow", True))
        for svg in [charts.layer_map(found, what, what[0] + name[0], tall=tall)]
    }
    total = sum(t.damage for t in worst)
    ranked = [(t, 100 * t.damage / total if total > 0 else 0.0) for t in worst]
    return (
        environment()
        .get_template("heat_map.html.j2")
        .render(
            m=found,
            style=Markup(palette.style()),
            charts=pictures,
            total=total if worst else None,
            worst=ranked,
            rows=ranked or [(t, 0.0) for t in found.tensors],
            roles=by_role(found.tensors),
            type_keys=charts.type_keys(found.tensors, charts.words_of(found)),
            damage_keys=charts.damage_keys(found.tensors)[1],
        )
    )


def by_role(tensors: Iterable[TensorChoice]) -> list[tuple[str, int, float, float]]:
    """(role, matrices, summed damage, share of all damage), most damage first."""
    sums: dict[str, tuple[int, float]] = {}
    for t in tensors:
        if figures.known(t.damage):
            n, total = sums.get(t.role, (0, 0.0))
            sums[t.role] = n + 1, total + t.damage
    whole = sum(d for _, d in sums.values())
    rows = [(role, n, d, d / whole if whole > 0 else 0.0) for role, (n, d) in sums.items()]
    return sorted(rows, key=lambda r: -r[2])


# --- the terminal --------------------------------------------------------------------------


def render_map(found: HeatMap, console: Console) -> None:
    """Layers down, roles across: a coloured figure a cell; plain figures in a pipe."""
    from rich.table import Table
    from rich.text import Text

    cells: dict[tuple[int, str], float] = {}
    for t in found.tensors:
        value = t.damage if found.unit == "nats" else t.bits_per_weight
        if t.layer is None or not figures.known(value):
            continue
        key = (t.layer, t.role)
        # experts share a cell: damage adds up, bits are the dearest's
        both = sum if found.unit == "nats" else max
        cells[key] = both((cells[key], value)) if key in cells else value
    if not cells:
        console.print(Text(f"no {found.unit} of matrices inside layers are known"))
        return
    layers = sorted({layer for layer, _ in cells})
    roles = charts.role_order({role for _, role in cells})
    shade = _shades(list(cells.values()), found.unit)
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("layer", justify="right", no_wrap=True)
    for role in roles:
        table.add_column(figures.printable(role, console.encoding)[:16], justify="right")
    for layer in layers:
        row = []
        for role in roles:
            here = cells.get((layer, role))
            row.append(Text("") if here is None else Text(_figure(here, found.unit), shade(here)))
        table.add_row(str(layer), *row)
    console.print(table)
    console.print(Text(_WORDS[found.unit]))


_WORDS = {
    "bits": "bits per weight",
    "gone": "per cent of the weights gone",
    "nats": "predicted damage, millinats a token",
}


def _figure(value: float, unit: str) -> str:
    return {"bits": f" {value:.2f} ", "gone": f" {value:.0f} ", "nats": f" {1e3 * value:.3g} "}[
        unit
    ]


def _shades(values: Sequence[float], unit: str) -> Callable[[float], str]:
    """Value -> rich style, on the page's ramps: by level for bits, log spaced for damage."""
    ramp = palette.DAMAGE if unit == "nats" else palette.BITS
    if unit == "gone":
        return lambda v: _style(ramp[min(len(ramp) - 1, int(v / 100 * len(ramp)))])
    if unit == "bits":
        levels = sorted(set(values))
        names = palette.ramp(ramp, len(levels))
        colours = dict(zip(levels, names, strict=True))
        return lambda v: _style(colours[v])
    positive = [v for v in values if v > 0]
    if not positive:
        return lambda v: _style(ramp[0])
    top, low = math.log(max(positive)), math.log(max(min(positive), max(positive) * 1e-4))

    def pick(v: float) -> str:
        if v <= 0 or top - low < 0.2:
            return _style(ramp[0])
        share = (math.log(v) - low) / (top - low)
        return _style(ramp[min(len(ramp) - 1, max(0, int(share * len(ramp))))])

    return pick


def _style(name: str) -> str:
    return f"{palette.light(palette.on(name))} on {palette.light(name)}"
