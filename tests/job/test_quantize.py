"""`joulesmith quantize`, run as a user runs it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from runner import Run


def test_a_folder_that_keeps_most(tiny: Path, tmp_path: Path, joulesmith: Run) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    killed = joulesmith("quantize", tiny, "--type", "INT8-G32", "--out", out, until="round:")
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    done = joulesmith("quantize", tiny, "--type", "INT8-G32", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["quality"]["kept"] > 0.99
    assert found["bits_per_weight"] == 8.5
    assert set(found["damage"]) == {n for n in found["damage"] if n.startswith("blk.")}
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "working files are gone"
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float16)
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.arange(20)[None]).logits).all())
    again = joulesmith("quantize", tiny, "--type", "INT8-G32", "--out", out)
    assert again.returncode == 2
    assert "exists" in again.stderr


@pytest.mark.parametrize(
    ("kind", "form", "words"),
    [
        ("W8A8", "int-quantized", "a scale by token"),
        ("W8A8-STATIC", "int-quantized", "static scales"),
        ("FP8", "float-quantized", "FP8"),
    ],
)
def test_rounded_inputs_are_judged_and_written(
    tiny: Path, tmp_path: Path, joulesmith: Run, kind: str, form: str, words: str
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    more = () if kind == "FP8" else ("--kv-cache", "8")
    if kind == "W8A8":  # smoothed blocks of the first run are folded again by the second
        killed = joulesmith("quantize", tiny, "--type", kind, "--out", out, *more, until="judge:")
        assert killed.returncode == -signal.SIGKILL and not out.exists()
    done = joulesmith("quantize", tiny, "--type", kind, "--out", out, "--json", *more)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["type"] == kind and words in found["inputs"]
    assert found["quality"]["kept"] > 0.99 and 0 < found["quality"]["kl"] < 0.01
    assert 8 < found["bits_per_weight"] < 8.3
    assert (found["smoothing"] > 0) == (kind != "FP8")
    if more:
        assert found["cache"]["bits"] == 9.0
        assert found["cache"]["quality"]["kl"] != found["quality"]["kl"]
    else:
        assert found["cache"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "working files are gone"
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == form
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    ids = torch.arange(60)[None] * 5 % 400
    with torch.no_grad():
        a, b = model(ids).logits.log_softmax(-1), plain(ids).logits.log_softmax(-1)
    assert float((b.exp() * (b - a)).sum(-1).mean()) < 0.01


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--type", "INT3-G32"), "4 or 8 bits"),
        (("--type", "Q4_K"), "blk.0.attn_q.weight is Q5_0, which compressed-tensors cannot hold"),
        (("--type", "INT4-G32", "--embedding", "INT8-G32"), "keep the embedding in F16"),
        (("--type", "nonsense"), "unknown tensor type"),
        (("--type", "FP8-G32"), "a scale a row"),
        (("--type", "W8A8", "--kv-cache", "3"), "8 or 4 bits"),
        (("--type", "INT4-G48"), "blocks of 48"),
        (("--calib", "absent.txt"), "no such text file"),
        (("--effort", "great"), "nearest, fast, default, thorough"),
        (("--format", "gguf"), "a GGUF is a file"),
        (("--format", "zip"), "compressed-tensors, gguf, onnx, openvino"),
        (("--recipe", "absent.yaml"), "cannot read absent.yaml"),
        (("--type", "W8A8", "--rotate"), "no --rotate"),
        (("--type", "W8A8", "--format", "onnx"), "only compressed-tensors has a place"),
        (("--map", "absent/map.html"), "no such folder"),
        (("--map", "/"), "give the name of an HTML file"),
        (("--type", ""), "unknown tensor type ''"),
        (("--type", "X-ROW"), "unknown tensor type 'X-ROW'"),
        (("--eval", "/dev/null"), "--eval /dev/null"),
    ],
)
def test_bad_input_is_one_line(
    tiny: Path, tmp_path: Path, joulesmith: Run, words: tuple[str, ...], match: str
) -> None:
    done = joulesmith("quantize", tiny, "--out", tmp_path / "out", *words)
    assert done.returncode == 2
    assert match in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [], "no working files either"


def test_a_text_that_is_too_short_leaves_nothing(
    tiny: Path, tmp_path: Path, joulesmith: Run
) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    words = ("quantize", tiny, "--type", "INT4-G32", "--out", tmp_path / "out")
    done = joulesmith(*words, "--eval", tmp_path / "short.txt")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]


def test_a_run_does_not_go_on_with_another_model(
    tiny: Path, tmp_path: Path, joulesmith: Run
) -> None:
    pytest.importorskip("compressed_tensors")
    from joulesmith.models import load, save

    model = load(tiny)
    source, out = tmp_path / "model", tmp_path / "out"
    save(model, source)
    words = ("quantize", source, "--type", "INT4-G32", "--effort", "fast", "--out", out)
    assert joulesmith(*words, until="round:").returncode == -signal.SIGKILL
    with torch.no_grad():
        for p in model.module.parameters():
            p.mul_(0.9)
    save(model, tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(source / "model.safetensors")
    done = joulesmith(*words)
    assert done.returncode == 2 and "model_file differ" in done.stderr
    assert not out.exists()


def test_learned_rounding_keeps_more_and_goes_on_where_it_stopped(
    tiny: Path, tmp_path: Path, joulesmith: Run
) -> None:
    pytest.importorskip("compressed_tensors")
    found = {}
    for effort in ("nearest", "fast", "default"):
        words = ("quantize", tiny, "--type", "INT4-G32", "--effort", effort, "--json")
        done = joulesmith(*words, "--out", tmp_path / effort)
        assert done.returncode == 0, done.stderr
        found[effort] = json.loads(done.stdout)["quality"]["kl"]
    assert found["default"] < found["nearest"]
    assert found["default"] < found["fast"]
    words = ("quantize", tiny, "--type", "INT4-G32")
    again = tmp_path / "again"
    assert joulesmith(*words, "--out", again, until="tune:").returncode == -signal.SIGKILL
    page = tmp_path / "map.html"
    done = joulesmith(*words, "--out", again, "--map", page)
    assert done.returncode == 0, done.stderr
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("default", "again")]
    assert weights[0] == weights[1], "the same bytes as a run that was not killed"
    assert "<svg" in page.read_text()


def test_rotated(tiny: Path, tmp_path: Path, joulesmith: Run) -> None:
    from transformers import AutoModelForCausalLM

    words = ("quantize", tiny, "--type", "INT8-G32", "--out", tmp_path / "out", "--json")
    done = joulesmith(*words, "--rotate")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["quality"]["kept"] > 0.98
    pytest.importorskip("compressed_tensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16)
    assert not model.config.tie_word_embeddings


def test_as_onnx(tiny: Path, tmp_path: Path, joulesmith: Run) -> None:
    pytest.importorskip("onnxruntime")
    onnx = tmp_path / "onnx"
    done = joulesmith("quantize", tiny, "--type", "INT8-G32", "--out", onnx, "--format", "onnx")
    assert done.returncode == 0, done.stderr
    assert (onnx / "model.onnx").is_file()
