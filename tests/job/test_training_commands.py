"""`joulesmith train`, `distill` and `recover`, run as a user runs them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runner import Run

from joulesmith import models
from joulesmith.energy.carbon import emission
from joulesmith.errors import JoulesmithError
from joulesmith.job.student import read_config, shape_of, shaped
from joulesmith.job.training import one_of_each, recovered, thinned
from joulesmith.quality import Quality
from joulesmith.text import english

RECOVER = ("recover", "{m}", "--teacher", "{m}", "--text", "{t}", "--steps", "1")
SHORT = ("--length", "32", "--batch", "4", "--precision", "float32")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(english().text[:30_000])
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in models.load(folder).module.named_parameters()}


def test_from_nothing(tiny: Path, text: Path, tmp_path: Path, joulesmith: Run) -> None:
    out = tmp_path / "out"
    words = ("train", tiny, "--shape", "layers=1,width=32,heads=2", "--text", text, *SHORT)
    done = joulesmith(*words, "--steps", "40", "--rate", "5e-3", "--out", out)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "no working files"
    found = json.loads((out / "training.json").read_text())
    assert found["kind"] == "train" and found["teacher"] is None and found["before"] is None
    assert found["after"]["perplexity"] < found["after"]["reference_perplexity"] / 2
    assert found["steps"] == 40 and found["tokens"] == 40 * 4 * 31
    assert found["joules"] > 0 and found["pedigree"] in ("modelled", "measured")
    assert len(found["curve"]) == 11 and found["curve"][-1][1] < found["curve"][0][1]
    made = models.load(out)
    assert made.module.config.num_hidden_layers == 1 and made.module.config.hidden_size == 32
    assert made.tokenizer.encode("quantize") == models.load(tiny).tokenizer.encode("quantize")
    page = (out / "training.html").read_text()
    assert page.count("<svg") == 4 and "joules spent on training" in page
    assert "<script" not in page
    told = joulesmith("report", out)
    assert told.returncode == 0 and "per parameter" in told.stdout
    again = joulesmith(*words, "--steps", "40", "--out", out)
    assert again.returncode == 2 and "exists" in again.stderr


def test_a_run_that_was_killed_goes_on(
    tiny: Path, text: Path, tmp_path: Path, joulesmith: Run
) -> None:
    words = ("train", tiny, "--text", text, *SHORT, "--steps", "60", "--every", "10", "--rate")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = joulesmith(*words, "1e-3", "--out", whole)
    assert done.returncode == 0, done.stderr
    killed = joulesmith(*words, "1e-3", "--out", parts, until="step 30:")
    assert killed.returncode == -9 and not parts.exists()
    other = joulesmith(*words, "2e-3", "--out", parts)
    assert other.returncode == 2 and "other arguments" in other.stderr
    done = joulesmith(*words, "1e-3", "--out", parts)
    assert done.returncode == 0, done.stderr
    a, b = (json.loads((p / "training.json").read_text()) for p in (whole, parts))
    assert a["losses"] == b["losses"] and a["after"] == b["after"]
    files = [(p / "model.safetensors").read_bytes() for p in (whole, parts)]
    assert files[0] == files[1]


@pytest.mark.parametrize("cache", ["0", "8"])
def test_distilled(tiny: Path, text: Path, tmp_path: Path, joulesmith: Run, cache: str) -> None:
    out = tmp_path / "out"
    done = joulesmith(
        "distill", tiny, "--shape", "layers=1", "--text", text, *SHORT, "--epochs", "1",
        "--cache", cache, "--rate", "3e-3", "--out", out, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["before"]["kl"] > 2 * found["after"]["kl"]
    assert found["recovered"] > 0.3 and found["parameters"] < found["teacher_parameters"]
    assert found["settings"]["cache"] == int(cache)
    parts = {"text", "judging"} | ({"teacher's predictions"} if int(cache) else set())
    assert set(found["beside"]) == parts and all(j > 0 for j in found["beside"].values())
    whole = found["joules"] + sum(found["beside"].values())
    assert found["gco2e"] == pytest.approx(emission(whole, "WORLD"))


def test_a_student_is_cut_out_of_its_teacher_once(
    tiny: Path, text: Path, tmp_path: Path, joulesmith: Run
) -> None:
    """What goes on after a kill reads it, and so would another number of ranks."""
    out = tmp_path / "out"
    words = ("distill", tiny, "--shrink", "layers=1", "--text", text, *SHORT, "--steps", "60")
    words = (*words, "--every", "10", "--out", out)
    killed = joulesmith(*words, until="step 10:")
    assert killed.returncode == -9
    done = joulesmith(*words)
    assert done.returncode == 0, done.stderr
    assert "shrink:" in killed.stderr and "shrink:" not in done.stderr
    found = json.loads((out / "training.json").read_text())
    assert found["parameters"] < found["teacher_parameters"] and found["model"] == "tiny"
    assert any("layers" in n for n in found["notes"])


def test_the_teacher_writes_text(tiny: Path, text: Path, tmp_path: Path, joulesmith: Run) -> None:
    words = (
        "recover",
        tiny,
        "--teacher",
        tiny,
        *SHORT,
        "--steps",
        "2",
        "--samples",
        "12",
        "--json",
    )
    done = joulesmith(*words, "--text", text, "--windows", "30", "--out", tmp_path / "both")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["windows"] == 42 and "12 windows of" in found["text"]
    done = joulesmith(*words, "--out", tmp_path / "alone")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["windows"] == 12 and "own samples" in found["text"]
    assert "pydoc_data" in found["after"]["text"]


def test_a_budget_of_joules(tiny: Path, text: Path, tmp_path: Path, joulesmith: Run) -> None:
    out = tmp_path / "out"
    words = ("train", tiny, "--text", text, *SHORT)
    done = joulesmith(*words, "--budget", "3J", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["settings"]["train"]["budget_joules"] == 3
    assert found["steps"] > 1
    step = found["joules"] / found["steps"]
    # passed by no more than a window of about a second
    assert found["joules"] < 3 + max(step, 1.2 * found["joules"] / found["seconds"])
    ended = found["stopped"] == "the budget of 3 J is spent"
    assert ended or found["steps"] == found["settings"]["train"]["steps"]
    little = joulesmith(*words, "--budget", "1mJ", "--out", tmp_path / "little")
    assert little.returncode == 2 and "before the first step" in little.stderr
    assert not (tmp_path / "little.work" / "work" / "steps.npy").exists()


def test_recovered_on_a_grid(tiny: Path, text: Path, tmp_path: Path, joulesmith: Run) -> None:
    out = tmp_path / "out.gguf"
    done = joulesmith(
        "recover", tiny, "--teacher", tiny, "--mode", "quantized", "--type", "Q4_0", "--text", text,
        *SHORT, "--steps", "30", "--rate", "1e-4", "--out", out, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["format"] == "gguf" and found["engine"].startswith("llama.cpp")
    assert found["engine_quality"]["kept"] == pytest.approx(found["after"]["kept"], abs=0.02)
    assert 0.9 < found["after"]["kept"] < 1.1
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"out.gguf", "out.training.json", "out.training.html"}
    for name in ("out.training.json", "out.gguf"):
        assert joulesmith("report", tmp_path / name).returncode == 0


def test_zeros_stay(tiny: Path, text: Path, tmp_path: Path, joulesmith: Run) -> None:
    pruned = tmp_path / "pruned"
    done = joulesmith(
        "compress", tiny, "--prune", "0.6", "--method", "magnitude", "--format", "transformers",
        "--out", pruned,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = ("recover", pruned, "--teacher", tiny, "--text", text, *SHORT, "--steps", "40")
    done = joulesmith(*words, "--rate", "1e-3", "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["after"]["kl"] < 0.7 * found["before"]["kl"]
    before, after = weights(pruned), weights(tmp_path / "out")
    for name, w in before.items():
        if "_proj" in name:
            assert not bool(after[name][w == 0].any())
            assert not bool((after[name] == w)[w != 0].all())


def test_sparse_from_the_first_step(
    tiny: Path, text: Path, tmp_path: Path, joulesmith: Run
) -> None:
    out = tmp_path / "out"
    done = joulesmith(
        "train", tiny, "--scratch", "--sparse", "rigl=0.8", "--text", text, *SHORT, "--steps", "30",
        "--out", out, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["format"] == "sparse" and found["sparsity"] == pytest.approx(0.8, abs=0.01)


def test_chosen_windows(tiny: Path, text: Path, tmp_path: Path, joulesmith: Run) -> None:
    twice = tmp_path / "twice.txt"
    twice.write_text(text.read_text() * 2)
    done = joulesmith(
        "train", tiny, "--text", twice, *SHORT, "--epochs", "0.1", "--repeats", "0.5",
        "--select", "gradient:high=0.25", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["repeats"] > 0
    left = found["windows_of"] - found["repeats"]
    assert found["windows"] == round(0.25 * left)


def test_a_recipe_shrinks_recovers_and_quantizes(
    tiny: Path, text: Path, tmp_path: Path, joulesmith: Run
) -> None:
    recipe, judged = tmp_path / "recipe.yaml", tmp_path / "judged.txt"
    judged.write_text(english().text[30_000:60_000])
    recipe.write_text(
        f"""joulesmith_recipe: 1
model: tiny
steps:
- step: recover
  text: {text}
  length: 32
  lesson: {{distil: {{hard: 1, soft: 0}}, train: {{steps: 2, rate: 1e-6}}}}
- step: shrink
  layers: 1
- step: recover
  text: {text}
  length: 32
  lesson:
    train: {{steps: 30, rate: 1e-3, batch: 4}}
- step: quantize
  default: INT8-G32
"""
    )
    words = ("quantize", tiny, "--recipe", recipe, "--eval", judged, "--json", "--out")
    done = joulesmith(*words, tmp_path / "a")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert any("30 steps on" in n for n in found["notes"])
    again = joulesmith(*words, tmp_path / "b")
    assert again.returncode == 0, again.stderr
    files = [next((tmp_path / n).glob("*.safetensors")).read_bytes() for n in ("a", "b")]
    assert files[0] == files[1], "the recipe makes the same bytes"
    without = recipe.read_text()
    start = without.rindex("- step: recover")
    recipe.write_text(without[:start] + without[without.index("- step: quantize") :])
    plain = joulesmith(*words, tmp_path / "c")
    assert plain.returncode == 0, plain.stderr
    lost = [1 - q["quality"]["kept"] for q in (found, json.loads(plain.stdout))]
    assert 0 < lost[0] < 0.8 * lost[1]
    recipe.write_text(without.replace(f"text: {text}", f"text: {judged}"))
    leak = joulesmith(*words, tmp_path / "d")
    assert leak.returncode == 0, leak.stderr
    assert any("were left out: they are judged on" in n for n in json.loads(leak.stdout)["notes"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("train", "{m}", "--steps", "1"), "--text FILE"),
        (("train", "{m}", "--text", "{t}"), "say when to stop"),
        (("train", "{m}", "--text", "{t}", "--steps", "1", "--epochs", "2"), "give one of"),
        (("train", "{m}", "--text", "absent", "--steps", "1"), "no such text file"),
        (("train", "{m}", "--text", "{t}", "--steps", "1", "--rate", "-1"), "rate"),
        (("train", "{m}", "--text", "{t}", "--steps", "1", "--optimizer", "adam"), "optimizer"),
        (("train", "{m}", "--text", "{t}", "--budget", "5"), "joules such as"),
        (("train", "{m}", "--text", "{t}", "--steps", "1", "--length", "99999"), "1024 tokens"),
        (("train", "{m}", "--text", "{t}", "--steps", "1", "--device", "cuda:9"), "--device"),
        (("train", "{m}", "--text", "{t}", "--steps", "1", "--sparse", "rigl"), "--sparse"),
        (("train", "{m}", "--text", "{t}", "--steps", "1", "--select", "x=2"), "share"),
        (("train", "{m}", "--text", "{t}", "--steps", "1", "--shape", "layers=x"), "--shape"),
        (("distill", "{m}", "--text", "{t}", "--steps", "1"), "say who learns"),
        (("distill", "{m}", "--text", "{t}", "--steps", "1", "--shape", "width=30"), "width"),
        (("recover", "{m}", "--teacher", "absent", "--text", "{t}", "--steps", "1"), "absent"),
        (("train", "{m}", "--text", "{t}", "--epochs", "nan"), "--epochs"),
        (("train", "{m}", "--text", "{t}", "--steps", "1", "--start-length", "5"), "divisor"),
        (
            ("train", "{m}", "--text", "{t}", "--steps", "1", "--select", "learnable:high=0.5"),
            "told by a teacher",
        ),
        (
            (
                "train",
                "{m}",
                "--text",
                "{t}",
                "--steps",
                "1",
                "--optimizer",
                "muon",
                "--sparse",
                "set=0.5",
            ),
            "no states of single weights",
        ),
        (("train", "{m}", "--text", "{t}", "--steps", "1", "--rate", "0"), "rate"),
        (
            ("train", "{m}", "--text", "{t}", "--steps", "1", "--format", "compressed-tensors"),
            "nothing is quantized",
        ),
        ((*RECOVER, "--mode", "quantized", "--type", "NF4-G32"), "compressed-tensors cannot hold"),
    ],
)
def test_one_clear_line(
    words: tuple[str, ...], told: str, tiny: Path, text: Path, tmp_path: Path, joulesmith: Run
) -> None:
    given = [w.format(m=tiny, t=text) for w in words]
    done = joulesmith(*given, "--out", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    lines = [x for x in done.stderr.splitlines() if x.startswith("joulesmith:")]
    assert len(lines) == 1 and told in lines[0], done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_empty_and_short_texts(tiny: Path, tmp_path: Path, joulesmith: Run) -> None:
    short = tmp_path / "short.txt"
    for body, told in (("", "empty text"), ("Some words only.", "too little text")):
        short.write_text(body)
        done = joulesmith("train", tiny, "--text", short, "--steps", "1", "--out", tmp_path / "o")
        assert done.returncode == 2 and told in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["short.txt"]


def test_a_loss_that_explodes(tiny: Path, text: Path, tmp_path: Path, joulesmith: Run) -> None:
    words = ("train", tiny, "--text", text, *SHORT, "--optimizer", "sgd", "--rate", "1e30")
    done = joulesmith(*words, "--steps", "9", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "lower the learning rate" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_shapes() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2
    )
    made: Any = shaped(config, shape_of("width=32,layers=3"))
    assert (made.hidden_size, made.intermediate_size, made.num_hidden_layers) == (32, 48, 3)
    assert made.head_dim == 8 and config.hidden_size == 64, "the given config is as it was"
    made = shaped(config, shape_of("heads=8"))
    assert (made.num_key_value_heads, made.head_dim) == (4, 8)
    for text in ("", "layers", "layers=0", "layers=1,layers=2", "colour=3"):
        with pytest.raises(JoulesmithError):
            shape_of(text)


def test_configs_are_read_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for body, told in (
        ("{", "not JSON"),
        ('{"model_type": "bert"}', "unsupported architecture"),
        ("[]", "unsupported architecture"),
        ('{"model_type": "llama", "hidden_size": "big"}', "llama|hidden_size"),
    ):
        path.write_text(body)
        with pytest.raises(JoulesmithError, match=told):
            read_config(path)
    path.write_text(
        '{"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4,'
        '"num_key_value_heads": 4, "auto_map": {"AutoConfig": "evil.Config"}}'
    )
    assert read_config(tmp_path).hidden_size == 32


def test_what_is_told() -> None:
    notes = ["others took 10% of it", "plain", "others took 40% of it", "plain"]
    assert one_of_each(notes) == ["others took up to 40% of it", "plain"]
    assert thinned([1.0, 2.0, 3.0], 2) == ((2, 1.5), (3, 3.0))
    assert thinned([]) == ()

    def quality(ppl: float) -> Quality:
        return Quality(10 / ppl, 0, ppl, 10, 0, 0, 1, 1, 1, "")

    assert recovered(quality(40), quality(20)) == pytest.approx(0.5)
    assert recovered(quality(10), quality(20)) is None
    assert math.isclose(recovered(quality(40), quality(5)) or 0, 1.5)
