"""Fills a transformers decoder one tensor at a time, from safetensors or GGUF.

The module is made without storage, every shape is checked against the file's
header, and only then memory is taken: the peak is the float model and one tensor.
Knows no tokenizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from joulesmith.architectures import TensorRef, tensor_refs
from joulesmith.errors import JoulesmithError, MissingExtraError
from joulesmith.formats.safetensors_file import read_safetensors, shards
from joulesmith.gguf_file import GgufFile

if TYPE_CHECKING:
    import torch

_AGAIN = "download or convert the model again"
_NO_WEIGHT = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")


class Shelf(Protocol):
    """Where tensors lie: shapes known beforehand, one read at a time (torch layout)."""

    def shape(self, ref: TensorRef) -> tuple[int, ...] | None: ...
    def read(self, ref: TensorRef) -> torch.Tensor: ...
    def unused(self, refs: Mapping[str, TensorRef]) -> list[str]: ...


def in_torch_order(values: NDArray[np.float32], ref: TensorRef) -> torch.Tensor:
    """A tensor as GGUF and llama2.c have it -> its rows in torch's order."""
    import torch

    if ref.rows is not None:
        torch_order = np.empty_like(values)
        torch_order[ref.rows] = values
        values = torch_order
    return torch.from_numpy(values)


class GgufShelf:
    """Tensors of a GGUF file, dequantized to float32 and in torch's row order."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file

    def shape(self, ref: TensorRef) -> tuple[int, ...] | None:
        found = self.file.by_name.get(ref.name)
        return None if found is None else found.shape

    def read(self, ref: TensorRef) -> torch.Tensor:
        values = self.file.dequantize(ref.name)
        return in_torch_order(values, ref)

    def unused(self, refs: Mapping[str, TensorRef]) -> list[str]:
        return [t.name for t in self.file.tensors if t.name not in {*refs, "rope_freqs.weight"}]


class SafetensorsShelf:
    """Tensors of open safetensors files, by torch parameter name."""

    def __init__(self, where: dict[str, Any], folder: Path) -> None:
        self.where, self.folder = where, folder

    def shape(self, ref: TensorRef) -> tuple[int, ...] | None:
        handle = self.where.get(ref.parameter)
        return None if handle is None else tuple(handle.get_slice(ref.parameter).get_shape())

    def read(self, ref: TensorRef) -> torch.Tensor:
        from safetensors import SafetensorError

        try:
            tensor: torch.Tensor = self.where[ref.parameter].get_tensor(ref.parameter)
        except (SafetensorError, OSError, RuntimeError, ValueError) as e:
            raise JoulesmithError(f"tensor {ref.parameter}: {self.folder}: {e}: {_AGAIN}") from e
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise JoulesmithError(
                f"tensor {ref.parameter} has type {tensor.dtype}: {self.folder}: "
                "give the unquantized model (float32, float16 or bfloat16)"
            )
        return tensor

    def unused(self, refs: Mapping[str, TensorRef]) -> list[str]:
        known = {r.parameter for r in refs.values()}
        if "output.weight" not in refs:
            known.add("lm_head.weight")  # some files store the tied head once more
        return [k for k in self.where if k not in known and not k.endswith(_NO_WEIGHT)]


@contextmanager
def open_safetensors(folder: Path) -> Iterator[SafetensorsShelf]:
    """Open all weights of a Hugging Face folder; headers are checked, nothing is read yet.

    Raises `JoulesmithError` when there are none, when only pickles are there, or
    when a file is damaged or absent.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as e:
        raise MissingExtraError("safetensors") from e
    files = shards(folder)
    where: dict[str, Any] = {}
    with ExitStack() as stack:
        for file in files:
            read_safetensors(file)  # the library takes a name given twice, and any header
            try:
                handle = stack.enter_context(safe_open(str(file), framework="pt"))
                names = list(handle.keys())
            except (SafetensorError, OSError, ValueError) as e:
                raise JoulesmithError(f"damaged safetensors file: {file}: {e}: {_AGAIN}") from e
            for name in names:
                if name in where:
                    raise JoulesmithError(f"tensor {name} is in two files: {folder}: {_AGAIN}")
                where[name] = handle
        yield SafetensorsShelf(where, folder)


def build(
    config: Any, shelf: Shelf, dtype: torch.dtype, where: object
) -> tuple[Any, dict[str, TensorRef]]:
    """A causal LM in eval mode with the shelf's weights as ``dtype``, and its tensor names.

    Raises `JoulesmithError` naming the tensor for one that is absent, unexpected, of
    the wrong shape, or holds NaN or infinity.
    """
    module, refs = skeleton(config, where)
    for ref in refs.values():
        check_shape(ref, shelf.shape(ref), where)
    refuse_unexpected(shelf.unused(refs), where)
    fill(module, refs, shelf.read, dtype, where)
    return finish(module, dtype), refs


def skeleton(config: Any, where: object) -> tuple[Any, dict[str, TensorRef]]:
    """A causal LM without storage, and the names of the tensors it needs.

    Raises `JoulesmithError` when transformers refuses the config.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except Exception as e:  # any of transformers' many refusals of a strange config
        line = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise JoulesmithError(f"impossible hyperparameters: {where}: {line}") from e
    module.tie_weights()
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return module, tensor_refs(shapes, config)


def check_shape(ref: TensorRef, found: tuple[int, ...] | None, where: object) -> None:
    """Raise `JoulesmithError` unless ``found``, the file's shape, is what the model needs."""
    if found != ref.shape:
        what = "is missing" if found is None else f"has shape {found}, not {ref.shape}"
        raise JoulesmithError(f"tensor {ref.name} ({ref.parameter}) {what}: {where}: {_AGAIN}")


def refuse_unexpected(extra: list[str], where: object) -> None:
    """Raise `JoulesmithError` when a file holds tensors that the model does not have."""
    if extra:
        raise JoulesmithError(
            f"unexpected tensor {extra[0][:80]!r} (and {len(extra) - 1} more): {where}: "
            "the model is of another kind than its header says"
        )


def finish(module: Any, dtype: torch.dtype) -> Any:
    """A filled skeleton made ready: head tied, buffers made, eval mode."""
    config = module.config
    # packed modules share their store, and have no weight
    if config.tie_word_embeddings and hasattr(module.model.embed_tokens, "weight"):
        module.lm_head.weight = module.model.embed_tokens.weight
    # The one buffer: made on "meta" above, so made again with storage.
    module.model.rotary_emb = type(module.model.rotary_emb)(config=config)
    set_dtype(config, dtype)
    return module.eval()


def fill(
    module: Any,
    refs: Mapping[str, TensorRef],
    read: Callable[[TensorRef], torch.Tensor],
    dtype: torch.dtype,
    where: object,
) -> None:
    """Read these tensors into a skeleton. Raises `JoulesmithError` for NaN or infinity."""
    import torch

    for ref in refs.values():
        given = read(ref)
        if not _finite(given):
            raise JoulesmithError(
                f"tensor {ref.name} ({ref.parameter}) holds NaN or infinity: {where}: {_AGAIN}"
            )
        owner_name, _, leaf = ref.parameter.rpartition(".")
        owner = module.get_submodule(owner_name)
        value = given.to(dtype=dtype, copy=given.dtype == dtype and not _owned(given))
        setattr(owner, leaf, torch.nn.Parameter(value))


def _finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite, without a mask or a copy of the tensor's size."""
    import torch

    # A sum is finite unless an element is not (or the sum itself overflows): one cheap pass,
    # and a full look only then. In parts, since a CPU casts all that it sums.
    return all(
        bool(torch.isfinite(part.sum(dtype=torch.float64))) or bool(torch.isfinite(part).all())
        for part in torch.split(tensor.reshape(-1), 1 << 20)
    )


def _owned(tensor: torch.Tensor) -> bool:
    """Whether its storage holds only this tensor: a view would keep a whole file alive."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def set_dtype(config: Any, dtype: torch.dtype) -> None:
    """Record the weights' dtype where this version of transformers keeps it."""
    try:
        config.dtype = dtype
    except AttributeError:
        config.torch_dtype = dtype
