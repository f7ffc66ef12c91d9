"""Torch modules whose weights stay packed, and a model's linears swapped for them.

The matrices keep the bits that their type stores (see `packed_store`); norms, biases and
what was not given stay as they are. A model so changed runs as before, through its own
``forward`` and ``generate``, for inference only. Knows no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from joulesmith.compress.quantize.grids import Bytes, grid
from joulesmith.engines.packed_store import Prefer, Store, from_bytes
from joulesmith.errors import JoulesmithError

if TYPE_CHECKING:
    from joulesmith.models import Model


class PackedLinear(nn.Module):
    """``x @ weight.T + bias`` with the weight in a `Store`. x: (..., in_features)."""

    def __init__(self, store: Store, bias: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = store.columns, store.rows
        self.store = store
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """-> (..., out_features), in x's dtype. Raises `JoulesmithError` where a gradient
        would have to pass."""
        if x.requires_grad and torch.is_grad_enabled():
            raise JoulesmithError("packed weights carry no gradients: run under torch.no_grad()")
        out = self.store.product(x.reshape(-1, self.in_features))
        if self.bias is not None:
            out = out + self.bias
        return out.view(*x.shape[:-1], self.out_features)


class PackedEmbedding(nn.Module):
    """Rows of a `Store` by index; a tied head may share the store."""

    like: Tensor

    def __init__(self, store: Store, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = store.rows, store.columns
        self.store = store
        # holds nothing: it carries the dtype, which module.to(dtype) may change
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids of any shape, whole numbers below num_embeddings -> (..., embedding_dim)."""
        flat = ids.reshape(-1)
        if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < self.num_embeddings:
            raise IndexError(f"an index is outside the {self.num_embeddings} rows")
        found = self.store.decode(flat).to(self.like.dtype)
        return found.view(*ids.shape, self.embedding_dim)


def pack_module(
    module: nn.Module,
    matrices: Mapping[str, tuple[str, Bytes]],
    *,
    prefer: Prefer = "bytes",
) -> None:
    """Swap linears and embeddings of ``module`` for packed ones, in place.

    matrices: dotted name of a weight -> (type name, packed rows in torch's order); read one
    at a time, so that a mapping may load them as asked. A head tied to an embedding shares
    the embedding's packed matrix, unless it is given one of its own. The kernel is
    chosen for the dtype that each weight had (`packed_store.Prefer`). Parameters that stay
    stop asking for gradients. The float weights are freed where nobody else holds them.
    Raises `JoulesmithError` for a name that is no such weight, or rows that do not fit it;
    what came before in the mapping is packed by then.
    """
    for name in matrices:
        owner = _owner(module, name)
        kind, packed = matrices[name]
        shape = tuple(owner.weight.shape)
        if len(packed) != shape[0]:
            raise JoulesmithError(f"{name} has {shape[0]} rows, not {len(packed)}")
        store = from_bytes(grid(kind), packed, shape[1], owner.weight.dtype, prefer)
        store.to(owner.weight.device)
        shared = sharing(module, owner.weight) if isinstance(owner, nn.Embedding) else []
        for other in {name, *shared}:
            if other == name or other not in matrices:
                swap(module, other, store)
    for parameter in module.parameters():
        parameter.requires_grad_(False)


def pack_model(
    model: Model, packed: Mapping[str, tuple[str, Bytes]], *, prefer: Prefer = "bytes"
) -> None:
    """`pack_module` for matrices under their GGUF names, with rows in GGUF's order.

    "output.weight" of a tied model gives its head a matrix of its own. The packed tensors
    are gone from ``model.tensors`` afterwards.
    """
    given = {_parameter_of(model, name): name for name in packed}
    pack_module(model.module, _Reordered(model, packed, given), prefer=prefer)
    for name in packed:
        model.tensors.pop(name, None)


class _Reordered(Mapping[str, tuple[str, Bytes]]):
    """GGUF's packed rows as torch's, one matrix at a time."""

    def __init__(
        self, model: Model, packed: Mapping[str, tuple[str, Bytes]], given: Mapping[str, str]
    ) -> None:
        self._packed, self._given = packed, given
        self._rows = {name: model.ref(name).rows for name in packed}

    def __getitem__(self, parameter: str) -> tuple[str, Bytes]:
        name = self._given[parameter]
        kind, rows = self._packed[name]
        order = self._rows[name]
        return kind, rows if order is None else rows[np.argsort(order)]

    def __iter__(self) -> Any:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)


def _parameter_of(model: Model, name: str) -> str:
    if name == "output.weight" and model.tied:
        return "lm_head.weight"
    return model.ref(name).parameter


def swap(module: nn.Module, name: str, store: Store) -> None:
    """Put a packed module in the place of the linear or embedding whose weight is ``name``.

    Raises `JoulesmithError` when it is neither, or of another shape.
    """
    owner = _owner(module, name)
    if tuple(owner.weight.shape) != (store.rows, store.columns):
        raise JoulesmithError(
            f"{name} has shape {tuple(owner.weight.shape)}, not {(store.rows, store.columns)}"
        )
    new: nn.Module = (
        PackedEmbedding(store, owner.weight.dtype)
        if isinstance(owner, nn.Embedding)
        else PackedLinear(store, owner.bias)
    )
    parent, _, leaf = name.removesuffix(".weight").rpartition(".")
    setattr(module.get_submodule(parent), leaf, new.train(owner.training))


def _owner(module: nn.Module, name: str) -> Any:
    base, _, leaf = name.rpartition(".")
    try:
        owner = module.get_submodule(base)
    except AttributeError:
        owner = None
    # a subclass may use its weight in another way
    if leaf != "weight" or type(owner) not in (nn.Linear, nn.Embedding) or not base:
        raise JoulesmithError(f"{name} is no weight of a linear layer or embedding here")
    return owner


def sharing(module: nn.Module, weight: Tensor) -> list[str]:
    """Names of the linears' and embeddings' weights that are this very tensor."""
    return [
        f"{prefix}.weight"
        for prefix, part in module.named_modules()
        if type(part) in (nn.Linear, nn.Embedding) and part.weight is weight
    ]


def resident_bytes(module: nn.Module) -> int:
    """Bytes that a module's parameters and buffers hold in memory, shared ones once."""
    storages = {}
    for tensor in (*module.parameters(), *module.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes() if tensor.device.type != "meta" else 0
    return sum(storages.values())
