"""What is asked of a module, and whether it can be had: settings, layers, shapes, weights.

Knows names of methods; not how they work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor, nn

from joulesmith.compress.gradients import Labels
from joulesmith.compress.layers import Linear, blocks_of, check_weights, linears_of, select
from joulesmith.compress.prune.patterns import Pattern
from joulesmith.errors import JoulesmithError

Method = Literal[
    "admm", "sparsegpt", "wanda", "magnitude", "taylor", "fisher", "movement", "update"
]
Allocation = Literal["damage", "threshold", "uniform"]
METHODS: tuple[str, ...] = get_args(Method)
SOLVERS = ("admm", "sparsegpt")
"""Methods that choose zeros and change other weights; the rest are scores."""
NO_DATA = ("magnitude", "movement", "update")
GRADIENTS = ("taylor", "fisher")
COMPARED = ("movement", "update")


@dataclass(frozen=True)
class Task:
    """One pruning. chosen: name -> layer. share: of zeros in all of them, 0 with a threshold.
    The other fields as `walk.prune_module` takes them, defaults settled."""

    module: nn.Module
    chosen: Mapping[str, Linear]
    kind: Pattern
    method: str
    allocation: str
    share: float
    threshold: float | None
    before: Mapping[str, Tensor] | None
    repair: bool
    labels: Labels
    seed: int
    scratch: Path | None


def prunable(module: nn.Module, layers: Sequence[str] = ("*",)) -> dict[str, Linear]:
    """Linear layers inside the module's blocks (all of them where it has none), by name.

    layers: names or patterns of those that are wanted. Raises `JoulesmithError` for one that
    matches nothing, and where there are none.
    """
    blocks = blocks_of(module) or {"": module}
    found = {n: x for name, b in blocks.items() for n, x in linears_of(b, name).items()}
    shared = set(linears_of(module))
    found = {n: x for n, x in found.items() if n in shared}  # not one tied to an embedding
    if not found:
        raise JoulesmithError(f"{type(module).__name__} has no linear layers to prune")
    chosen = select(found, tuple(layers), "layers")
    return {n: x for n, x in found.items() if n in chosen}


def check(
    chosen: Mapping[str, Linear],
    sparsity: float | None,
    threshold: float | None,
    kind: Pattern,
    method: str,
    allocation: str | None = None,
    repair: bool = False,
) -> float:
    """The share of zeros (0 with a threshold), from settings and shapes alone.

    Raises `JoulesmithError` as `prune_module` does for them.
    """
    for word, value, known in (
        ("method", method, METHODS), ("allocation", allocation, get_args(Allocation)),
    ):  # fmt: skip
        if value is not None and value not in known:
            raise JoulesmithError(f"unknown {word} {value[:40]!r}: give one of {', '.join(known)}")
    if kind.sparsity is not None:
        if threshold is not None or (sparsity is not None and sparsity != kind.sparsity):
            raise JoulesmithError(
                f"the pattern {kind.name} makes {kind.sparsity:.4g} of the weights zero: leave the "
                "sparsity out"
            )
        sparsity = kind.sparsity
    elif threshold is not None:
        if sparsity is not None:
            raise JoulesmithError("give a sparsity or a threshold, not both")
        if method in SOLVERS:
            raise JoulesmithError(f"{method} has no scores to hold against a threshold")
        if not 0 < threshold < math.inf:
            raise JoulesmithError(f"a threshold is above 0 and finite, not {threshold:g}")
        if allocation not in (None, "threshold"):
            raise JoulesmithError(
                f"a threshold settles how many zeros a layer gets: leave allocation {allocation} "
                "out"
            )
    elif sparsity is None:
        raise JoulesmithError("say how much shall go: a sparsity, a threshold or a pattern N:M")
    elif not 0 < sparsity < 1:
        raise JoulesmithError(
            f"a sparsity is above 0 and below 1, not {sparsity:g}: 0.5 makes half the weights zero"
        )
    if repair and method in SOLVERS:
        raise JoulesmithError(f"{method} repairs by itself: leave repair out")
    if method in SOLVERS and allocation == "threshold":
        raise JoulesmithError(f"{method} has no scores to compare layers by: allocate by damage")
    if kind.sparsity is not None and allocation not in (None, "uniform"):
        raise JoulesmithError(
            f"the pattern {kind.name} makes equally many zeros everywhere: leave allocation "
            f"{allocation} out"
        )
    for name, layer in chosen.items():
        kind.check(name, layer.shape)
    return sparsity or 0.0


def check_task_weights(
    chosen: Mapping[str, Linear],
    share: float | None,
    method: str,
    before: Mapping[str, Tensor] | None,
) -> None:
    """share: of zeros, None with a threshold. Raises `JoulesmithError`."""
    if (before is not None) != (method in COMPARED):
        raise JoulesmithError(
            f"{method} compares with the weights before training: give them"
            if before is None
            else f"{method} does not look at weights before training: leave them out"
        )
    for name, layer in chosen.items():
        if before is not None and (name not in before or before[name].shape != layer.shape):
            raise JoulesmithError(f"the weights before training have no {name} of that shape")
    check_weights(dict(chosen))
    size = sum(x.matrix.numel() for x in chosen.values())
    zeros = sum(int((x.matrix == 0).sum()) for x in chosen.values()) / size
    if share is not None and zeros > share + 1e-6:
        raise JoulesmithError(
            f"the model is pruned already: {zeros:.1%} of these weights are zero, more than the "
            f"{share:.1%} asked for"
        )
