"""The damage map: every matrix is drawn and listed, hostile names are harmless."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from joulesmith.formats.packed import place
from joulesmith.report import palette
from joulesmith.report.heat_map import HeatMap, by_role, damage_of, heat_map_page, render_map

ROLES = ("attn_q", "attn_v", "ffn_down")
DAMAGE = {
    f"blk.{layer}.{role}.weight": 1e-4 * (1 + layer) * (1 + i) ** 3
    for layer in range(4)
    for i, role in enumerate(ROLES)
}


def found() -> HeatMap:
    types = {n: "INT8-G64" if "ffn_down" in n else "INT4-G64-ZP" for n in DAMAGE}
    return damage_of(DAMAGE, types, title="a <b> & c", note="kept 0.9")


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("blk.12.attn_q.weight", (12, "attn_q")),
        ("model.layers.3.self_attn.o_proj.weight", (3, "attn_output")),
        ("module.model.layers.3.mlp.down_proj.codes", (3, "ffn_down")),
        ("transformer.h.0.attn.c_attn.weight", (0, "c_attn")),
        ("token_embd.weight", (None, "token_embd")),
        ("blk.x.attn_q.weight", (None, "blk.x.attn_q")),
    ],
)
def test_places_by_name(name: str, want: tuple[int | None, str]) -> None:
    assert place(name) == want


def test_damage_adds_up_by_role() -> None:
    rows = by_role(found().tensors)
    assert [r[0] for r in rows] == ["ffn_down", "attn_v", "attn_q"]
    assert sum(r[2] for r in rows) == pytest.approx(sum(DAMAGE.values()))
    assert sum(r[3] for r in rows) == pytest.approx(1)
    assert {t.bits_per_weight for t in found().tensors} == {8.25, 4.3125}


def test_the_page_has_every_matrix(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    pytest.importorskip("jinja2")
    heat_map_page(found(), tmp_path / "map.html")
    html = (tmp_path / "map.html").read_text()
    for name in DAMAGE:
        # wide and narrow, damage and type, and the table
        assert html.count(f"<title>{name}: ") == 4 and f'<th scope="row">{name}</th>' in html
    assert (
        "a &lt;b&gt; &amp; c" in html
        and "<script" not in html
        and "http:" not in html.replace("http://www.w3.org", "")
    )
    assert "nan" not in html.lower().replace("nanojoule", "")
    assert [p.name for p in tmp_path.iterdir()] == ["map.html"]


def test_unknown_and_hostile_figures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    pytest.importorskip("jinja2")
    odd = {
        "blk.0.attn_q.weight": math.nan,
        "blk.0.<script>alert(1)</script>.weight": 0.0,
        "\x1b[31mred": 1e-3,
    }
    heat_map_page(damage_of(odd, "no such type", title="\x1b]0;x"), tmp_path / "m.html")
    html = (tmp_path / "m.html").read_text()
    assert "<script" not in html and "\x1b" not in html
    heat_map_page(damage_of({}, "INT4-G64", title="none"), tmp_path / "empty.html")


def test_the_terminal_map_has_every_figure() -> None:
    page = io.StringIO()
    render_map(found(), Console(file=page, width=100))
    lines = page.getvalue().splitlines()
    assert lines[0].split() == ["layer", *ROLES]
    for layer in range(4):
        cells = [float(x) for x in lines[1 + layer].split()]
        want = [1e3 * DAMAGE[f"blk.{layer}.{r}.weight"] for r in ROLES]
        assert cells == [layer, *(pytest.approx(w, rel=0.01) for w in want)]
    assert "\x1b" not in page.getvalue()
    coloured = io.StringIO()
    console = Console(file=coloured, width=100, force_terminal=True, color_system="truecolor")
    render_map(found(), console)
    worst = palette.light(palette.DAMAGE[-1])
    rgb = ";".join(str(int(worst[i : i + 2], 16)) for i in (1, 3, 5))
    assert f"48;2;{rgb}m" in coloured.getvalue()
    page = io.StringIO()
    render_map(damage_of({"a": 1.0}, "INT4-G64", title=""), Console(file=page))
    assert "no nats" in page.getvalue()
