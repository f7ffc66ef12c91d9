"""The comparison of pruners: names of settings, the floor's zeros, what is counted, the table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.pruners import settings, table
from benchmarks.pruners.peers.magnitude import smallest
from benchmarks.pruners.plan import PLAN, count


def test_names_of_settings_are_read_back() -> None:
    for name in settings.NAMES:
        assert settings.by_name(name).name == name
    assert settings.by_name("1:4") == settings.Setting(0.75, 4)
    assert sorted(["4:8", "70%", "2:4", "50%"], key=settings.key) == ["50%", "70%", "2:4", "4:8"]
    for wrong in ("50", "4:4", "0:0"):
        with pytest.raises(ValueError):
            settings.by_name(wrong)


def test_the_smallest_go() -> None:
    w = torch.randn(5, 22, generator=torch.Generator().manual_seed(0)).abs()
    mask = smallest(w, settings.by_name("60%"))
    assert int(mask.sum()) == 66 and w[mask].max() < w[~mask].min()
    mask = smallest(w, settings.by_name("2:4"))
    assert bool((mask[:, :20].reshape(5, 5, 4).sum(-1) == 2).all())
    assert not mask[:, 20:].any()
    for group, gone in zip(w[:, :20].reshape(-1, 4), mask[:, :20].reshape(-1, 4), strict=True):
        assert group[gone].max() < group[~gone].min()


def test_what_is_counted() -> None:
    ones = torch.ones(2, 8)
    half = torch.tensor([[1.0, 1, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1]])
    before = {"model.layers.0.a.weight": ones, "model.layers.1.a.weight": ones, "head": ones}
    after = before | {"model.layers.0.a.weight": half}
    found = count(after, before, "50%")
    assert (found["sparsity"], found["least"], found["most"]) == (0.25, 0, 0.5)
    assert found["short"] == ["model.layers.1.a.weight"]
    assert len(count(after, before, "2:4")["short"]) == 2  # the second row's last group is full
    with pytest.raises(ValueError, match="head was changed"):
        count(after | {"head": half}, before, "50%")


def test_every_planned_peer_is_asked_something() -> None:
    for p in PLAN:
        assert any(p.takes(n) for n in settings.NAMES)
    owl = next(p for p in PLAN if p.variant == "sparsegpt-owl")
    assert owl.takes("50%") and not owl.takes("2:4")


def test_fewer_zeros_than_asked_for_do_not_win(tmp_path: Path) -> None:
    base = {
        "subject": "s", "setting": "50%", "windows": 8, "layers": None, "threads": 1, "fresh": True,
        "note": "", "origin": "a model", "evaluated_on": "e", "calibrated_on": "c",
        "reference_perplexity": 2.0, "perplexity": 2.1, "kept": 0.95, "top1": 0.9, "seconds": 1.0,
        "cpu_seconds": 1.0, "rss_peak": 2e6, "rss_imported": 1e6, "weight_bytes": 4e5,
        "words": "w", "versions": "v", "forward_check": None, "variant": "x", "seed": 0,
        "sparsity": 0.5, "least": 0.4, "most": 0.6, "short": [],
    }  # fmt: skip
    lines = [
        base | {"peer": "a", "kl": 0.2},
        base | {"peer": "b", "kl": 0.3},
        base | {"peer": "c", "kl": 0.1, "sparsity": 0.3},
    ]
    path = tmp_path / "runs-pruners.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    rows = [r for r in table.render(path, "cmd").splitlines() if r.startswith("| 50%")]
    assert [r.split("|")[2].strip() for r in rows] == ["a:x", "b:x", "c:x †"]
    assert "50.00% (40%–60%) | **0.2** |" in rows[0]
    assert table.fulfilled(base | {"setting": "2:4", "short": []})
    assert not table.fulfilled(base | {"setting": "2:4", "short": ["layer"]})


def test_magnitude_prunes_a_model_in_place() -> None:
    from benchmarks.pruners.peers import magnitude

    inside = torch.nn.Linear(16, 16)
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([torch.nn.Sequential(inside)])
    model.lm_head = torch.nn.Linear(16, 4)
    for variant in ("layer", "global"):
        magnitude.prune(model, None, settings.by_name("50%"), variant, 0)
        assert int((inside.weight == 0).sum()) == 128
    assert not (model.lm_head.weight == 0).any()
    assert magnitude.weights(SimpleNamespace(state_dict=dict), settings.by_name("50%"), "layer")
