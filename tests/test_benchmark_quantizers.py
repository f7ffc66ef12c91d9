"""The comparison of quantizers: filled-up MLPs, counted bits, nearest rounding, the table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.quantizers import settings, table
from benchmarks.quantizers.peers.nearest import rounded
from benchmarks.quantizers.peers.ours import type_name
from benchmarks.quantizers.runs import read_lines
from benchmarks.quantizers.subjects import pad_mlp

from joulesmith import models
from joulesmith.compress.quantize.grids import grid
from tiny import write_tiny


def test_a_filled_up_mlp_says_the_same(tmp_path: Path) -> None:
    model = models.load(write_tiny(tmp_path / "model", steps=0))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model.module(ids).logits
        pad_mlp(model.module, 64)
        assert torch.allclose(model.module(ids).logits, before, atol=1e-5)
    assert model.module.config.intermediate_size == 128
    models.save(model, tmp_path / "saved")
    again = models.load(tmp_path / "saved")
    assert again.ref("blk.0.ffn_down.weight").shape == (64, 128)


@given(st.sampled_from([2, 3, 4, 8]), st.sampled_from([32, 64, 128]), st.booleans())
def test_bits_are_those_of_the_grid(bits: int, group: int, symmetric: bool) -> None:
    s = settings.Setting(bits, group, symmetric)
    assert settings.by_name(s.name) == s
    assert s.stored_bits() == pytest.approx(grid(type_name(s)).bits_per_weight)


def test_usual_settings_divide_the_rows() -> None:
    for columns in ({576, 1536}, {256, 768}, {64, 192}):
        found = [settings.by_name(n) for n in settings.usual(columns)]
        assert {s.bits for s in found} == {8, 4, 3, 2}
        assert all(c % s.group == 0 for s in found for c in columns)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 3, 4, 8]),
    st.booleans(),
    st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_nearest_is_off_by_half_a_step_at_most(
    seed: int, bits: int, symmetric: bool, size: float
) -> None:
    s = settings.Setting(bits, 32, symmetric)
    w = size * torch.randn(3, 96, generator=torch.Generator().manual_seed(seed))
    r = rounded(w, s)
    groups, back = w.reshape(3, -1, 32), r.reshape(3, -1, 32)
    spread = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
    reach = 2 * groups.abs().amax(-1) if symmetric else spread
    step = reach / (2**bits - 1)
    # Symmetric codes end half a step below the largest weight, hence a whole step there.
    allowed = step * (1.01 if symmetric else 0.51) + 1e-6 * size
    # A rounded zero moves an asymmetric grid by up to half a step, which clips one end.
    allowed = allowed if symmetric else allowed + 0.51 * step
    assert bool(((groups - back).abs() <= allowed[..., None] + 2e-7).all())
    for row in back.reshape(-1, 32):
        assert len(row.unique()) <= 2**bits


def test_the_table_tells_best_spread_and_failures(tmp_path: Path) -> None:
    base = {
        "subject": "s", "setting": "W4-g64", "windows": 8, "layers": None, "threads": 1, "fresh": True,
        "note": "", "origin": "a model", "evaluated_on": "e", "calibrated_on": "c",
        "reference_perplexity": 2.0, "perplexity": 2.1, "top1": 0.9, "seconds": 1.0,
        "cpu_seconds": 1.0, "rss_peak": 2e6, "rss_imported": 1e6, "weight_bytes": 4e5, "bits_per_weight": 4.25,
        "words": "w", "versions": "v", "forward_check": None,
    }  # fmt: skip
    lines = [
        base | {"peer": p, "variant": "x", "seed": i, "kl": kl}
        for p, kls in (("a", (0.1, 0.12, 0.11)), ("b", (0.2, 0.3, 0.125)))
        for i, kl in enumerate(kls)
    ]
    failed = {
        k: base[k] for k in ("subject", "setting", "windows", "layers", "threads", "fresh", "note")
    }
    lines.append(failed | {"peer": "c", "variant": "x", "seed": 0, "error": "Oops: no | good"})
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"half')
    assert len(read_lines(path)) == 7
    text = table.render(path, "cmd")
    assert "a:x | 4.25 | **0.11 (0.1–0.12)*** |" in text
    assert "b:x | 4.25 | 0.2 (0.125–0.3) |" in text
    assert "| 1 | 2 (1) |" in text  # 0.6 MB above imports and weights
    assert "| s | c:x | W4-g64 | Oops: no / good |" in text


def test_192_stands_for_128_where_that_does_not_divide() -> None:
    assert "W3-g128" in settings.usual({256, 768})
    assert {"W4-g192", "W4-g64", "W3-g192-zp"} <= set(settings.usual({576, 1536}))
    assert settings.usual({64, 192})[:2] == ["W8-g64", "W8-g64-zp"]
