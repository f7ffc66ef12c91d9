"""The linear layers of any torch module, whatever class holds them, and the blocks they lie in.

`torch.nn.Linear`, GPT-2's `Conv1D` (weights transposed) and the experts that newer versions of
transformers keep in one three-dimensional parameter all become a `Linear`: a matrix (outputs,
inputs) that may be read and written. Knows no models by name.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from joulesmith.errors import JoulesmithError


@dataclass(frozen=True)
class Linear:
    """One matrix of a module.

    name: of the module, and for one of several fused experts its parameter and number
    ("mlp.experts.down_proj.3"). owner: the module that holds it. parameter: the name in it.
    transposed: stored as (inputs, outputs). expert: which of the first axis.
    """

    name: str
    owner: nn.Module
    parameter: str
    transposed: bool = False
    expert: int | None = None

    @property
    def stored(self) -> nn.Parameter:
        """The parameter as it is."""
        found = getattr(self.owner, self.parameter)
        assert isinstance(found, nn.Parameter)
        return found

    @property
    def matrix(self) -> Tensor:
        """(outputs, inputs), sharing memory with the parameter."""
        found = self.stored.detach()
        if self.expert is not None:
            found = found[self.expert]
        return found.T if self.transposed else found

    @property
    def bias(self) -> nn.Parameter | None:
        """(outputs,), where there is one that belongs to this matrix alone."""
        found = getattr(self.owner, "bias", None) if self.expert is None else None
        return found if isinstance(found, nn.Parameter) else None

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        rows, columns = self.matrix.shape
        return rows, columns

    def write(self, weight: Tensor) -> None:
        """Put ``weight`` (outputs, inputs) in place of what is there."""
        with torch.no_grad():
            self.matrix.copy_(weight)


def linears_of(module: nn.Module, prefix: str = "") -> dict[str, Linear]:
    """Name -> `Linear`, in the module's order; a matrix that two names share is given once.

    Embeddings are none, and neither is a head that shares its matrix with one.
    """
    embedded = {
        id(p)
        for m in module.modules()
        if isinstance(m, nn.Embedding)
        for p in m.parameters(recurse=False)
    }
    found: dict[str, Linear] = {}
    seen = set(embedded)
    for path, m in module.named_modules():
        name = ".".join(p for p in (prefix, path) if p)
        for new in _held(m, name):
            if id(new.stored) not in seen or new.expert:  # an expert's number: 1, 2 ... of one
                seen.add(id(new.stored))
                found[new.name] = new
    return found


def _held(m: nn.Module, name: str) -> Iterator[Linear]:
    if isinstance(m, nn.Linear) and _is_matrix(m):
        yield Linear(name, m, "weight")
    elif type(m).__name__ == "Conv1D" and _is_matrix(m):
        yield Linear(name, m, "weight", transposed=True)
    else:
        for parameter, p in m.named_parameters(recurse=False):
            if p.ndim == 3 and "expert" in f"{name} {type(m).__name__}".lower():
                # Kept (experts, inputs, outputs) by some models, which say so.
                turned = bool(getattr(m, "is_transposed", False))
                for i in range(p.shape[0]):
                    yield Linear(f"{name}.{parameter}.{i}", m, parameter, turned, i)


def _is_matrix(m: nn.Module) -> bool:
    weight = getattr(m, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 2


def blocks_of(module: nn.Module) -> dict[str, nn.Module]:
    """Name -> block, in the order in which data passes them; empty where there are none.

    The longest list of modules of one class with linear layers in each ("model.layers",
    "transformer.h", "encoder.layer"); the children of a `torch.nn.Sequential`.
    """
    if isinstance(module, nn.Sequential):
        return dict(module.named_children())
    best: dict[str, nn.Module] = {}
    for path, m in module.named_modules():
        if not isinstance(m, nn.ModuleList) or _inside(path, best):
            continue
        children = {f"{path}.{n}" if path else n: c for n, c in m.named_children()}
        alike = len({type(c) for c in children.values()}) == 1
        if alike and len(children) > len(best) and all(linears_of(c) for c in children.values()):
            best = children
    return best


def _inside(path: str, blocks: dict[str, nn.Module]) -> bool:
    return any(path.startswith(f"{name}.") for name in blocks)


class Undo:
    """Weights as they were, on disk, until all went well: an error inside the context puts
    them back. scratch: folder for them."""

    def __init__(self, scratch: Path | None = None) -> None:
        self._place = scratch
        self._kept: list[Linear] = []

    def __enter__(self) -> Undo:
        self._folder = tempfile.TemporaryDirectory(prefix="undo-", dir=self._place)
        return self

    def keep(self, layer: Linear) -> None:
        """Call before a layer changes. Raises `JoulesmithError` where the disk is full."""
        bias = layer.bias
        kept = layer.matrix.clone(), None if bias is None else bias.detach().clone()
        try:
            torch.save(kept, Path(self._folder.name) / f"{len(self._kept)}.pt")
        except (OSError, RuntimeError) as e:
            raise JoulesmithError(
                f"cannot keep weights in {self._folder.name}: {e}; free some space"
            ) from e
        self._kept.append(layer)

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is not None:
            for i, layer in reversed(list(enumerate(self._kept))):
                matrix, bias = torch.load(Path(self._folder.name) / f"{i}.pt", weights_only=True)
                layer.write(matrix)
                if layer.bias is not None:
                    with torch.no_grad():
                        layer.bias.copy_(bias)
        self._folder.cleanup()


def check_weights(layers: dict[str, Linear]) -> None:
    """Raises `JoulesmithError` naming the first layer that holds NaN or infinity."""
    for name, layer in layers.items():
        if not bool(torch.isfinite(layer.matrix).all()):
            raise JoulesmithError(f"{name} holds NaN or infinity: download or train it again")


def select(layers: dict[str, Linear], patterns: tuple[str, ...], what: str) -> set[str]:
    """Names that match any of the patterns (``*`` stands for anything).

    Raises `JoulesmithError` for a pattern that matches none. what: the setting's name.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        rule = re.compile(".*".join(re.escape(p) for p in pattern.split("*")))
        hits = {n for n in layers if rule.fullmatch(n)}
        if not hits:
            names = ", ".join(list(layers)[:3])
            raise JoulesmithError(
                f"{what}: no linear layer is called {pattern!r}: there are {names} ..."
            )
        chosen |= hits
    return chosen
