"""What of a search for a shape is kept on disk for a run that is interrupted: the order in which
layers go, and the damage of each shape that was tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from joulesmith.compress.checkpoint import Checkpoint
from joulesmith.compress.prune.drop import Drops
from joulesmith.compress.prune.shrink import Shape


class Tried:
    """Of one job (`Checkpoint`), in ``folder``; None keeps nothing."""

    def __init__(self, folder: Path | None, *job: object) -> None:
        self._files = Checkpoint(folder, "shrink", *job)
        found = self._files.get("shapes") or []
        self._damage = {Shape(**shape): float(damage) for shape, damage in found}

    def order(self, compute: Callable[[], Drops]) -> Drops:
        """The kept one, or the computed one, kept. Raises `JoulesmithError` for a full disk."""
        found = self._files.get("order")
        if found is not None:
            return Drops(tuple(found["order"]), tuple(found["damage"]))
        drops = compute()
        self._files.put("order", asdict(drops))
        return drops

    def damage(self, shape: Shape, compute: Callable[[Shape], float]) -> float:
        """As `order`, of a shape."""
        if shape not in self._damage:
            self._damage[shape] = compute(shape)
            self._files.put("shapes", [[asdict(s), d] for s, d in self._damage.items()])
        return self._damage[shape]
