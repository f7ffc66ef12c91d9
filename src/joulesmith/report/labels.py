"""Where point labels go so that they do not cover one another. Knows only pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]
"""left, top, right, bottom; pixels, y downwards."""
_TRIES = ((10, 0), (9, -10), (9, 11), (6, -17), (6, 18), (14, -28), (14, 29), (18, -42), (18, 43))
"""Distances of a label from its point: sideways and down, best first."""


@dataclass(frozen=True)
class Place:
    """Where a label's text starts (``align`` "left") or ends ("right"), vertically centred."""

    x: float
    y: float
    align: str


def place(
    points: Sequence[tuple[float, float, str]],
    obstacles: Sequence[tuple[float, float]],
    width: float,
    height: float,
    char: float = 6.4,
    line: float = 14.0,
) -> list[Place]:
    """A place for each (x, y, text), first come first served, inside width x height.

    Tries right, left, above and below of the point at growing distances and
    takes the spot that overlaps labels and points least.
    """
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in obstacles]
    taken += [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in points]
    out = []
    for x, y, text in points:
        w = char * len(text)
        best: tuple[float, Place, Box] | None = None
        tries = ((side * gap, lift) for gap, lift in _TRIES for side in (1, -1))
        for rank, (dx, dy) in enumerate(tries):
            left = x + dx if dx > 0 else x + dx - w
            box = (left, y + dy - line / 2, left + w, y + dy + line / 2)
            cost = 0.15 * rank * line + sum(_overlap(box, other) for other in taken)
            outside = max(0.0, -box[0]) + max(0.0, box[2] - width)
            outside += max(0.0, -box[1]) + max(0.0, box[3] - height)
            cost += outside * 40
            spot = Place(x + dx, y + dy, "left" if dx > 0 else "right")
            if best is None or cost < best[0]:
                best = (cost, spot, box)
        assert best is not None
        out.append(best[1])
        taken.append(best[2])
    return out


def _overlap(a: Box, b: Box) -> float:
    """Shared area in square pixels."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    return w * h if w > 0 and h > 0 else 0.0
