"""The ONNX folder: ONNX Runtime gives the logits that were judged; bad input writes nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx_made import inputs

from joulesmith.compress.quantize.grids import grid
from joulesmith.compress.quantize.integers import IntGrid
from joulesmith.errors import JoulesmithError, MissingExtraError
from joulesmith.export import onnx as room
from joulesmith.export.onnx import NBits, export_onnx, loadable
from joulesmith.inspection import inspect_model
from joulesmith.models import gguf_weight, load
from tiny import write_tiny

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

TOKENS = (np.arange(80).reshape(2, 40) * 7 % 400).astype(np.int64)


def session(folder: Path) -> Any:
    ort = pytest.importorskip("onnxruntime")
    return ort.InferenceSession(str(folder / room.MODEL), providers=["CPUExecutionProvider"])


def test_the_engine_gives_the_judged_logits(exported: Any) -> None:
    found = session(exported.folder).run(["logits"], inputs(exported.model, TOKENS))[0]
    np.testing.assert_allclose(found, exported.judged(TOKENS), atol=2e-5, rtol=1e-4)


def test_decoding_with_the_cache_is_prefill(exported: Any) -> None:
    engine = session(exported.folder)
    names = [o.name for o in engine.get_outputs()]
    feed = inputs(exported.model, TOKENS[:, :30])
    cache = dict(zip(names, engine.run(None, feed), strict=True))
    for at in range(30, 40):
        feed = inputs(exported.model, TOKENS[:, at : at + 1], past=at)
        feed |= {
            n.replace("present", "past_key_values"): v for n, v in cache.items() if n != "logits"
        }
        cache = dict(zip(names, engine.run(None, feed), strict=True))
    want = exported.judged(TOKENS)[:, -1:]
    np.testing.assert_allclose(cache["logits"], want, atol=2e-5, rtol=1e-4)


def test_inspect_counts_what_was_written(exported: Any) -> None:
    found = inspect_model(exported.folder)
    assert found.architecture == "llama" and found.tied_head is True
    assert found.made_by is not None and found.made_by.startswith("joulesmith")
    stored = {t.type: t for t in found.types}
    for kind in {k for k, _ in exported.packed.values()}:
        rows = [(n, r) for n, (k, r) in exported.packed.items() if k == kind]
        weights = sum(math.prod(exported.model.ref(n).shape) for n, _ in rows)
        assert (stored[kind].tensors, stored[kind].weights) == (len(rows), weights)
        g = grid(kind)
        # zeros of four bits are padded to whole bytes for each row
        assert g.bits_per_weight <= stored[kind].bits_per_weight + 0.0 <= g.bits_per_weight + 0.1
    assert found.parameters == exported.model.parameters + _tables(found)
    assert exported.bytes < 2 * exported.model.parameters
    assert {t.layer for t in found.tensors if t.type in stored and "INT" in t.type} == {0, 1}


def _tables(found: Any) -> int:
    """Weights of what the graph holds besides parameters: rotary tables, scalars."""
    own = ("norm", "lm_head", "embed", "codes", "scales", "zeros")
    return sum(
        math.prod(t.shape) for t in found.tensors
        if t.bits_per_weight is not None and not any(o in t.name for o in own)
    )  # fmt: skip


def test_the_checker_takes_the_graph(exported: Any) -> None:
    import onnx

    onnx.checker.check_model(str(exported.folder / room.MODEL))
    graph = onnx.load(exported.folder / room.MODEL, load_external_data=False).graph
    assert not any(n.metadata_props or n.doc_string for n in graph.node)
    config = json.loads((exported.folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (exported.folder / "tokenizer.json").is_file()


@given(
    st.sampled_from([4, 8]),
    st.sampled_from([16, 32]),
    st.booleans(),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
)
def test_codes_are_laid_out_as_the_operator_reads_them(
    bits: int, group: int, symmetric: bool, rows: int, groups: int, seed: int
) -> None:
    g = IntGrid(bits, group, symmetric=symmetric)
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (rows, groups * group)).astype(np.uint8)
    step = torch.from_numpy(rng.uniform(0.1, 1, (rows, groups)).astype(np.float16)).float()
    zero = None
    if not symmetric:
        zero = torch.from_numpy(rng.integers(0, 1 << bits, (rows, groups)).astype(np.float32))
    found = NBits(g, codes, step, zero, None)
    # ContribOperators.md, written out
    want = np.zeros(codes.shape)
    raw, scales = found.codes.numpy(), found.scales.float().numpy()
    for r in range(rows):
        for i in range(groups * group):
            block, at = divmod(i, group)
            if bits == 8:
                code = int(raw[r, block, at])
            else:
                code = int(raw[r, block, at // 2]) >> 4 * (at % 2) & 15
            z = 1 << (bits - 1)
            if found.zeros is not None:
                packed = found.zeros.numpy()[r]
                z = (
                    int(packed[block])
                    if bits == 8
                    else int(packed[block // 2]) >> 4 * (block % 2) & 15
                )
            want[r, i] = (code - z) * float(scales[r, block])
    middle = 1 << (bits - 1)
    z_all = np.full((rows, groups), middle) if zero is None else zero.numpy()
    ours = (codes.reshape(rows, groups, group) - z_all[..., None]) * step.numpy()[..., None]
    np.testing.assert_array_equal(want, ours.reshape(codes.shape))


def test_what_engines_cannot_load_is_refused_before_writing(exported: Any, tmp_path: Path) -> None:
    model, out = exported.model, tmp_path / "out"
    name = next(iter(exported.packed))
    assert loadable("INT4-G32") is not None
    for kind in ("INT3-G32", "TERNARY-G32", "Q8_0", "INT4-G8"):
        bad = exported.packed | {name: (kind, grid(kind).pack(gguf_weight(model, name)))}
        with pytest.raises(JoulesmithError, match="4 and 8 bits in groups"):
            export_onnx(model, bad, out)
    embedding = "token_embd.weight"
    outside = {embedding: ("INT4-G32", grid("INT4-G32").pack(gguf_weight(model, embedding)))}
    with pytest.raises(JoulesmithError, match="is the embedding"):
        export_onnx(model, outside, out)
    for poison in (b"\x00\x7e", b"\x00\x7c"):  # NaN, infinity
        kind, rows = exported.packed[name]
        hostile = np.array(rows)
        hostile[0, :2] = np.frombuffer(poison, np.uint8)
        with pytest.raises(JoulesmithError, match="scales that are NaN or infinite"):
            export_onnx(model, {name: (kind, hostile)}, out)
    assert not list(tmp_path.iterdir())


def test_weights_beyond_float16_and_other_dtypes_are_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny", steps=0)
    model = load(folder)
    with torch.no_grad():
        model.module.model.embed_tokens.weight[0] = 1e6
    with pytest.raises(JoulesmithError, match="beyond float16"):
        export_onnx(model, {}, tmp_path / "out")
    with pytest.raises(JoulesmithError, match="load the model as float32"):
        export_onnx(load(folder, dtype="bfloat16"), {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_failures_leave_nothing_and_the_model_whole(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: list[Exception] = []

    def export(*_: object, **__: object) -> None:
        raise faults.pop()

    monkeypatch.setattr(torch.onnx, "export", export)
    kinds = [type(m) for m in exported.model.module.modules()]
    for fault, match in [
        (torch.onnx.errors.OnnxExporterError("no such operator\nmore"), "cannot export"),
        (OSError(28, "No space left on device"), "disk full"),
    ]:
        faults.append(fault)
        with pytest.raises(JoulesmithError, match=match) as found:
            export_onnx(exported.model, exported.packed, tmp_path / "out")
        assert "\n" not in str(found.value)
        assert not list(tmp_path.iterdir())
        assert [type(m) for m in exported.model.module.modules()] == kinds
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(JoulesmithError, match="not empty"):
        export_onnx(exported.model, {}, tmp_path / "out")


def test_a_missing_extra_is_one_line(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"joulesmith\[onnx\]"):
        export_onnx(exported.model, {}, tmp_path / "out")
