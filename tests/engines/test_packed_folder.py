"""Folders of `joulesmith quantize`, run packed: against the float model, and damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from joulesmith.compress.quantize.grids import grid
from joulesmith.engines import get_engine
from joulesmith.engines.packed import PackedLinear, resident_bytes
from joulesmith.engines.packed_folder import is_packed_folder, load_packed
from joulesmith.errors import EngineError, JoulesmithError
from joulesmith.export.compressed_tensors import write_compressed
from joulesmith.measure import measure_model
from joulesmith.models import Model, gguf_weight, load, set_gguf_weight
from tiny import write_tiny

LAYER = "model.layers.0.mlp.up_proj."


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("plain"), steps=2)


def quantized(plain: Path, out: Path, kinds: dict[str, str], default: str) -> Model:
    """Write the folder; returns the float32 model with the weights that are in it."""
    model = load(plain)
    packed = {}
    for ref in model.matrices():
        if ref.layer is not None:
            kind = next((k for part, k in kinds.items() if part in ref.name), default)
            packed[ref.name] = (kind, grid(kind).pack(gguf_weight(model, ref.name)))
    write_compressed(model, packed, out)
    for name in model.tensors:
        if name in packed:
            kind, raw = packed[name]
            back = torch.from_numpy(grid(kind).unpack(raw, model.ref(name).shape[1]))
        else:
            back = gguf_weight(model, name).half().float()
        set_gguf_weight(model, name, back)
    return model


@pytest.mark.parametrize(
    ("kinds", "default"),
    [
        ({}, "INT4-G32"),
        ({}, "INT8-G16"),
        ({}, "INT4-G32-ZP"),
        ({}, "INT8-G32-ZP"),
        ({"attn": "INT8-G16", "ffn_down": "INT4-G96"}, "INT4-G32"),
    ],
)
def test_runs_what_was_written(
    plain: Path, tmp_path: Path, kinds: dict[str, str], default: str
) -> None:
    want = quantized(plain, tmp_path / "out", kinds, default)
    assert is_packed_folder(tmp_path / "out") and not is_packed_folder(plain)
    ids = torch.arange(40)[None] * 7 % 400
    with torch.no_grad():
        right = want.module(ids).logits
    exact = load_packed(tmp_path / "out", dtype=torch.float32)
    assert exact.parameters == want.parameters and exact.tied
    assert isinstance(exact.module.model.layers[1].self_attn.q_proj, PackedLinear)
    with torch.no_grad():
        torch.testing.assert_close(exact.module(ids).logits, right, rtol=1e-4, atol=1e-4)
    grown = [
        m.module.generate(ids[:, :5], max_new_tokens=5, do_sample=False, eos_token_id=None)
        for m in (exact, want)
    ]
    assert torch.equal(*grown) and grown[0].shape == (1, 10)
    fast = load_packed(tmp_path / "out")
    with torch.no_grad():
        close = fast.module(ids).logits.float()
    assert float((close - right).norm() / right.norm()) < 0.02
    assert resident_bytes(fast.module) < resident_bytes(want.module) / 2
    assert fast.tokenizer.encode("a b") == want.tokenizer.encode("a b")


def test_engine_and_measuring(plain: Path, tmp_path: Path) -> None:
    quantized(plain, tmp_path / "out", {}, "INT4-G32")
    engine = get_engine("torch")
    tokens = np.arange(20, dtype=np.int32)
    with engine.load(tmp_path / "out") as session:
        assert session.logits(tokens).shape == (20, 400)
        assert len(session.generate(tokens, 3)) == 3
    found = measure_model(str(tmp_path / "out"), workload=(4, 2), repeat=1)
    assert found.engine.startswith("torch") and "packed" in found.note
    assert found.costs["decode"].seconds > 0
    assert found.file_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    with pytest.raises(JoulesmithError, match="is none"):
        measure_model(str(plain), engine="torch")
    with pytest.raises(EngineError, match="no compressed-tensors folder"):
        engine.load(plain)


@pytest.fixture(scope="module")
def good(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("good") / "out"
    quantized(plain, out, {}, "INT4-G32-ZP")
    return out


def changed(good: Path, to: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(good, to)
    tensors = load_file(to / "model.safetensors")
    edit(tensors)
    save_file(tensors, to / "model.safetensors")
    return to


def put(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda t: t.__setitem__(name, value(t[name]) if callable(value) else value)


def nan(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t[0, 0] = torch.nan
    return t


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put(LAYER + "weight_packed", lambda t: t[:, :-1].contiguous()), "weight_packed is I32"),
        (put(LAYER + "weight_packed", lambda t: t.float()), "weight_packed is F32"),
        (put(LAYER + "weight_scale", lambda t: t[:-1].contiguous()), "weight_scale is F16"),
        (put(LAYER + "weight_scale", nan), "NaN"),
        (put(LAYER + "weight_scale", lambda t: t.float() * 1e9), "beyond float16"),
        (put(LAYER + "weight_shape", torch.tensor([1 << 40, 1 << 40])), "weight_shape says"),
        (put(LAYER + "weight_shape", torch.zeros(3, dtype=torch.int64)), "weight_shape is"),
        (put(LAYER + "weight_zero_point", lambda t: t.T.contiguous()), "weight_zero_point is"),
        (lambda t: t.pop(LAYER + "weight_zero_point"), "no zeros"),
        (lambda t: t.pop(LAYER + "weight_scale"), "weight_scale is missing"),
        (lambda t: t.pop(LAYER + "weight_packed"), "is missing"),
        (lambda t: t.__setitem__(LAYER + "weight_g_idx", torch.zeros(64)), "unexpected tensor"),
        (lambda t: t.__setitem__("model.embed_tokens.weight_packed", torch.zeros(1)),
         "a packed embedding"),
        (put("model.norm.weight", lambda t: t * torch.nan), "NaN"),
        (put("model.norm.weight", lambda t: t[1:].contiguous()), "shape"),
    ],
)  # fmt: skip
def test_damaged_weights(good: Path, tmp_path: Path, edit: Any, message: str) -> None:
    folder = changed(good, tmp_path / "bad", edit)
    with pytest.raises(JoulesmithError, match=message) as caught:
        load_packed(folder)
    assert "\n" not in str(caught.value)


def test_truncated_file(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(good, folder)
    raw = (good / "model.safetensors").read_bytes()
    for size in (0, 7, 100, len(raw) // 2, len(raw) - 1):
        (folder / "model.safetensors").write_bytes(raw[:size])
        with pytest.raises(JoulesmithError, match="damaged"):
            load_packed(folder)


def at(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return edit


WEIGHTS = ("quantization_config", "config_groups", "group_0", "weights")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (at("quantization_config", "quant_method", value="gptq"), "no compressed-tensors"),
        (at("quantization_config", "format", value="int-quantized"), "format"),
        (at("quantization_config", "kv_cache_scheme", value={"num_bits": 8}), "cache"),
        (at("quantization_config", "config_groups", value={}), "no config_groups"),
        (at("quantization_config", "config_groups", value={"g": 3}), "no object"),
        (at(*WEIGHTS[:-1], "input_activations", value={"num_bits": 8}), "activations"),
        (at(*WEIGHTS[:-1], "targets", value="Linear"), "targets"),
        (at(*WEIGHTS, value=None), "no weights"),
        (at(*WEIGHTS, "num_bits", value=3), "3 bits"),
        (at(*WEIGHTS, "num_bits", value=8), "weight_packed is"),
        (at(*WEIGHTS, "type", value="float"), "float weights"),
        (at(*WEIGHTS, "group_size", value=0), "groups of 0"),
        (at(*WEIGHTS, "group_size", value=1 << 60), "groups of"),
        (at(*WEIGHTS, "group_size", value=48), "do not divide"),
        (at(*WEIGHTS, "group_size", value=16), "weight_scale is"),
        (at(*WEIGHTS, "strategy", value="tensor"), "strategy"),
        (at(*WEIGHTS, "strategy", value="channel"), "weight_scale is"),
        (at(*WEIGHTS, "symmetric", value=True), "zeros in a symmetric"),
        (at(*WEIGHTS, "symmetric", value="yes"), "symmetric is"),
        (at(*WEIGHTS, "actorder", value="group"), "reordered"),
        (at("hidden_size", value=1 << 20), "shape|impossible"),
        (at("num_hidden_layers", value=2000), "2000 layers"),
    ],
)
def test_a_config_that_lies(good: Path, tmp_path: Path, edit: Any, message: str) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(good, folder)
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(JoulesmithError, match=message):
        load_packed(folder)


def test_several_schemes_need_full_names(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(good, folder)
    config = json.loads((folder / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = groups["group_0"] | {"targets": ["re:(a+)+$"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(JoulesmithError, match="full names"):
        load_packed(folder)


def test_sparse_layouts_are_refused_by_name(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sparse"
    shutil.copytree(good, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["sparsity_config"] = {"format": "sparse-24-bitmask"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(JoulesmithError, match=r"stored as sparse-24-bitmask: .* dropped"):
        load_packed(folder)
