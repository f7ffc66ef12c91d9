"""A run that ends in the middle."""

from __future__ import annotations

from joulesmith.progress import Tick


class Killed(BaseException):
    """What nothing catches."""


def killed_at(call: int) -> Tick:
    """Progress that raises `Killed` when it is told for the ``call``-th time."""
    calls = 0

    def tick(share: float) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed

    return tick
