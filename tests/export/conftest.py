"""The quantized model of `onnx_made`: the export takes seconds, so it is made once."""

from __future__ import annotations

import pytest
from onnx_made import KINDS, Exported

from joulesmith.compress.quantize.grids import grid
from joulesmith.models import gguf_weight, load
from tiny import write_tiny


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    pytest.importorskip("onnxscript")
    from joulesmith.export.onnx import export_onnx

    folder = tmp_path_factory.mktemp("onnx")
    model = load(write_tiny(folder / "tiny", steps=2))
    packed = {}
    for ref in model.matrices():
        if ref.layer is not None:
            kind = KINDS[ref.role]
            packed[ref.name] = (kind, grid(kind).pack(gguf_weight(model, ref.name)))
    before = [p.detach().clone() for p in model.module.parameters()]
    size = export_onnx(model, packed, folder / "out")
    for a, b in zip(before, model.module.parameters(), strict=True):
        assert a.equal(b)  # the model given is as it was
    return Exported(model, packed, folder / "out", size)
