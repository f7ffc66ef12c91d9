"""Cut a model's layers in the order in which text passes them, fitted as inputs change.

Two streams of hidden states go through the blocks, those of the dense model and those of
the model as it is by now; they wait on disk between blocks. In memory there are one block
twice and the activations of one batch. Knows models; not how ranks are chosen.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from joulesmith.calibrate import enter, first
from joulesmith.compress.lowrank.factors import pivot, plain
from joulesmith.compress.lowrank.refit import Cross, refit
from joulesmith.compress.lowrank.thin import place
from joulesmith.progress import Tick, silent

if TYPE_CHECKING:
    from joulesmith.compress.lowrank.walk import Survey
    from joulesmith.models import Model

BATCH = 4


def replace_refitted(
    model: Model,
    found: Survey,
    ranks: Mapping[str, int],
    kept: Mapping[str, bool],
    windows: NDArray[np.int32],
    scratch: Path,
    *,
    pivoted: bool = True,
    progress: Tick = silent,
) -> None:
    """Put factors in place of every layer in ``kept`` (name -> as two layers), in place.

    found: of this model, still dense. ranks: of the layers in ``kept``, below full.
    windows: int32 (n, length). scratch: an existing folder, for twice the hidden states of
    all windows. Errors: those of `calibrate`, which ``found`` went through already.
    """
    inner = model.module.model
    tokens = torch.from_numpy(np.ascontiguousarray(windows)).long()
    streams = _Streams(scratch)
    calls: dict[int, dict[str, Any]] = {}
    starts = range(0, len(tokens), BATCH)
    with torch.no_grad():
        for b, start in enumerate(starts):
            hidden, kwargs = enter(inner, inner.layers[0], tokens[start : start + BATCH])
            calls.setdefault(hidden.shape[0], kwargs)
            streams.put("dense", b, hidden)
            streams.put("thin", b, hidden)
        prefix = next(n for n, m in model.module.named_modules() if m is inner.layers)
        for i, layer in enumerate(inner.layers):
            own = f"{prefix}.{i}."
            names = [n.removeprefix(own) for n in kept if n.startswith(own)]
            before = copy.deepcopy(layer)
            for group in _groups(before, names, streams.get("dense", 0), calls):
                sums = Cross(before.get_submodule(group[0]).weight.shape[1])
                for b in range(len(starts)):
                    x = _input(before, group[0], streams.get("dense", b), calls)
                    sums.add(x, _input(layer, group[0], streams.get("thin", b), calls))
                gram, cross = sums.gram / sums.tokens, sums.cross / sums.tokens
                for name in group:
                    whole = own + name
                    weight = before.get_submodule(name).weight
                    cut = refit(weight, gram, cross, found.outputs(whole)).cut(ranks[whole])
                    form = pivot if pivoted and kept[whole] else plain
                    place(layer, name, form(*cut), keep=kept[whole])
            for b in range(len(starts)):
                for stream, block in (("dense", before), ("thin", layer)):
                    x = streams.get(stream, b)
                    streams.put(stream, b, first(block(x, **calls[x.shape[0]])))
            progress((i + 1) / len(inner.layers))


class _ReachedError(Exception):
    """Ends a block's forward pass at the layer whose input is wanted."""


def _input(block: nn.Module, name: str, hidden: Tensor, calls: Mapping[int, Any]) -> Tensor:
    """(tokens, columns) at that linear layer of the block."""
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args[0].detach())
        raise _ReachedError

    handle = block.get_submodule(name).register_forward_pre_hook(catch)
    try:
        block(hidden, **calls[hidden.shape[0]])
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return caught[0].flatten(0, -2)


def _groups(
    block: nn.Module, names: Sequence[str], hidden: Tensor, calls: Mapping[int, Any]
) -> list[list[str]]:
    """The layers in order of use, those that read the same tensor together."""
    seen: list[tuple[str, Tensor]] = []
    handles = []
    for name in names:

        def note(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            seen.append((name, args[0]))

        handles.append(block.get_submodule(name).register_forward_pre_hook(note))
    try:
        block(hidden, **calls[hidden.shape[0]])
    finally:
        for handle in handles:
            handle.remove()
    groups: list[tuple[Tensor, list[str]]] = []
    for name, x in seen:
        if groups and groups[-1][0] is x:
            groups[-1][1].append(name)
        else:
            groups.append((x, [name]))
    return [names for _, names in groups]


class _Streams:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, stream: str, batch: int, x: Tensor) -> None:
        from joulesmith.compress.lowrank.walk import write_array

        write_array(self.folder / f"{stream}.{batch}.npy", x)

    def get(self, stream: str, batch: int) -> Tensor:
        return torch.from_numpy(np.load(self.folder / f"{stream}.{batch}.npy", allow_pickle=False))
