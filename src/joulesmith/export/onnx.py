"""Writes an ONNX folder whose packed weights are the codes that were chosen.

The graph comes from PyTorch's own exporter (``torch.onnx``, dynamo), with the key/value
cache as inputs and outputs, named as optimum and ONNX Runtime name them. A quantized
matrix is a ``com.microsoft.MatMulNBits`` node over our codes, scales and zeros: nothing is
rounded again. All else is stored as float16 and computed in float32, as engines on CPUs
do. Knows no calibration and no search.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from joulesmith._version import __version__
from joulesmith.atomic import atomic_folder
from joulesmith.compress.quantize.grids import Bytes, grid
from joulesmith.compress.quantize.integers import IntGrid, pack_codes
from joulesmith.errors import JoulesmithError, MissingExtraError
from joulesmith.models import cache_word

if TYPE_CHECKING:
    from joulesmith.models import Model

ENGINE_BITS = (4, 8)
"""Widths of MatMulNBits that ONNX Runtime and OpenVINO both run."""
LEAST_GROUP = 16
MODEL, DATA = "model.onnx", "model.onnx.data"
_OPSET = 18
_SMALL = 256
"""Elements up to which a float stays as it is: norms' epsilons, scalars, rotary tables."""


def export_onnx(
    model: Model,
    packed: Mapping[str, tuple[str, Bytes]],
    folder: str | os.PathLike[str],
) -> int:
    """Write ``model`` with these matrices packed; returns the bytes of the weights.

    packed: as `compressed_tensors.write_compressed`: GGUF name -> (name of an `IntGrid`,
    packed rows in GGUF's order), of matrices inside decoder blocks and of a head that is
    not the embedding; may be empty.
    folder: absent or empty; complete or not at all. Raises `JoulesmithError`, before
    anything is written, for a matrix or type that engines cannot load, scales that are not
    finite, and weights beyond float16; `MissingExtraError` without the extra ``[onnx]``.
    """
    from joulesmith.models import write_tokenizer_of

    packages()
    layers = packed_layers(model, packed)
    size = sum(p.numel() * 2 for p in model.module.parameters()) + (1 << 24)
    with atomic_folder(folder, needed=size) as temp:
        written = write_graph(model, layers, temp)
        write_config(model, temp)
        write_tokenizer_of(model, temp)
    return written


def packed_layers(model: Model, packed: Mapping[str, tuple[str, Bytes]]) -> dict[str, NBits]:
    """Parameter name -> the packed module that stands in for its linear layer.

    Checks all that the format asks for, of these matrices and of the other weights.
    """
    names = {model.ref(n).parameter: n for n in packed}
    for name, parameter in model.module.named_parameters():
        if parameter.dtype != torch.float32:
            raise JoulesmithError(f"{name} is {parameter.dtype}: load the model as float32")
        if name not in names and not bool(torch.isfinite(parameter.to(torch.float16)).all()):
            raise JoulesmithError(f"{name} is beyond float16, which this format is written in")
    out = {}
    for name, (kind, rows) in packed.items():
        ref, g = model.ref(name), loadable(kind)
        if g is None:
            raise JoulesmithError(
                f"{name} is {kind}: ONNX Runtime and OpenVINO load integers of 4 and 8 bits in "
                f"groups of a power of two from {LEAST_GROUP} up (INT4-G32, INT8-G128-ZP ...)"
            )
        if ref.role == "token_embd":
            raise JoulesmithError(f"{name} is the embedding: engines keep it in float16")
        owner = model.module.get_submodule(ref.parameter.removesuffix(".weight"))
        if not isinstance(owner, nn.Linear):
            raise JoulesmithError(f"{name} is no linear layer: it cannot be packed in ONNX")
        codes, lattice = g.read(rows, ref.shape[1])
        if not bool(torch.isfinite(lattice.step).all()):
            raise JoulesmithError(f"{name} has scales that are NaN or infinite: round it again")
        order = np.argsort(ref.rows) if ref.rows is not None else np.arange(ref.shape[0])
        zero = None if g.symmetric else lattice.stored[1][order]
        out[ref.parameter] = NBits(g, codes.numpy()[order], lattice.step[order], zero, owner.bias)
    return out


def loadable(kind: str) -> IntGrid | None:
    """The grid of that name where engines have kernels for it, else None."""
    g = grid(kind)
    if not isinstance(g, IntGrid) or g.bits not in ENGINE_BITS:
        return None
    return g if g.group >= LEAST_GROUP and g.group & (g.group - 1) == 0 else None


class NBits(nn.Module):
    """``y = x W^T + bias`` with W as codes: (rows, groups, bytes) uint8, float16 scales
    (rows, groups), and zeros packed along the groups where the grid has them.

    Layout: onnxruntime's docs/ContribOperators.md, MatMulNBits: codes from the low bits
    up, (code - zero) * scale, zero 2^(bits-1) unless given. Only to be exported.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(
        self,
        g: IntGrid,
        codes: np.ndarray[Any, Any],
        step: Tensor,
        zero: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        super().__init__()
        self.rows, self.columns = codes.shape
        self.bits, self.group = g.bits, g.group
        blocks = codes.reshape(self.rows, -1, g.group)
        raw = np.ascontiguousarray(pack_codes(blocks, g.bits))
        self.register_buffer("codes", torch.from_numpy(raw))
        self.register_buffer("scales", step.to(torch.float16).contiguous())
        packed = None
        if zero is not None:
            whole = np.ascontiguousarray(zero.numpy().astype(np.uint8))
            packed = torch.from_numpy(np.ascontiguousarray(pack_codes(whole, g.bits)))
        self.register_buffer("zeros", packed)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        inputs: list[Tensor | None] = [x, self.codes, self.scales.to(torch.float32)]
        if self.zeros is not None:
            inputs.append(self.zeros)
        out: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            inputs,
            {"K": self.columns, "N": self.rows, "bits": self.bits, "block_size": self.group},
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.rows),
            version=1,
        )
        return out if self.bias is None else out + self.bias


class _WithCache(nn.Module):
    """The model with its cache as plain tensors: keys and values of each layer in turn."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.word = module, cache_word(module)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.module.config)
        for i in range(len(past) // 2):
            cache.update(past[2 * i], past[2 * i + 1], i)
        out = self.module(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{self.word: cache},
        )
        flat = [t for layer in getattr(out, self.word).layers for t in (layer.keys, layer.values)]
        return out.logits, *flat


def write_graph(model: Model, layers: Mapping[str, NBits], folder: Path) -> int:
    """Export into ``folder`` as model.onnx and its data; returns the data's bytes."""
    onnx_ir = packages()
    inputs, settings = _example(model)
    try:
        with _standing_in(model.module, layers), _quiet():
            program = torch.onnx.export(
                _WithCache(model.module).eval(),
                inputs,
                dynamo=True,
                opset_version=_OPSET,
                optimize=False,  # it would fold weights and scales back to float32
                verbose=False,
                **settings,
            )
    except torch.onnx.errors.OnnxExporterError as e:
        cause = e.__cause__ or e
        line = (str(cause).strip().splitlines() or [type(cause).__name__])[0][:200]
        raise JoulesmithError(f"PyTorch cannot export {model.name} to ONNX: {line}") from e
    assert program is not None
    ir = program.model
    _tidy(ir, onnx_ir)
    ir.metadata_props["joulesmith.version"] = __version__
    ir.producer_name, ir.producer_version = "joulesmith", __version__
    ir.graph.name = model.name
    onnx_ir.save(ir, folder / MODEL, external_data=DATA, size_threshold_bytes=_SMALL)
    return (folder / DATA).stat().st_size


def _example(model: Model) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Inputs to trace with (two requests, a cache of three tokens, five new ones), and what
    `torch.onnx.export` is told of them."""
    config = model.module.config
    layers, dynamic = config.num_hidden_layers, torch.export.Dim.DYNAMIC
    batch, past, new = 2, 3, 5
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = [torch.zeros(batch, config.num_key_value_heads, past, width) for _ in range(2 * layers)]
    ids = torch.arange(batch * new).reshape(batch, new) % config.vocab_size
    mask = torch.ones(batch, past + new, dtype=torch.int64)
    positions = torch.arange(past, past + new)[None].repeat(batch, 1)
    names = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
    both = {0: dynamic, 1: dynamic}
    settings = {
        "dynamic_shapes": (both, both, both, tuple({0: dynamic, 2: dynamic} for _ in cache)),
        "input_names": [
            "input_ids", "attention_mask", "position_ids",
            *(f"past_key_values.{n}" for n in names),
        ],
        "output_names": ["logits", *(f"present.{n}" for n in names)],
    }  # fmt: skip
    return (ids, mask, positions, *cache), settings


def _tidy(ir: Any, onnx_ir: Any) -> None:
    """Large floats as float16 with a Cast behind them; no traces of where code lay."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(ir)
    graph = ir.graph
    for node in ir.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    casts = []
    for name, value in list(graph.initializers.items()):
        value.metadata_props.clear()
        tensor = value.const_value
        if tensor.dtype != onnx_ir.DataType.FLOAT or tensor.size <= _SMALL:
            continue
        half = onnx_ir.Tensor(tensor.numpy().astype(np.float16), name=name)
        cast = onnx_ir.node("Cast", [value], {"to": onnx_ir.DataType.FLOAT})
        wide = cast.outputs[0]
        wide.name = f"{name}.float32"
        wide.dtype, wide.shape = onnx_ir.DataType.FLOAT, value.shape
        onnx_ir.convenience.replace_all_uses_with(value, wide)
        cast.replace_input_with(0, value)
        value.const_value, value.dtype = half, onnx_ir.DataType.FLOAT16
        casts.append(cast)
    if casts:
        graph.insert_before(graph[0], casts)


@contextmanager
def _standing_in(module: nn.Module, layers: Mapping[str, NBits]) -> Iterator[None]:
    """The packed modules in place of their linear layers, and these back at the end."""
    before = {}
    try:
        for parameter, packed in layers.items():
            owner, _, name = parameter.removesuffix(".weight").rpartition(".")
            parent = module.get_submodule(owner)
            before[parent, name] = getattr(parent, name)
            setattr(parent, name, packed)
        yield
    finally:
        for (parent, name), linear in before.items():
            setattr(parent, name, linear)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's notes about packages and types of its own are not for our user."""
    import logging

    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def write_config(model: Model, folder: Path) -> None:
    """config.json and generation_config.json, as engines want them beside the graph."""
    config: dict[str, Any] = model.module.config.to_dict()
    config.pop("torch_dtype", None)
    config |= {"architectures": [type(model.module).__name__], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if getattr(model.module, "generation_config", None) is not None:
        model.module.generation_config.save_pretrained(folder)


def packages() -> Any:
    """onnx_ir, once all that the exporter needs is there."""
    try:
        import onnx  # noqa: F401
        import onnx_ir
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise MissingExtraError(e.name or "onnx", "onnx") from e
    return onnx_ir
