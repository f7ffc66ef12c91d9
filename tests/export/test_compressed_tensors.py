"""The compressed-tensors folder: loaded by transformers, the logits are those judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.compress.quantize.grids import grid
from joulesmith.errors import JoulesmithError
from joulesmith.export.compressed_tensors import words, write_compressed
from joulesmith.models import Model, gguf_weight, load, set_gguf_weight
from tiny import write_tiny

LAYOUT = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"), steps=2)


def packed_by(model: Model, kinds: dict[str, str], default: str) -> dict[str, Any]:
    out = {}
    for ref in model.matrices():
        if ref.layer is not None:
            kind = next((k for part, k in kinds.items() if part in ref.name), default)
            out[ref.name] = (kind, grid(kind).pack(gguf_weight(model, ref.name)))
    return out


@given(
    st.sampled_from([4, 8]),
    st.integers(1, 9),
    st.integers(1, 70),
    st.integers(0, 2**32 - 1),
)
def test_words_are_the_librarys(bits: int, rows: int, n: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, n)).astype(np.uint8)
    signed = torch.from_numpy(codes.astype(np.int16) - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(words(codes, bits), LAYOUT.pack_to_int32(signed, bits))


@pytest.mark.parametrize(
    ("kinds", "default"),
    [
        ({}, "INT4-G32"),
        ({}, "INT8-G32"),
        ({}, "INT4-G32-ZP"),
        ({"attn": "INT8-G16", "ffn_down": "INT4-G96"}, "INT4-G32"),
    ],
)
def test_transformers_loads_what_was_judged(
    folder: Path, tmp_path: Path, kinds: dict[str, str], default: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

    model = load(folder)
    packed = packed_by(model, kinds, default)
    out = tmp_path / "out"
    size = write_compressed(model, packed, out)
    assert size < 4 * model.parameters
    for name, (kind, rows) in packed.items():
        back = grid(kind).unpack(rows, model.ref(name).shape[1])
        set_gguf_weight(model, name, torch.from_numpy(back))
    ids = torch.arange(40)[None] % 400
    # Packed zeros: transformers 5.23 makes room for unpacked ones unless it unpacks at once.
    unpack = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    more = unpack if any(k.endswith("-ZP") for k, _ in packed.values()) else {}
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float16, **more)
    with torch.no_grad():
        got = theirs(ids).logits.float()
        want = model.module.to(torch.float16)(ids).logits.float()
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)
    assert AutoTokenizer.from_pretrained(out)("a b").input_ids
    assert not list(tmp_path.glob("*.part"))


def test_what_engines_cannot_load_is_refused_before_writing(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    good = packed_by(model, {}, "INT4-G32")
    name = next(iter(good))
    for kind in ("INT3-G32", "TERNARY-G32", "Q8_0"):
        bad = good | {name: (kind, grid(kind).pack(gguf_weight(model, name)))}
        with pytest.raises(JoulesmithError, match="4 and 8 bits"):
            write_compressed(model, bad, tmp_path / "out")
    embedding = "token_embd.weight"
    outside = {embedding: ("INT4-G32", grid("INT4-G32").pack(gguf_weight(model, embedding)))}
    with pytest.raises(JoulesmithError, match="not inside a block"):
        write_compressed(model, outside, tmp_path / "out")
    with torch.no_grad():
        model.module.model.norm.weight[0] = 1e6
    with pytest.raises(JoulesmithError, match="beyond float16"):
        write_compressed(model, good, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    model = load(folder)
    with pytest.raises(JoulesmithError, match="disk full"):
        write_compressed(model, packed_by(model, {}, "INT4-G32"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_config_says_what_is_packed(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    write_compressed(model, packed_by(model, {}, "INT4-G32-ZP"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    q = config["quantization_config"]
    assert q["ignore"] == ["lm_head"]
    weights = q["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, 32, False)
    assert config["dtype"] == "float16"
