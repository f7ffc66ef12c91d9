"""When to stop: joules spent, or joules that the next percent of quality would cost.

Knows a curve of (joules, loss); no meters and no models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

PERCENT = math.log(1.01)
"""A percent of perplexity, in nats a token."""
POINTS = 4
"""Of the end of the curve that a slope is taken of."""


def next_percent(curve: Sequence[tuple[float, float]]) -> float | None:
    """Joules that a perplexity one percent lower would cost from here on.

    curve: (joules so far, held-out loss in nats a token), in order. Over a few evaluations losses
    fall about evenly with the logarithm of what was spent, as power laws do (Kaplan et al. 2020,
    "Scaling laws for neural language models", equation 1.3): a line through the last `POINTS` of
    them by least squares, and its slope here. Infinity where it does not fall; None before there
    are three points.
    """
    points = [(j, x) for j, x in curve if j > 0][-POINTS:]
    if len(points) < 3:
        return None
    logs = [math.log(j) for j, _ in points]
    middle, mean = sum(logs) / len(logs), sum(x for _, x in points) / len(points)
    spread = sum((v - middle) ** 2 for v in logs)
    if spread <= 0:
        return None
    fall = -sum((v - middle) * (x - mean) for v, (_, x) in zip(logs, points, strict=True)) / spread
    if fall <= 0 or PERCENT / fall > 500:
        return math.inf
    return points[-1][0] * math.expm1(PERCENT / fall)


def enough(curve: Sequence[tuple[float, float]], most: float) -> bool:
    """Whether the next percent costs more than ``most`` joules, by two evaluations running: one
    alone may be noise."""
    now, before = next_percent(curve), next_percent(curve[:-1])
    return now is not None and before is not None and min(now, before) > most
