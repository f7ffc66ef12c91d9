"""The surgery and the step: what comes out is a plain smaller model, everywhere."""

from __future__ import annotations

import math
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from joulesmith import models
from joulesmith.compress.prune.prices import Prices
from joulesmith.compress.prune.shrink import count, read_back, read_per_token, shape_of
from joulesmith.compress.prune.structured import Shrink, Shrunk
from joulesmith.compress.recipe import Recipe, read_recipe
from joulesmith.errors import JoulesmithError
from tiny import write_tiny

WINDOWS = np.random.default_rng(0).integers(0, 400, (10, 32)).astype(np.int32)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("shrink") / "tiny", steps=12)


@pytest.fixture(scope="module")
def families(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models of each family: 4 layers, biases and norms of heads where they have them."""
    import transformers

    found = {}
    for name in FAMILIES:
        kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[name]
        more = {"attention_bias": True} if name == "llama" else {}
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=400, hidden_size=96, intermediate_size=96, num_hidden_layers=4,
            num_attention_heads=6, num_key_value_heads=2, head_dim=16,
            max_position_embeddings=256, initializer_range=0.1,
            tie_word_embeddings=name != "mistral", bos_token_id=0, eos_token_id=0, **more,
        )  # fmt: skip
        torch.manual_seed(FAMILIES.index(name))
        module = getattr(transformers, f"{kind}ForCausalLM")(config)
        with torch.no_grad():
            for n, p in module.named_parameters():
                if p.ndim == 1:  # biases are made 0, norms 1: not what a trained model has
                    p.add_(0.1 * torch.randn(p.shape))
                assert n
        folder = tmp_path_factory.mktemp("families") / name
        module.save_pretrained(folder)
        for file in tiny.glob("tokenizer*"):
            shutil.copyfile(file, folder / file.name)
        found[name] = folder
    return found


def logits(module: Any, windows: np.ndarray = WINDOWS) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = module(torch.from_numpy(windows).long()).logits.double()
    return out


def kl(a: torch.Tensor, b: torch.Tensor) -> float:
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def same_everywhere(model: models.Model, folder: Path) -> None:
    """Saved, loaded by transformers alone, generating with a cache as without; counted."""
    from transformers import AutoModelForCausalLM

    models.save(model, folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.allclose(logits(plain), logits(model.module), atol=1e-4)
    held = sum(p.numel() for p in plain.parameters())
    assert held == model.parameters == count(model, shape_of(model))
    assert held == sum(math.prod(r.shape) for r in model.tensors.values())
    assert [b.self_attn.layer_idx for b in plain.model.layers] == list(
        range(len(plain.model.layers))
    )
    prompt = torch.from_numpy(WINDOWS[:1, :8]).long()
    with torch.no_grad():
        made = plain.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
        for at in range(8, 14):
            assert int(plain(made[:, :at]).logits[0, -1].argmax()) == int(made[0, at])
    again = models.load(folder)
    assert torch.allclose(logits(again.module), logits(model.module), atol=1e-4)


def in_the_engine(model: models.Model, path: Path) -> None:
    """As GGUF in llama.cpp: logits close to torch's."""
    if find_spec("xllamacpp") is None:
        pytest.skip("the engine wheel is not installed")
    from joulesmith.engines import get_engine
    from joulesmith.export.gguf import write_float_gguf

    write_float_gguf(model, path, "F32")
    with get_engine("llama.cpp").load(path, context=64, threads=1) as session:
        found = torch.from_numpy(session.logits(WINDOWS[0])).double()
    wanted = logits(model.module, WINDOWS[:1])[0]
    assert float((found - wanted).abs().max()) < 0.02 * float(wanted.std())


MIXED = {"neurons": 2 / 3, "queries": 2, "drop": (1,), "multiple": 32}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_parts_at_once(families: dict[str, Path], family: str, tmp_path: Path) -> None:
    model = models.load(families[family])
    before = model.parameters
    found = Shrink(**MIXED).shrink(model, WINDOWS)
    config = model.module.config
    assert (config.num_hidden_layers, config.intermediate_size) == (3, 64)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert config.head_dim == 16 and config.hidden_size == 96
    assert found.parameters == (before, model.parameters) and model.parameters < 0.8 * before
    assert found.layers == (0, 2, 3)
    same_everywhere(model, tmp_path / "out")
    if family == "qwen2":  # its heads must be as wide as the stream, there
        assert found.gguf is not None and any("no GGUF" in line for line in found.notes())
        model = models.load(families[family])
        found = Shrink(neurons=64, drop=(3,)).shrink(model, WINDOWS)
    assert found.gguf is None
    in_the_engine(model, tmp_path / "out.gguf")
    whole = sum(f.stat().st_size for f in families[family].glob("*.safetensors"))
    assert sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")) < 0.85 * whole


@pytest.mark.parametrize("family", ["qwen3"])
def test_groups_and_width(families: dict[str, Path], family: str, tmp_path: Path) -> None:
    model = models.load(families[family])
    Shrink(kv_heads=1, width=48, multiple=16).shrink(model, WINDOWS)
    config = model.module.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (3, 1)
    assert (config.hidden_size, config.head_dim) == (48, 16)
    assert model.tied
    same_everywhere(model, tmp_path / "out")
    in_the_engine(model, tmp_path / "out.gguf")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_cut_is_read_back_to_the_bit(
    families: dict[str, Path], family: str, tmp_path: Path
) -> None:
    """With the keys and the tokenizer of the model that it was cut from."""
    model = models.load(families[family])
    model.metadata["general.license"] = "apache-2.0"  # what a folder does not hold
    Shrink(layers=3, neurons=64, queries=2).apply(model, WINDOWS)
    models.write_weights(model.module, tmp_path)
    whole = models.load(families[family])
    whole.metadata["general.license"] = "apache-2.0"
    for again in (whole, model):
        wanted = {n: p.detach().clone() for n, p in model.module.named_parameters()}
        told = model.metadata, model.tensors, model.parameters
        read_back(again, tmp_path)
        found = dict(again.module.named_parameters())
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[n], w) for n, w in wanted.items())
        for mine, other in zip(
            (again.metadata, again.tensors, again.parameters), told, strict=True
        ):
            assert str(mine) == str(other)
        assert torch.equal(logits(again.module), logits(model.module))


def test_one_rotation_of_full_width_changes_nothing(families: dict[str, Path]) -> None:
    for family in ("llama", "mistral"):  # with biases and a tied head; without
        model = models.load(families[family])
        before, tied, n = logits(model.module), model.tied, model.parameters
        Shrink(width=96, rotate=True, repair=False).shrink(model, WINDOWS)
        assert torch.allclose(logits(model.module), before, atol=1e-3)
        assert model.parameters - n == (
            400 * 96 if tied else 0
        )  # the head parts from the embedding
        assert not model.tied


def test_a_narrower_rotated_model(tiny: Path, tmp_path: Path) -> None:
    repaired, plain = models.load(tiny), models.load(tiny)
    before = logits(repaired.module)
    step = {"width": 0.75, "rotate": True, "multiple": 16}
    found = Shrink(**step).shrink(repaired, WINDOWS)
    Shrink(**step, repair=False).shrink(plain, WINDOWS)
    assert repaired.module.config.hidden_size == 48
    assert kl(before, logits(repaired.module)) < kl(before, logits(plain.module))
    assert found.read[1] / found.read[0] < found.parameters[1] / found.parameters[0]
    same_everywhere(repaired, tmp_path / "out")


def test_what_does_nothing_is_removed_exactly(tiny: Path) -> None:
    model = models.load(tiny)
    layers = model.module.model.layers
    with torch.no_grad():
        for layer, at in zip(layers, (slice(0, 32), slice(50, 82)), strict=True):
            layer.mlp.down_proj.weight[:, at] = 0
            layer.self_attn.o_proj.weight[:, 16:32] = 0
            layer.self_attn.o_proj.weight[:, 32:48] = 0
    before = logits(model.module)
    found = Shrink(neurons=64, queries=1, repair=False).shrink(model, WINDOWS)
    assert torch.allclose(logits(model.module), before, atol=1e-4)
    gone = [int(d.part.split()[1]) for d in found.decisions if d.layer == 1 and "neuron" in d.part]
    assert sorted(gone) == list(range(50, 82))
    assert {d.part for d in found.decisions if "head" in d.part} == {"head 1", "head 2"}
    assert all(abs(d.score) < 1e-6 for d in found.decisions)


def test_a_layer_that_does_nothing_goes_first(families: dict[str, Path]) -> None:
    for by in ("damage", "block-influence"):
        model = models.load(families["llama"])
        layer = model.module.model.layers[2]
        with torch.no_grad():
            for part in (layer.self_attn.o_proj.weight, layer.self_attn.o_proj.bias):
                part.zero_()
            layer.mlp.down_proj.weight.zero_()
        before = logits(model.module)
        found = Shrink(layers=3, by=by, repair=False).shrink(model, WINDOWS)
        assert found.layers == (0, 1, 3)
        assert torch.allclose(logits(model.module), before, atol=1e-4)


def test_channels_that_carry_nothing_are_left_out(tiny: Path) -> None:
    model = models.load(tiny)
    kept, tied = torch.arange(32, 64), model.tied
    with torch.no_grad():
        model.module.model.embed_tokens.weight[:, :32] = 0
        for layer in model.module.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight[:32] = 0
    before = logits(model.module)
    Shrink(width=32, repair=False).shrink(model, WINDOWS)
    assert model.module.model.embed_tokens.weight.shape[1] == len(kept) and model.tied == tied
    assert torch.allclose(logits(model.module), before, atol=1e-4)


def test_the_mix_is_chosen_and_beats_plain_rules(tiny: Path, tmp_path: Path) -> None:
    found: dict[str, tuple[float, Shrunk]] = {}
    for by, repair in (("damage", True), ("magnitude", False), ("taylor", False)):
        model = models.load(tiny)
        before, n = logits(model.module), model.parameters
        shrunk = Shrink(
            parameters=0.85, by=by, repair=repair, multiple=8, trials=6
        ).shrink(model, WINDOWS)  # fmt: skip
        assert model.parameters <= 0.85 * n
        found[by] = kl(before, logits(model.module)), shrunk
        if by == "damage":
            same_everywhere(model, tmp_path / "out")
    assert found["damage"][0] < min(found["magnitude"][0], found["taylor"][0])
    shrunk = found["damage"][1]
    assert shrunk.repaired and shrunk.damage is not None and shrunk.unrepaired is not None
    assert shrunk.damage < shrunk.unrepaired
    assert 1 <= len(shrunk.trials) <= 6 and shrunk.trials[0].shape == shrunk.after
    assert read_per_token(model, shrunk.before) == n  # a tied head is read whole
    assert any("became" in line for line in shrunk.notes())
    assert len([d for d in shrunk.decisions if d.part == "layer"]) == 2 - shrunk.after.layers


def test_costs_in_nats(tiny: Path) -> None:
    model = models.load(tiny)
    before = logits(model.module)
    found = Shrink(neurons=64, fisher=True, repair=False).shrink(model, WINDOWS)
    assert {d.unit for d in found.decisions} == {"nats a token"}
    predicted = sum(d.score for d in found.decisions)
    true = kl(before, logits(model.module))
    assert predicted > 0 and true < 1  # the rest was not made to compensate, as predicted


def test_a_count_and_a_recipe_give_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    whole = models.load(tiny).parameters
    step = Shrink(parameters=int(0.9 * whole), multiple=8, trials=2)
    Recipe((step,)).save(tmp_path / "r.yaml")
    states = []
    for recipe in (Recipe((step,)), read_recipe(tmp_path / "r.yaml")):
        model = models.load(tiny)
        (record,) = recipe.apply(model, WINDOWS)
        assert record.step == "shrink" and record.notes
        states.append(model.module.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"parameters": 0},
        {"parameters": 1.5},
        {"neurons": -1},
        {"heads": 1.2},
        {"heads": 0.5, "queries": 1},
        {"layers": 1, "drop": (0,)},
        {"drop": (0, 0)},
        {"rotate": True},
        {"by": "luck", "layers": 1},
        {"layer": 1},
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Shrink(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"parameters": 10**9}, "more than"),
        ({"parameters": 100}, "cannot be reached"),
        ({"parameters": 0.1, "by": "block-influence"}, "cannot be reached"),
        ({"parameters": 0.1, "by": "magnitude"}, "cannot be reached"),
        ({"parameters": 0.5, "layers": 2}, "more than the"),
        ({"neurons": 0.1}, "less than 32"),
        ({"neurons": 50}, "multiple of 32"),
        ({"neurons": 128}, "multiple of 32"),
        ({"width": 40}, "multiple of 32"),
        ({"heads": 0.6}, "cannot be kept"),
        ({"kv_heads": 3}, "cannot be kept"),
        ({"width": 30, "multiple": 10}, "transformers refuses"),
        ({"layers": 3}, "cannot be dropped"),
        ({"drop": (0, 1)}, "one must be left"),
        ({"drop": (7,)}, "no layer 7"),
    ],
)
def test_errors_leave_the_model_as_it_was(tiny: Path, settings: dict[str, Any], words: str) -> None:
    model = models.load(tiny)
    before, module = logits(model.module), model.module
    with pytest.raises(JoulesmithError, match=words) as e:
        Shrink(**settings).apply(model, WINDOWS)
    assert "\n" not in str(e.value)
    assert model.module is module and torch.equal(logits(model.module), before)


def test_damaged_weights_and_too_little_text(tiny: Path) -> None:
    model = models.load(tiny)
    with pytest.raises(JoulesmithError, match="2 calibration windows"):
        Shrink(layers=1).apply(model, WINDOWS[:1])
    with torch.no_grad():
        model.module.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(
        JoulesmithError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"
    ):
        Shrink(layers=1).apply(model, WINDOWS)
    with torch.no_grad():
        model.module.model.layers[1].mlp.up_proj.weight[0, 0] = 1e30
    shapes = [tuple(p.shape) for p in model.module.parameters()]
    with pytest.raises(JoulesmithError, match=r"finite|NaN"):
        Shrink(neurons=64).apply(model, WINDOWS)
    assert [tuple(p.shape) for p in model.module.parameters()] == shapes
    half = models.load(tiny, dtype="bfloat16")
    with pytest.raises(JoulesmithError, match="float32"):
        Shrink(layers=1).apply(half, WINDOWS)


def test_a_budget_of_joules(tiny: Path) -> None:
    model = models.load(tiny)
    before = shape_of(model)
    for kv_costs in (0.0, 1000.0):
        prices = Prices(layer=5, neuron=1, query=1, kv=kv_costs, rest=100)
        budget = 0.75 * prices.of(before)
        step = Shrink(cost=budget, prices=prices, multiple=8, trials=6)
        found = step.shrink(models.load(tiny), WINDOWS)
        assert found.cost == (prices.of(before), prices.of(found.after))
        assert prices.of(found.after) <= budget
    with pytest.raises(JoulesmithError, match="more than the"):
        Shrink(cost=1.0, prices=prices, layers=1).shrink(models.load(tiny), WINDOWS)
    with pytest.raises(JoulesmithError, match="cannot be reached"):
        Shrink(cost=1.0, prices=prices, multiple=8).shrink(models.load(tiny), WINDOWS)
