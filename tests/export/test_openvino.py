"""The OpenVINO folder: the runtime gives the logits that were judged, on 4-bit kernels."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_made import inputs

from joulesmith.errors import JoulesmithError, MissingExtraError
from joulesmith.export import onnx
from joulesmith.export import openvino as room
from joulesmith.inspection import inspect_model

ov = pytest.importorskip("openvino")
pytest.importorskip("onnxscript")

TOKENS = (np.arange(80).reshape(2, 40) * 7 % 400).astype(np.int64)
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


@pytest.fixture
def folder(exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Exported for OpenVINO, by way of the ONNX graph that was made before."""

    def graph(model: Any, layers: Any, to: Path) -> int:
        assert set(layers) == {model.ref(n).parameter for n in exported.packed}
        for name in (onnx.MODEL, onnx.DATA):
            shutil.copyfile(exported.folder / name, to / name)
        return 0

    monkeypatch.setattr(onnx, "write_graph", graph)
    size = room.export_openvino(exported.model, exported.packed, tmp_path / "out")
    assert size == (tmp_path / "out" / "openvino_model.bin").stat().st_size
    return tmp_path / "out"


def test_the_engine_gives_the_judged_logits(exported: Any, folder: Path) -> None:
    core = ov.Core()
    want, feed = exported.judged(TOKENS), inputs(exported.model, TOKENS)
    exact = core.compile_model(str(folder / room.MODEL), "CPU", EXACT)
    np.testing.assert_allclose(exact(feed)["logits"], want, atol=2e-5, rtol=1e-4)
    # as it runs unless told otherwise: activations in 8 bits, or bfloat16
    usual = core.compile_model(str(folder / room.MODEL), "CPU")(feed)["logits"]
    assert np.abs(usual - want).max() < 0.1 * np.abs(want).max()
    # the codes reach the kernels as codes
    low = 0
    for node in exact.get_runtime_model().get_ops():
        if node.get_rt_info()["layerType"].astype(str) == "FullyConnected":
            low += node.input(1).get_element_type() in (
                ov.Type.u4,
                ov.Type.i4,
                ov.Type.u8,
                ov.Type.i8,
            )
    assert low == len(exported.packed)

    found = inspect_model(folder)
    assert (found.architecture, found.tied_head) == ("llama", True)
    packed = [t for t in found.tensors if t.type.startswith(("u4", "u8", "i8", "i4"))]
    assert len(packed) == len(exported.packed)
    weights = sum(np.prod(exported.model.ref(n).shape) for n in exported.packed)
    assert sum(np.prod(t.shape) for t in packed) == weights
    assert sum(t.bytes for t in packed) * 8 / weights < 7
    assert not list(folder.glob("graph-*")) and (folder / "tokenizer.json").is_file()


def test_refusals_leave_nothing(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, (_, rows) = next(iter(exported.packed.items()))
    with pytest.raises(JoulesmithError, match="4 and 8 bits in groups"):
        room.export_openvino(exported.model, {name: ("INT3-G32", rows)}, tmp_path / "out")

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "write_graph", full)
    with pytest.raises(JoulesmithError, match="disk full"):
        room.export_openvino(exported.model, {}, tmp_path / "out")
    # a graph that OpenVINO does not take
    monkeypatch.setattr(onnx, "write_graph", lambda m, k, to: (to / onnx.MODEL).write_bytes(b"x"))
    with pytest.raises(JoulesmithError, match="OpenVINO cannot convert") as found:
        room.export_openvino(exported.model, {}, tmp_path / "out")
    assert "\n" not in str(found.value)
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_one_line(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"joulesmith\[openvino\]"):
        room.export_openvino(exported.model, {}, tmp_path / "out")
