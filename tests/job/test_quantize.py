"""`joulesmith quantize`, run as a user runs it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from runner import Run


def test_a_folder_that_keeps_most(tiny: Path, tmp_path: Path, joulesmith: Run) -> None:
    pytest.importorskip("compressed_tensors")
    import torch
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
    ("words", "match"),
    [
        (("--type", "INT3-G32"), "4 or 8 bits"),
        (("--type", "Q4_K"), "4 or 8 bits"),
        (("--type", "nonsense"), "unknown tensor type"),
        (("--type", "INT4-G48"), "blocks of 48"),
        (("--calib", "absent.txt"), "no such text file"),
    ],
)
def test_bad_input_is_one_line(
    tiny: Path, tmp_path: Path, joulesmith: Run, words: tuple[str, ...], match: str
) -> None:
    done = joulesmith("quantize", tiny, "--out", tmp_path / "out", *words)
    assert done.returncode == 2
    assert match in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
