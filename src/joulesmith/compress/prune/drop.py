"""Which whole layers to drop: block influence, and the damage of each dropped in turn.

A layer that is dropped can not be made up for exactly: what it wrote into the residual stream
was a function of that stream, and a plain decoder has no place for a linear map of it. What can be
folded is a least-squares fit of the layers that do write, the output and down projections
before the gap, to the stream behind it: `aligned` does that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from joulesmith.errors import JoulesmithError


@dataclass(frozen=True)
class Drops:
    """order: layers in the order of going. damage: of the model without the first k + 1 of them
    (nats of KL per token), or the layer's own score where that is the rule."""

    order: tuple[int, ...]
    damage: tuple[float, ...]


def block_influence(before: Tensor, after: Tensor) -> float:
    """1 - mean cosine of a block's input and output, (tokens, hidden) each: ShortGPT (Men et al.
    2024, eq. 1). Raises `JoulesmithError` for shapes that differ and tokens of no length."""
    if before.shape != after.shape or before.ndim != 2 or not len(before):
        raise JoulesmithError(f"streams of {tuple(before.shape)} and {tuple(after.shape)}")
    x, y = before.double(), after.double()
    length = x.norm(dim=1) * y.norm(dim=1)
    if not bool((length > 0).all()):
        raise JoulesmithError("a hidden state is 0: its direction is not known")
    return float(1 - ((x * y).sum(dim=1) / length).mean())


def by_score(scores: Sequence[float], count: int) -> Drops:
    """The ``count`` lowest, lowest first; of equal ones the later layer."""
    check_count(len(scores), count)
    order = sorted(range(len(scores)), key=lambda i: (scores[i], -i))[:count]
    return Drops(tuple(order), tuple(float(scores[i]) for i in order))


def by_damage(
    layers: int,
    count: int,
    damages: Callable[[frozenset[int], Sequence[int]], Sequence[float]],
    patience: int = 3,
) -> Drops:
    """Greedy: each time the layer whose absence, with those gone before, does least damage.

    damages: (gone, candidates) -> damage of the model without ``gone`` and each candidate. All
    are measured at first; later those that seemed best by the measurement before, ``patience``
    more of them than it takes to find one that is no worse than the rest seemed (damages
    grow as layers go, so that older figures are too low rather than too high).
    """
    check_count(layers, count)
    gone: list[int] = []
    found: list[float] = []
    seen: dict[int, float] = {}
    while len(gone) < count:
        left = [i for i in range(layers) if i not in gone]
        fresh: dict[int, float] = {}
        queue = sorted(left, key=lambda i: seen.get(i, 0.0))
        size = len(left) if not seen else patience
        while queue:
            part, queue = sorted(queue[:size]), queue[size:]
            fresh |= dict(zip(part, damages(frozenset(gone), part), strict=True))
            base = found[-1] if found else 0.0
            older = seen[queue[0]] + base if queue else float("inf")
            if min(fresh.values()) <= older:
                break
        best = min(fresh, key=lambda i: (fresh[i], -i))
        base = found[-1] if found else 0.0
        seen |= {i: d - base for i, d in fresh.items()}
        seen.pop(best)
        gone.append(best)
        found.append(fresh[best])
    return Drops(tuple(gone), tuple(found))


def check_count(layers: int, count: int) -> None:
    """Raises `JoulesmithError` unless that many can go and one is left."""
    if not 0 <= count < layers:
        raise JoulesmithError(f"of {layers} layers, {count} cannot be dropped: one must be left")


def influence_of(states: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """`block_influence` over batches (n, length, hidden)."""
    return block_influence(
        torch.cat([s.flatten(0, 1) for s in states]), torch.cat([s.flatten(0, 1) for s in after])
    )
