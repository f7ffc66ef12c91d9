"""Which shape a model of a given size should have: layers against neurons against heads.

For every number of layers and heads there is one number of neurons that just meets the budget.
These shapes are tried out: drawn up, repaired and judged on held-out windows, so that kinds
of parts are weighed by the damage that they do and not by scores that cannot be compared. The
search climbs from three depths. A budget is of parameters or of anything else that grows with a
shape, evenly in its neurons. Knows numbers; how a shape is tried is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from joulesmith.compress.prune.shrink import Shape
from joulesmith.errors import JoulesmithError

LEAST = 4
"""An MLP keeps a fourth of its neurons at the least, attention half of its heads."""


@dataclass(frozen=True)
class Trial:
    """One shape that was tried. damage: nats of KL per token on the held-out windows."""

    shape: Shape
    parameters: int
    read: int
    damage: float


def neurons_for(
    shape: Shape, budget: float, cost: Callable[[Shape], float], multiple: int
) -> Shape | None:
    """The shape with the most neurons, up to its own number, that meets the budget; None where
    none with a fourth of them does."""
    if cost(shape) <= budget:
        return shape
    one = cost(replace(shape, neurons=multiple))
    each = cost(replace(shape, neurons=2 * multiple)) - one
    most = 0 if each <= 0 else int((budget - one) // each + 1) * multiple
    if most < multiple or most * LEAST < shape.neurons or most >= shape.neurons:
        return None
    return replace(shape, neurons=most)


def smallest(shape: Shape, cost: Callable[[Shape], float], multiple: int) -> float:
    """What the smallest shape that is considered costs."""
    least = -(-shape.neurons // LEAST // multiple) * multiple or multiple
    kv = -(-shape.kv // 2)
    return cost(replace(shape, layers=1, neurons=min(least, shape.neurons), kv=kv))


def search(
    shape: Shape,
    budget: float,
    cost: Callable[[Shape], float],
    attempt: Callable[[Shape], float],
    *,
    multiple: int,
    trials: int,
    read: Callable[[Shape], int],
    parameters: Callable[[Shape], int],
    deepest: int,
    unit: str = "parameters",
    allowed: Callable[[Shape], bool] = lambda _: True,
) -> list[Trial]:
    """Shapes tried, best first.

    shape: the model's. budget: the most that ``cost`` may be, told in ``unit``. attempt: shape ->
    damage. trials: at most so many. deepest: most layers that may go. allowed: whether a shape can
    be stored.
    Raises `JoulesmithError` where no shape meets the budget.
    """
    done: dict[Shape, Trial] = {}

    def of(gone: int, kv: int, queries: int) -> Shape | None:
        if not 0 <= gone <= deepest or queries < 1 or kv * queries * 2 < shape.kv * shape.queries:
            return None
        cut = replace(shape, layers=shape.layers - gone, kv=kv, queries=queries)
        if kv < 1 or not allowed(cut):
            return None
        return neurons_for(cut, budget, cost, multiple)

    def visit(gone: int, kv: int, queries: int) -> float:
        found = of(gone, kv, queries)
        if found is None:
            return float("inf")
        if found not in done:
            if len(done) >= trials:
                return float("inf")
            done[found] = Trial(found, parameters(found), read(found), attempt(found))
        return done[found].damage

    full = [g for g in range(deepest + 1) if of(g, shape.kv, shape.queries) is not None]
    # beyond the first depth that needs no cut in neurons, a model is only smaller
    whole = [g for g in full if of(g, shape.kv, shape.queries).neurons == shape.neurons]  # type: ignore[union-attr]
    full = [g for g in full if not whole or g <= whole[0]]
    if not full:
        least = smallest(replace(shape, layers=shape.layers - deepest + 1), cost, multiple)
        raise JoulesmithError(
            f"{budget:.6g} {unit} cannot be reached: the smallest shape considered has some "
            f"{least:.6g}"
        )
    at = [full[0], full[len(full) // 2], full[-1]]
    here = (min(sorted(set(at)), key=lambda g: visit(g, *_full(shape))), *_full(shape))
    step = max(1, (full[-1] - full[0]) // 4)
    while True:
        gone, kv, queries = here
        moves = [(gone - step, kv, queries), (gone + step, kv, queries)]
        if step == 1:
            moves += [(gone, kv - 1, queries), (gone, kv, queries - 1)]
            moves += [(gone - 1, kv - 1, queries), (gone - 1, kv, queries - 1)]
        best = min(moves, key=lambda m: visit(*m))
        if visit(*best) < visit(*here):
            here = best
        elif step > 1:
            step //= 2
        else:
            return sorted(done.values(), key=lambda t: (t.damage, t.parameters))


def _full(shape: Shape) -> tuple[int, int]:
    return shape.kv, shape.queries
