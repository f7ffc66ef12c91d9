"""What pruning and shrinking took, as tables and maps."""

from __future__ import annotations

import io
from dataclasses import fields, replace
from typing import Any

import pytest
from rich.console import Console

from joulesmith.compress.prune.shrink import Shape
from joulesmith.compress.prune.structured import Decision, Shrunk
from joulesmith.compress.prune.walk import Pruned
from joulesmith.job.quantize import Made
from joulesmith.quality import Quality
from joulesmith.report.heat_map import removed_of, render_heat_map
from joulesmith.report.model_tables import render_made, render_removed


def made(**more: Any) -> Made:
    values = {f.name: {"text": "a text", "tokens": 100}.get(f.name, 0.5) for f in fields(Quality)}
    return Made(
        folder="out", type="", bytes=1000, bits_per_weight=9.5, quality=Quality(**values),
        damage={}, origin="the folder", format="sparse", parameters=(100, 100), **more,
    )  # fmt: skip


PRUNED = (
    Pruned("model.layers.0.mlp.up_proj", (8, 8), 0.25, 0.001, 0.02),
    Pruned("model.layers.0.mlp.[bold]x", (8, 8), 0.5, 0.003, 0.05),
    Pruned("model.layers.1.mlp.experts.down_proj.3", (8, 8), 0.75),
)


def shown(found: Made, *, explain: bool) -> str:
    file = io.StringIO()
    (render_removed if explain else render_made)(found, Console(file=file, width=120))
    return file.getvalue()


def test_pruned() -> None:
    told = shown(made(pruned=PRUNED), explain=True)
    lines = [s.split() for s in told.splitlines()]
    assert ["model.layers.0.mlp.up_proj", "25.0%", "0.00100", "2.00%"] in lines
    order = [told.index(p.name) for p in (PRUNED[1], PRUNED[0])]
    assert order == sorted(order), "most damage first"
    assert "per cent of the weights gone" in told and "[bold]x" in told
    cells = {t.tensor: t for t in removed_of(made(pruned=PRUNED), title="t").tensors}
    assert cells[PRUNED[0].name].bits_per_weight == 25 and cells[PRUNED[0].name].layer == 0
    assert cells[PRUNED[2].name].layer == 1


def test_what_a_format_does_with_zeros() -> None:
    assert "zeros are left out of the file" in shown(made(pruned=PRUNED), explain=False)
    other = replace(made(pruned=PRUNED), format="gguf")
    assert "gguf stores zeros like other weights" in shown(other, explain=False)
    assert "zeros" not in shown(made(), explain=False)
    smaller = replace(made(), parameters=(4_000_000, 3_000_000))
    assert "3.00 M parameters, 75.0% of 4.00 M" in shown(smaller, explain=False)


def test_the_page() -> None:
    pytest.importorskip("vl_convert")
    pytest.importorskip("jinja2")
    page = render_heat_map(removed_of(made(pruned=PRUNED), title="a <b>"))
    assert "<svg" in page and "a &lt;b&gt;" in page
    for p in PRUNED:
        assert p.name in page


def test_shrunk() -> None:
    before = Shape(3, 64, 96, 2, 2, 16, True)
    gone = (
        Decision(1, "layer", 0.125, "nats"),
        Decision(0, "kv 1", 0.5, "error"),
        *(Decision(2, f"neuron {i}", float(i), "error") for i in range(1, 4)),
    )
    shrunk = Shrunk(
        before, replace(before, layers=2, neurons=48, kv=1), (100, 60), (90, 50), gone, (), True,
        0.1, 0.3, (0, 2),
    )  # fmt: skip
    cells = {
        t.tensor: t.bits_per_weight for t in removed_of(made(shrunk=shrunk), title="t").tensors
    }
    assert cells["blk.1.mlp.weight"] == cells["blk.1.attention.weight"] == 100
    assert cells["blk.0.mlp.weight"] == cells["blk.2.attention.weight"] == 50
    rows = [s.split() for s in shown(made(shrunk=shrunk), explain=True).splitlines()]
    assert ["1", "layer", "0.125", "nats"] in rows
    assert ["2", "3", "neurons", "1", "to", "3", "error"] in rows
