"""Folders of pruned models: round trip, bytes, memory, refusals, and nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from joulesmith import models
from joulesmith.compress.quantize.grids import grid
from joulesmith.compress.sparse.tensor import information_bytes
from joulesmith.engines.packed import resident_bytes
from joulesmith.errors import JoulesmithError
from joulesmith.export import forms
from joulesmith.export.sparse_folder import SparseBytes, load_sparse, write_sparse
from joulesmith.formats.sparse_layout import WEIGHTS
from joulesmith.inspection import inspect_model
from tiny import write_tiny

IDS = torch.arange(40).reshape(2, 20)
FREE, NM = (f"model.layers.0.mlp.{n}_proj" for n in ("up", "gate"))
QUERY = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> models.Model:
    """75 % of one matrix, 2:4 of another, blocks of a third; the rest dense."""
    model = models.load(write_tiny(tmp_path_factory.mktemp("sparse") / "model", steps=1))
    rng = np.random.default_rng(0)
    masks = {
        FREE: rng.random((96, 64)) >= 0.75,
        NM: (rng.random((96, 16, 4)).argsort(-1) < 2).reshape(96, 64),
        QUERY: (rng.random((4, 4)) < 0.4).repeat(16, 0).repeat(16, 1),
    }
    with torch.no_grad():
        for name, mask in masks.items():
            model.module.get_submodule(name).weight *= torch.from_numpy(mask)
    return model


@pytest.fixture
def written(pruned: models.Model, tmp_path: Path) -> Path:
    write_sparse(pruned, tmp_path / "out")
    return tmp_path / "out"


def test_round_trip(pruned: models.Model, tmp_path: Path) -> None:
    before = [p.detach().clone() for p in pruned.module.parameters()]
    sizes = {s.name: s for s in write_sparse(pruned, tmp_path / "out")}
    for a, b in zip(before, pruned.module.parameters(), strict=True):
        assert a.equal(b)
    assert sizes[f"{FREE}.weight"].layout in ("gaps", "bitmask")
    assert sizes[f"{NM}.weight"].layout == "2:4"
    assert sizes[f"{QUERY}.weight"].layout == "blocks-16x16"
    assert sizes["model.embed_tokens.weight"].layout == "dense"
    assert all(s.bytes <= s.dense + 40 for s in sizes.values())
    least = information_bytes(96 * 64, int((before_of(pruned, FREE) != 0).sum()), 32)
    assert sizes[f"{FREE}.weight"].bytes <= 1.05 * least
    back = load_sparse(tmp_path / "out")
    for (name, a), b in zip(
        back.module.named_parameters(), pruned.module.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    with torch.no_grad():
        assert torch.equal(back.module(IDS).logits, pruned.module(IDS).logits)
    assert back.parameters == pruned.parameters
    assert back.tokenizer.encode("a word") == pruned.tokenizer.encode("a word")


def before_of(model: models.Model, name: str) -> torch.Tensor:
    weight: torch.Tensor = model.module.get_submodule(name).weight
    return weight


def packed_of(model: models.Model) -> dict[str, tuple[str, np.ndarray]]:
    """Pruned and quantized: all of the blocks' matrices, in GGUF's order of rows."""
    kinds = {"attn_q": "INT8-G64", "ffn_up": "INT4-G32-ZP", "ffn_down": "TERNARY-G32"}
    return {
        r.name: (k, grid(k).pack(models.gguf_weight(model, r.name)))
        for r in model.matrices()
        if r.layer is not None
        for k in [kinds.get(r.role, "INT4-G32")]
    }


def test_pruned_and_quantized(pruned: models.Model, tmp_path: Path) -> None:
    packed = packed_of(pruned)
    sizes = {s.name: s for s in write_sparse(pruned, tmp_path / "out", packed)}
    back = load_sparse(tmp_path / "out")
    for name, (kind, rows) in packed.items():
        got = models.gguf_weight(back, name)
        assert np.array_equal(got.numpy(), grid(kind).unpack(rows, got.shape[1])), name
    up: SparseBytes = sizes[f"{FREE}.weight"]
    assert up.kind == "INT4-G32-ZP" and up.bytes < 0.65 * up.dense
    with pytest.raises(JoulesmithError, match="no integer grid"):
        name = next(iter(packed))
        write_sparse(pruned, tmp_path / "q", {name: ("Q4_0", packed[name][1])})
    with pytest.raises(JoulesmithError, match="tied"):
        write_sparse(pruned, tmp_path / "q", {"output.weight": packed[name]})
    assert not (tmp_path / "q").exists()


def test_packed_in_memory(pruned: models.Model, tmp_path: Path) -> None:
    """The same logits from packed weights, in the bytes of the file."""
    sizes = write_sparse(pruned, tmp_path / "out", packed_of(pruned))
    dense, packed = load_sparse(tmp_path / "out"), load_sparse(tmp_path / "out", packed=True)
    with torch.no_grad():
        want, got = dense.module(IDS).logits, packed.module(IDS).logits
    assert torch.allclose(want, got, rtol=1e-5, atol=1e-5)
    norms = sum(p.numel() * 4 for p in dense.module.parameters() if p.dim() == 1)
    held = resident_bytes(packed.module) - norms
    assert held <= sum(s.bytes for s in sizes) + 1000  # rotary tables
    fast = load_sparse(tmp_path / "out", packed=True, native=True)
    with torch.no_grad():
        assert torch.allclose(want, fast.module(IDS).logits, rtol=1e-3, atol=1e-3)
    half = load_sparse(tmp_path / "out", dtype=torch.bfloat16, packed=True)
    with torch.no_grad():
        assert half.module(IDS).logits.dtype == torch.bfloat16
    with pytest.raises(JoulesmithError, match="gradients"):
        packed.module.get_submodule(FREE)(torch.zeros(1, 64, requires_grad=True))


def test_float_kinds(pruned: models.Model, tmp_path: Path) -> None:
    with pytest.raises(JoulesmithError, match="F16"):
        write_sparse(pruned, tmp_path / "out", kind="F16")
    with pytest.raises(JoulesmithError, match="float type"):
        write_sparse(pruned, tmp_path / "out", kind="F64")
    assert list(tmp_path.iterdir()) == []
    write_sparse(pruned, tmp_path / "a")
    half = load_sparse(tmp_path / "a", dtype=torch.bfloat16)
    assert {s.kind for s in write_sparse(half, tmp_path / "b")} == {"BF16"}
    again = load_sparse(tmp_path / "b", dtype=torch.bfloat16)
    for a, b in zip(half.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_no_engine_takes_it_for_a_dense_model(written: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    with pytest.raises(ValueError, match="joulesmith_sparse"):
        AutoModelForCausalLM.from_pretrained(written)
    with pytest.raises(OSError):
        LlamaForCausalLM.from_pretrained(written)
    with pytest.raises(JoulesmithError, match="unsupported architecture"):
        models.load(written)


def test_inspection(pruned: models.Model, written: Path) -> None:
    found = inspect_model(written)
    assert found.parameters == pruned.parameters
    assert (found.architecture, found.layers, found.hidden) == ("llama", 2, 64)
    line = next(t for t in found.tensors if t.name == f"{NM}.weight")
    assert (line.type, line.shape, line.role) == ("F32 2:4", (96, 64), "ffn_gate")
    assert line.bits_per_weight is not None and 16 < line.bits_per_weight < 17.5
    assert sum(t.bytes for t in found.tensors) < found.file_bytes


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", ["weights", "config", "tokenizer"])
def test_a_failed_write_leaves_nothing(
    pruned: models.Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: str,
    error: BaseException,
) -> None:
    import safetensors.torch

    def fail(*_: object, **__: object) -> None:
        raise error

    if at == "weights":
        monkeypatch.setattr(safetensors.torch, "save_file", fail)
    elif at == "config":
        monkeypatch.setattr(Path, "write_text", fail)
    else:
        monkeypatch.setattr(models, "write_tokenizer_of", fail)
    want = JoulesmithError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(want):
        write_sparse(pruned, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_used_folder_is_kept(pruned: models.Model, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("keep")
    with pytest.raises(JoulesmithError, match="not empty"):
        write_sparse(pruned, tmp_path / "used")
    assert (tmp_path / "used" / "mine").read_text() == "keep"


@pytest.mark.parametrize(
    "damage", ["places", "values", "index", "type", "flat", "nan", "strange", "missing", "stray"]
)
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_weights_are_one_line(written: Path, damage: str, packed: bool) -> None:
    tensors = load_file(written / WEIGHTS)
    name = f"{FREE}.weight"
    if damage in ("places", "values"):
        tensors[f"{name}.{damage}"] = tensors[f"{name}.{damage}"][:-1].clone()
    elif damage == "index":
        tensors[f"{name}.index"][0, 1] += 1
    elif damage == "type":
        tensors[f"{name}.places"] = tensors[f"{name}.places"].to(torch.int16)
    elif damage == "flat":
        tensors[f"{name}.index"] = tensors[f"{name}.index"].reshape(-1)
    elif damage == "nan":
        tensors[f"{name}.values"][:4] = 255
    elif damage == "strange":
        tensors["extra"] = torch.zeros(2)
    elif damage == "stray":
        tensors[f"{name}.zeros"] = torch.zeros(2, 2, dtype=torch.uint8)
    else:
        del tensors[f"{name}.values"]
    save_file(tensors, written / WEIGHTS)
    with pytest.raises(JoulesmithError) as e:
        load_sparse(written, packed=packed)
    assert "\n" not in str(e.value)


def test_truncated_and_foreign_folders(written: Path) -> None:
    config = json.loads((written / "config.json").read_text())
    matrices = config["joulesmith"]["matrices"]
    name = f"{FREE}.weight"
    entries = [
        [],
        {name: 3},
        {**matrices, name: {"layout": "csr", "kind": "F32"}},
        {**matrices, name: {"layout": "gaps", "kind": "F64"}},
        {**matrices, name: {"layout": "gaps", "kind": "INT4-G32"}},
        {**matrices, "other.weight": matrices[name]},
        {k: v for k, v in matrices.items() if k != name},
    ]
    for entry in entries:
        config["joulesmith"]["matrices"] = entry
        (written / "config.json").write_text(json.dumps(config))
        with pytest.raises(JoulesmithError) as e:
            load_sparse(written)
        assert "\n" not in str(e.value)
    config["joulesmith"]["matrices"] = {name: {"layout": "gaps", "kind": "F32", "shape": ["x", 1]}}
    (written / "config.json").write_text(json.dumps(config))
    with pytest.raises(JoulesmithError, match="damaged matrix"):
        inspect_model(written)
    config["joulesmith"]["matrices"] = matrices
    (written / "config.json").write_text(json.dumps(config))
    raw = (written / WEIGHTS).read_bytes()
    (written / WEIGHTS).write_bytes(raw[: len(raw) // 2])
    with pytest.raises(JoulesmithError, match="damaged"):
        load_sparse(written)
    (written / "config.json").write_text("{}")
    with pytest.raises(JoulesmithError, match="not a sparse model"):
        load_sparse(written)


@pytest.mark.parametrize("name", ["sparse-bitmask", "sparse-24-bitmask", "marlin-24"])
def test_layouts_that_nothing_reads_are_refused_by_name(name: str) -> None:
    """Holds as long as the installed library reads them no more than its maintained peers."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    with pytest.raises(JoulesmithError, match=f"{name}.*no longer read it"):
        forms.ready(name)
    forms.ready("sparse")
    assert not any(word in dir(compressors) for word in ("BitmaskCompressor", "Marlin24Compressor"))
