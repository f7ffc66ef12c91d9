"""Choose one type per tensor: fewest joules with the damage within a budget.

A multiple-choice knapsack, solved exactly by HiGHS (`scipy.optimize.milp`).
Knows options with numbers on them, and no file formats.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from joulesmith.errors import JoulesmithError


@dataclass(frozen=True)
class Option:
    """One way to store one tensor.

    joules: per token of the workload. damage: corrected KL in nats per token.
    size: bytes, which breaks ties between equal joules.
    """

    type: str
    joules: float
    damage: float
    size: int


@dataclass(frozen=True)
class Choice:
    """The solver's answer. ``bound``: no plan within the budget can take fewer joules."""

    types: dict[str, str]
    joules: float
    damage: float
    bound: float


def undominated(options: Sequence[Option]) -> list[Option]:
    """Options that no other beats in joules, damage and size at once, cheapest first."""
    kept: list[Option] = []
    for o in sorted(options, key=lambda o: (o.joules, o.damage, o.size)):
        if not any(k.damage <= o.damage and k.size <= o.size for k in kept):
            kept.append(o)
    return kept


@contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS now and then leaves a line of its own debugging on standard output."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, ValueError, AttributeError):  # no standard output to keep clean
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def solve(options: Mapping[str, Sequence[Option]], budget: float, gap: float = 1e-5) -> Choice:
    """Minimise the sum of joules, with the sum of damage at most ``budget``.

    options: for each tensor its `Option`s. gap: relative optimality gap of HiGHS.
    Raises `JoulesmithError` when no choice is within the budget.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    if not options:
        raise ValueError("nothing to choose")
    names = list(options)
    table = [(i, o) for i, n in enumerate(names) for o in undominated(options[n])]
    joules = np.array([o.joules for _, o in table])
    damage = np.array([o.damage for _, o in table])
    if not (np.isfinite(joules).all() and np.isfinite(damage).all()):
        raise ValueError("joules and damage must be finite")
    # Bytes cost a millionth of the mean joule per byte: they decide ties only.
    sizes = np.array([o.size for _, o in table], dtype=np.float64)
    scale = max(float(np.abs(joules).max()), 1e-30)
    cost = joules / scale + 1e-6 * sizes / max(sizes.max(), 1.0)
    least = sum(min(o.damage for o in options[n]) for n in names)
    if least > budget:
        raise JoulesmithError(
            f"no choice of types stays within a damage of {budget:.3g}: the least is {least:.3g}"
        )
    unit = max(budget, 1e-12)
    each = coo_array(
        (np.ones(len(table)), ([i for i, _ in table], range(len(table)))),
        shape=(len(names), len(table)),
    ).tocsr()
    with _quiet():
        answer = milp(
            cost,
            integrality=np.ones(len(table)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(each, 1, 1),
                LinearConstraint(damage[None, :] / unit, -np.inf, 1.0),
            ],
            options={"mip_rel_gap": gap, "time_limit": 20.0},
        )
    if answer.x is None:
        raise JoulesmithError(f"the planner found no answer: {answer.message}")
    picked = [k for k in range(len(table)) if answer.x[k] > 0.5]
    types = {names[table[k][0]]: table[k][1].type for k in picked}
    bound = getattr(answer, "mip_dual_bound", None)
    return Choice(
        types=types,
        joules=float(joules[picked].sum()),
        damage=float(damage[picked].sum()),
        bound=float(bound) * scale if bound is not None else float("nan"),
    )
