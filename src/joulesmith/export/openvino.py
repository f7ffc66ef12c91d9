"""Writes an OpenVINO IR folder whose packed weights are the codes that were chosen.

OpenVINO's own ONNX frontend (which its ``convert_model`` calls too, after telemetry) reads
the graph of `export.onnx` and turns each MatMulNBits into a u4 or u8 constant with its
zeros and scales: the same codes. Floats are stored as float16 wherever that loses nothing.
Knows no calibration and no search.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from joulesmith._version import __version__
from joulesmith.atomic import atomic_folder
from joulesmith.compress.quantize.grids import Bytes
from joulesmith.errors import JoulesmithError, MissingExtraError
from joulesmith.export import onnx

if TYPE_CHECKING:
    from joulesmith.models import Model

MODEL = "openvino_model.xml"
_SMALL = 16
"""Elements up to which a float constant stays float32."""


def export_openvino(
    model: Model,
    packed: Mapping[str, tuple[str, Bytes]],
    folder: str | os.PathLike[str],
) -> int:
    """Write ``model`` with these matrices packed; returns the bytes of the weights.

    packed, folder and what is refused before writing: as `onnx.export_onnx`. Raises
    `MissingExtraError` without the extra ``[openvino]``.
    """
    from joulesmith.models import write_tokenizer_of

    ov = package()
    layers = onnx.packed_layers(model, packed)
    size = sum(p.numel() * 4 for p in model.module.parameters()) + (1 << 24)
    with atomic_folder(folder, needed=size) as temp:
        # the graph on the way lies inside, so that one disk's space is asked for
        with tempfile.TemporaryDirectory(dir=temp, prefix="graph-") as between:
            onnx.write_graph(model, layers, Path(between))
            try:
                graph = ov.Core().read_model(str(Path(between) / onnx.MODEL))
                graph.set_friendly_name(model.name)
                _halve(graph, ov)
                graph.set_rt_info(__version__, ["joulesmith", "version"])
                ov.save_model(graph, str(temp / MODEL), compress_to_fp16=False)
            except RuntimeError as e:
                line = (str(e).strip().splitlines() or [type(e).__name__])[-1][:200]
                raise JoulesmithError(f"OpenVINO cannot convert {model.name}: {line}") from e
            del graph  # its constants may lie in the files between
        onnx.write_config(model, temp)
        write_tokenizer_of(model, temp)
        return (temp / MODEL).with_suffix(".bin").stat().st_size


def _halve(graph: Any, ov: Any) -> None:
    """float32 constants that float16 holds exactly become that, with a Convert behind them."""
    from openvino import opset13

    for node in graph.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != ov.Type.f32:
            continue
        wide = node.get_data()
        if wide.size <= _SMALL:
            continue
        with np.errstate(over="ignore"):
            half = wide.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), wide):
            continue
        narrow = opset13.constant(half, dtype=np.float16, name=node.get_friendly_name())
        back = opset13.convert(narrow, "f32")
        for reader in list(node.output(0).get_target_inputs()):
            reader.replace_source_output(back.output(0))


def package() -> Any:
    try:
        import openvino
    except ImportError as e:
        raise MissingExtraError("openvino", "openvino") from e
    return openvino
