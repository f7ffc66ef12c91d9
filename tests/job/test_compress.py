"""`joulesmith compress`, run as a user runs it."""

from __future__ import annotations

import json
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from runner import Run

from joulesmith.compress.prune import admm, walk
from joulesmith.compress.prune.keep import Kept
from joulesmith.compress.prune.prices import Prices
from joulesmith.compress.prune.structured import Shrink
from joulesmith.compress.recipe import read_recipe
from joulesmith.errors import JoulesmithError
from joulesmith.job.compress import compress, prune_step, shrink_parts, shrink_step


def matrices(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in module.named_parameters() if "_proj" in n}


def share(weights: dict[str, torch.Tensor]) -> float:
    flat = torch.cat([w.flatten() for w in weights.values()])
    return float((flat == 0).double().mean())


def test_half_the_weights(tiny: Path, tmp_path: Path, joulesmith: Run) -> None:
    from joulesmith.export.sparse_folder import load_sparse

    out, page = tmp_path / "out", tmp_path / "map.html"
    done = joulesmith("compress", tiny, "--prune", "0.5", "--out", out, "--explain", "--map", page)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["map.html", "out"], "no working files"
    weights = matrices(load_sparse(out).module)
    assert share(weights) == pytest.approx(0.5, abs=1e-3)
    told = " ".join(done.stdout.split())
    assert "zeros are left out of the file; no engine runs them faster" in told
    assert "50.0% of the weights of 14 layers are zero" in told
    assert "predicted damage" in done.stdout and "model.layers.1.mlp.up_proj" in done.stdout
    assert "<svg" in page.read_text() and "model.layers.1.mlp.up_proj" in page.read_text()

    words = ("quantize", tiny, "--recipe", out / "recipe.yaml", "--format", "sparse")
    again = joulesmith(*words, "--out", tmp_path / "again", "--json")
    assert again.returncode == 0, again.stderr
    files = [next((tmp_path / n).glob("*.safetensors")) for n in ("out", "again")]
    assert files[0].read_bytes() == files[1].read_bytes(), "the recipe makes the same bytes"
    found = json.loads(again.stdout)
    assert found["format"] == "sparse" and len(found["pruned"]) == 14
    assert f"kept {found['quality']['kept']:.4f}" in told
    assert found["bits_per_weight"] < 11


def test_two_of_four_on_integers(tiny: Path, tmp_path: Path, joulesmith: Run) -> None:
    from joulesmith.export.sparse_folder import load_sparse

    out = tmp_path / "out"
    words = ("compress", tiny, "--prune", "2:4", "--method", "sparsegpt", "--type", "INT8-ROW")
    done = joulesmith(*words, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["type"] == "INT8-ROW" and found["format"] == "sparse"
    assert found["effort"] == "nearest" and found["bits_per_weight"] < 6.5
    assert 0.5 < found["quality"]["kept"] < 1 and found["quality"]["kl"] < 1
    for w in matrices(load_sparse(out).module).values():
        assert bool(((w.reshape(-1, 4) != 0).sum(1) <= 2).all())


def test_a_smaller_dense_model(tiny: Path, tmp_path: Path, joulesmith: Run) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    done = joulesmith("compress", tiny, "--shrink", "0.8", "--out", out, "--explain", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    before, after = found["parameters"]
    assert 0.7 * before < after <= 0.8 * before and found["format"] == "transformers"
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == after
    ids = model.generate(torch.arange(1, 9)[None], max_new_tokens=8, do_sample=False)
    assert ids.shape == (1, 16)


def weights_of(out: Path) -> bytes:
    return next(out.glob("*.safetensors")).read_bytes()


def test_a_killed_run_goes_on(tiny: Path, tmp_path: Path, joulesmith: Run) -> None:
    words = ("compress", tiny, "--shrink", "0.8", "--prune", "0.5", "--out")
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert joulesmith(*words, whole).returncode == 0
    killed = joulesmith(*words, out, until="shrink:")
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    kept = tmp_path / "out.work" / "work" / "shrink-0"
    assert sorted(p.name for p in kept.iterdir()) == ["order.json", "shapes.json"]
    done = joulesmith(*words, out)
    assert done.returncode == 0, done.stderr
    assert weights_of(out) == weights_of(whole), "the same bytes as a run that was not killed"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"], "no working files"


def test_interrupted_while_pruning(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    expected = compress(str(tiny), whole, prune="0.5")
    solved, solve, keep = [], admm.prune, Kept.keep_block

    def stops(*args: Any) -> None:
        keep(*args)
        raise KeyboardInterrupt

    def counted(*args: Any, **settings: Any) -> torch.Tensor:
        solved.append(1)
        return solve(*args, **settings)

    monkeypatch.setattr(admm, "prune", counted)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Kept, "keep_block", stops)
        compress(str(tiny), out, prune="0.5")
    kept = tmp_path / "out.work" / "work" / "prune-0"
    assert sorted(p.name for p in kept.iterdir()) == ["block-0.safetensors", "survey.safetensors"]
    monkeypatch.setattr(walk, "survey", None)
    found = compress(str(tiny), out, prune="0.5")
    assert len(solved) == 14, "each layer once"
    assert found.pruned == expected.pruned and found.quality == expected.quality
    assert weights_of(out) == weights_of(whole)


def test_shrunk_and_pruned_in_a_gguf(tiny: Path, tmp_path: Path, joulesmith: Run) -> None:
    out = tmp_path / "small.gguf"
    words = ("compress", tiny, "--shrink", "neurons=64", "--prune", "0.3", "--type", "Q8_0")
    done = joulesmith(*words, "--out", out)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.gguf", "small.recipe.yaml"]
    told = " ".join(done.stdout.split())
    assert "in llama.cpp" in told and "in torch, inputs as they are: kept" in told
    assert "gguf stores zeros like other weights" in told
    from joulesmith import models

    weights = matrices(models.load(out).module)
    assert weights["model.layers.0.mlp.up_proj.weight"].shape == (64, 64)
    assert share(weights) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--prune", "1.5"), "--prune 1.5: sparsity: Input should be less than 1"),
        (("--prune", "2:3"), "which groups of 3"),
    ],
)
def test_bad_input_is_one_line(
    tiny: Path, tmp_path: Path, joulesmith: Run, words: tuple[str, ...], match: str
) -> None:
    done = joulesmith("compress", tiny, "--out", tmp_path / "out", *words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert match in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [], "no working files either"


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, "--prune, --shrink or both"),
        ({"prune": "0.5", "settings": {"method": "wander"}}, "--prune 0.5: method:"),
        ({"prune": "0.5", "settings": {"pattern": "block:5x5"}}, "tiles of 5 x 5"),
        ({"prune": "0.5", "settings": {"method": "movement"}}, "give before"),
        ({"prune": "900M"}, "ask for fewer"),
        ({"shrink": "900M"}, "more than the"),
        ({"shrink": "layers=9"}, "layer"),
        ({"shrink": "foo=3"}, "'foo' is no part of a model"),
        ({"shrink": "0.8", "settings": {"method": "wanda"}}, "--method is about --prune"),
        ({"prune": "0.5", "form": "gguf", "kind": "Q4_K"}, "a GGUF is a file"),
        ({"prune": "0.5", "kind": "IQ4_NL", "out": "x.gguf"}, "has no exact zero"),
        ({"prune": "0.5", "kind": "W8A8"}, "fills the zeros"),
        ({"prune": "0.5", "kind": "Q8_0"}, "which sparse cannot hold"),
        ({"shrink": "0.8", "kind": "nonsense"}, "unknown tensor type"),
        ({"prune": "0.5", "form": "compressed-tensors"}, "nothing is quantized"),
        ({"prune": "0.5", "form": "zip"}, "--format zip: give one of"),
    ],
)
def test_bad_input_leaves_nothing(
    tiny: Path, tmp_path: Path, given: dict[str, Any], match: str
) -> None:
    given = dict(given)
    out = tmp_path / given.pop("out", "out")
    with pytest.raises(JoulesmithError, match=match) as e:
        compress(str(tiny), out, **given)
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_what_the_options_say() -> None:
    assert prune_step("0.5", {}).sparsity == 0.5
    assert prune_step("2:4", {}).pattern == "2:4"
    assert prune_step("1.5M", {}).parameters == 1_500_000
    assert prune_step("90m", {"method": "wanda"}).method == "wanda"
    assert shrink_step(shrink_parts("0.8")).parameters == 0.8
    found = shrink_step(shrink_parts("layers=24, neurons=0.8,width=512"), 3)
    assert (found.layers, found.neurons, found.width, found.seed) == (24, 0.8, 512, 3)
    prices = Prices(layer=1, neuron=1, query=1, kv=1, rest=1)
    found = shrink_step(shrink_parts("joules=0.8"), prices=(prices, 50.0))
    assert (found.prices, found.cost) == (prices, 40.0)
    for bad in (
        "", "x", "0.8,0.7", "layers", "layers=x", "layers=0", "neurons=-1", "=3", "1e3",
        "joules=1.0", "joules=2", "joules=0.0", "joules=1J", "joules=0.8,0.7",
        "joules=0.8,width=0.5",
    ):  # fmt: skip
        with pytest.raises(JoulesmithError) as e:
            shrink_step(shrink_parts(bad), prices=(prices, 1.0))
        assert "\n" not in str(e.value)
    for bad in ("", "50%", ".5", "-0.5", "0", "0.0", "1.0", "nan", "4:2", "0.5:", "١"):
        with pytest.raises(JoulesmithError) as e:
            prune_step(bad, {})
        assert "\n" not in str(e.value)
    with pytest.raises(JoulesmithError, match="leave --pattern out"):
        prune_step("2:4", {"pattern": "row"})


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="no llama.cpp")
def test_a_joule_budget_is_met(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = compress(str(tiny), tmp_path / "out.gguf", shrink="joules=0.8", kind="Q8_0")
    assert found.shrunk is not None and found.shrunk.cost is not None
    before, after = found.shrunk.cost
    assert after <= 0.8 * before
    step = read_recipe(Path(found.recipe)).steps[0]
    assert isinstance(step, Shrink) and step.prices is not None
    assert step.cost == pytest.approx(0.8 * before)
    assert "predicted cost of a decoded token: 0." in " ".join(found.notes)
    assert list((tmp_path / "cache" / "joulesmith").glob("matmul-*.json"))
