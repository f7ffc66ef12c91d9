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

from joulesmith.compress.quantize.activations import (
    InputQuantizer,
    Scheme,
    quantized_inputs,
    static_quantizer,
)
from joulesmith.compress.quantize.grids import grid
from joulesmith.compress.quantize.histograms import Histogram
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


def by_row(model: Model, kind: str) -> dict[str, Any]:
    """Every matrix of the blocks with a scale a row."""
    out = {}
    for ref in model.matrices():
        if ref.layer is not None:
            name = f"{kind}-G{ref.shape[1]}"
            out[ref.name] = (name, grid(name).pack(gguf_weight(model, ref.name)))
    return out


def quantizers(model: Model, packed: dict[str, Any], scheme: Scheme) -> dict[str, InputQuantizer]:
    if scheme.dynamic:
        return dict.fromkeys(packed, InputQuantizer(scheme))
    seen = Histogram()
    seen.observe(torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 2 + 0.3)
    found = dict.fromkeys(packed, static_quantizer(seen, scheme, "absmax"))
    down = next(n for n in packed if "ffn_down" in n)
    return found | {down: InputQuantizer(Scheme(scheme.kind, symmetric=scheme.symmetric))}


@pytest.mark.parametrize(
    ("kind", "scheme", "form"),
    [
        ("INT8", Scheme(), "int-quantized"),
        ("INT8", Scheme(symmetric=False), "int-quantized"),
        ("INT8", Scheme(dynamic=False), "int-quantized"),
        ("INT8", Scheme(dynamic=False, symmetric=False), "int-quantized"),
        ("FP8", Scheme("fp8"), "float-quantized"),
        ("FP8", Scheme("fp8", dynamic=False), "float-quantized"),
    ],
)
def test_transformers_rounds_inputs_as_judged(
    folder: Path, tmp_path: Path, kind: str, scheme: Scheme, form: str
) -> None:
    from transformers import AutoModelForCausalLM

    model = load(folder)
    with torch.no_grad():  # what the file holds of the rest, so that only rounding can differ
        for p in model.module.parameters():
            p.copy_(p.half())
    packed = by_row(model, kind)
    inputs = quantizers(model, packed, scheme)
    out = tmp_path / "out"
    write_compressed(model, packed, out, inputs=inputs)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == form
    assert len(config["config_groups"]) == (1 if scheme.dynamic else 2)
    ids = torch.arange(40)[None] % 400
    with torch.no_grad():
        for name, (k, rows) in packed.items():
            back = grid(k).unpack(rows, model.ref(name).shape[1])
            set_gguf_weight(model, name, torch.from_numpy(back))
        weights_only = model.module(ids).logits
        named = {model.ref(n).parameter.removesuffix(".weight"): q for n, q in inputs.items()}
        with quantized_inputs(model.module, named):
            want = model.module(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        got = theirs(ids).logits
    # Against what rounding the inputs does, the two agree: it is the same rounding.
    rounding = (want - weights_only).abs()
    assert rounding.max() > 1e-3
    assert (got - want).abs().mean() < 0.02 * rounding.mean()


def test_mixtures_of_inputs_that_engines_cannot_load(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    int8, fp8 = by_row(model, "INT8"), by_row(model, "FP8")
    name = next(iter(int8))
    dynamic = dict.fromkeys(int8, InputQuantizer(Scheme()))
    floats = dict.fromkeys(int8, InputQuantizer(Scheme("fp8")))
    grouped = packed_by(model, {}, "INT8-G32")
    zeros = packed_by(model, {}, "INT4-G32-ZP")
    for packed, inputs, match in (
        (int8, {name: dynamic[name]}, "one format"),
        (int8 | {name: fp8[name]}, dynamic, "must be FP8"),
        (fp8, dynamic, "must be FP8"),
        (int8, floats, "must be int8"),
        (grouped, dynamic, "a scale a row"),
        (zeros, dynamic, "a scale a row"),
        (packed_by(model, {}, "FP8-G32"), floats, "a scale a row"),
        (int8, dynamic | {"blk.9.attn_q.weight": dynamic[name]}, "no packed weights"),
    ):
        with pytest.raises(JoulesmithError, match=match):
            write_compressed(model, packed, tmp_path / "out", inputs=inputs)
    assert not list(tmp_path.iterdir())


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
    with pytest.raises(JoulesmithError, match="is the embedding"):
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
