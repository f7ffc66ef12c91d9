"""The formats that `quantize` and `compress` write: what each can hold, told before any work.

One recipe may be written in any of them that hold its types. Knows types and names; what
the bytes look like is each exporter's own business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from joulesmith.compress.quantize.grids import Bytes, grid
from joulesmith.errors import JoulesmithError

if TYPE_CHECKING:
    from torch import Tensor

    from joulesmith.architectures import TensorRef
    from joulesmith.compress.quantize.activations import InputQuantizer, Scheme
    from joulesmith.models import Model

GGUF = "gguf"
PLAIN, SPARSE = "transformers", "sparse"
FORMATS = ("compressed-tensors", GGUF, "onnx", "openvino", PLAIN, SPARSE)
ADAPTERS = (GGUF, "compressed-tensors")
"""Formats whose engines add low-rank factors as they run, from an adapter beside the model."""
_DROPPED = ("sparse-bitmask", "sparse-24-bitmask", "marlin-24")
"""Layouts of compressed-tensors that all its readers dropped between January and June 2026
(vllm pull requests 32688 and 36799, compressed-tensors 610, transformers 46342)."""
UNTOUCHED = "F16"
"""What all formats store matrices in that are not quantized."""
_CASTS = ("F32", "BF16")


def ready(form: str) -> None:
    """Raises `JoulesmithError` for an unknown format, `MissingExtraError` for a missing one."""
    if form in _DROPPED:
        raise JoulesmithError(
            f"--format {form}: vLLM, transformers and compressed-tensors no longer read it: give "
            f"{SPARSE}, which joulesmith itself reads back, or a dense format"
        )
    if form not in FORMATS:
        raise JoulesmithError(f"--format {form}: give one of {', '.join(FORMATS)}")
    if form in ("onnx", "openvino"):
        from joulesmith.export import onnx, openvino

        onnx.packages()
        if form == "openvino":
            openvino.package()


def check(form: str, ref: TensorRef, kind: str, scheme: Scheme | None = None) -> None:
    """Raises `JoulesmithError` where a format cannot hold a matrix of that type.

    scheme: how the inputs of the matrix are rounded, None where they are not.
    """
    if form == GGUF:
        from joulesmith.export import gguf_packed

        if scheme is not None:
            raise _refused(form, ref, f"{kind} with rounded inputs", _PLACE)
        if gguf_packed.stored_type(kind) is None:
            raise _refused(form, ref, kind, gguf_packed.ADVICE)
        return
    if kind == UNTOUCHED:
        return
    if form == PLAIN:
        raise _refused(form, ref, kind, "a plain folder is float16: give --format another name")
    if form == SPARSE:
        from joulesmith.compress.quantize.integers import by_name

        if scheme is not None:
            raise _refused(form, ref, f"{kind} with rounded inputs", _PLACE)
        if by_name(kind) is None:
            raise _refused(form, ref, kind, "give INT8-G64, INT4-G32, INT8-ROW ...")
        return
    if kind in _CASTS:
        raise _refused(form, ref, kind, "give F16, in which it stores what is not quantized")
    if ref.role == "token_embd":
        raise _refused(form, ref, kind, "its engines keep the embedding in F16: leave it out")
    if form == "compressed-tensors":
        from joulesmith.compress.quantize.activations import InputQuantizer
        from joulesmith.export.compressed_schemes import Packed
        from joulesmith.export.compressed_schemes import check as loads
        from joulesmith.export.compressed_tensors import loadable

        found = loadable(kind)
        if found is None:
            raise _refused(form, ref, kind, "give INT4-G128, INT8-G64-ZP, FP8 ... (4 or 8 bits)")
        # Static scales are not known yet, and what loads does not hang on them.
        inputs = None if scheme is None else InputQuantizer(replace(scheme, dynamic=True))
        shape = (ref.shape[0], ref.shape[1])
        loads(ref.name, Packed(found, np.empty((0, 0), np.uint8), shape, inputs))
        return
    from joulesmith.export import onnx

    if scheme is not None:
        raise _refused(form, ref, f"{kind} with rounded inputs", _PLACE)
    if onnx.loadable(kind) is None:
        advice = "give INT4 or INT8 in groups of 16, 32, 64 ... (INT4-G32, INT8-G128-ZP)"
        raise _refused(form, ref, kind, advice)


_PLACE = "only compressed-tensors has a place for them"


def _refused(form: str, ref: TensorRef, kind: str, advice: str) -> JoulesmithError:
    return JoulesmithError(f"{ref.name} is {kind}, which {form} cannot hold: {advice}")


def bits_per_weight(form: str, kind: str) -> float:
    """Bits of a weight of that type as the format stores it, scales and zeros counted."""
    if form == GGUF:
        from joulesmith.export.gguf_packed import stored_type

        kind = stored_type(kind) or kind
    return grid(kind).bits_per_weight


def write(
    form: str,
    model: Model,
    packed: Mapping[str, tuple[str, Bytes]],
    out: Path,
    inputs: Mapping[str, InputQuantizer] | None = None,
) -> int:
    """Write the model in that format, whole or not at all; returns the bytes of its weights.

    packed: GGUF name -> (type, packed rows). The model's other weights are written as they
    are. out: a new file for GGUF, else a new folder. inputs: GGUF name -> what rounds a
    layer's inputs. Raises `JoulesmithError` for what the format cannot hold.
    """
    if form == GGUF:
        from joulesmith._version import __version__
        from joulesmith.export.gguf_packed import write_packed

        return write_packed(model, packed, out, provenance={"version": __version__})
    packed = {n: p for n, p in packed.items() if p[0] != UNTOUCHED}
    if form == PLAIN:
        return _write_plain(model, out)
    if form == SPARSE:
        from joulesmith.export.sparse_folder import write_sparse

        vectors = sum(2 * int(p.numel()) for p in model.module.parameters() if p.ndim == 1)
        return vectors + sum(s.bytes for s in write_sparse(model, out, packed))
    if form == "onnx":
        from joulesmith.export.onnx import export_onnx

        return export_onnx(model, packed, out)
    if form == "openvino":
        from joulesmith.export.openvino import export_openvino

        return export_openvino(model, packed, out)
    from joulesmith.export.compressed_tensors import write_compressed

    return write_compressed(model, packed, out, inputs=inputs)


def _write_plain(model: Model, out: Path) -> int:
    """A folder of float16, which the weights are rounded to already."""
    from joulesmith.models import save
    from joulesmith.weights import set_dtype

    module = model.module
    before = next(module.parameters()).dtype
    module.half()
    set_dtype(module.config, next(module.parameters()).dtype)
    try:
        save(model, out)
        total: int = sum(p.numel() * p.element_size() for p in module.parameters())
        return total
    finally:
        module.to(before)
        set_dtype(module.config, before)


def write_adapter(
    form: str, model: Model, factors: Mapping[str, tuple[Tensor, Tensor]], staged: Path
) -> Path:
    """Write low-rank factors beside a model that lies at ``staged``: a GGUF LoRA next to a GGUF,
    a PEFT folder inside a folder. Returns its path."""
    from joulesmith.export import lora

    if form == GGUF:
        path = staged.with_suffix(ADAPTER_SUFFIX)
        lora.write_gguf_lora(model, factors, path)
        return path
    lora.write_peft(model, factors, staged / "adapter")
    return staged / "adapter"


ADAPTER_SUFFIX = ".lora.gguf"
