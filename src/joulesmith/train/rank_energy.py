"""Joules of several ranks, each counted once.

A machine's processor, memory and GPUs are counted by the first rank on it, which watches the
processes of all ranks there; the others count nothing. Over machines joules are added up. Knows
meters; not what is trained.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from joulesmith.energy.cpu_time import ProcessTree
from joulesmith.energy.meter import EnergyMeter
from joulesmith.energy.reading import Pedigree, Reading
from joulesmith.energy.training import LoopMeter
from joulesmith.ranks import added, gathered, rank, world

_PEDIGREES: tuple[Pedigree, ...] = ("measured", "modelled", "assumed")


class NoMeter:
    """A meter whose windows have no joules, as another rank counts them."""

    def window(self, name: str) -> _NoWindow:
        """With a reading of 0 J and no pedigree."""
        return _NoWindow(name)


class _NoWindow:
    def __init__(self, name: str) -> None:
        self.name = name
        self.reading = Reading(None, 0.0)

    def __enter__(self) -> _NoWindow:
        self._begun = time.perf_counter()
        return self

    def __exit__(self, *exc: object) -> None:
        self.reading = Reading(0.0, time.perf_counter() - self._begun, low=0.0, high=0.0)


@contextmanager
def meter_of_machine(given: Any = None) -> Iterator[Any]:
    """This rank's meter: ``given``, or one of its own, on the first of a machine; an `EnergyMeter`
    then watches all ranks there. All ranks call it."""
    if world() == 1:
        yield given
        return
    host = platform.node()
    here = [(r, pid) for r, (name, pid) in enumerate(gathered([host, os.getpid()])) if name == host]
    if here[0][0] != rank():
        yield NoMeter()
        return
    tree = ProcessTree([pid for _, pid in here])
    if given is None:
        with EnergyMeter(tree) as meter:
            yield meter
        meter.close()
    elif isinstance(given, EnergyMeter):
        before = given.watch(tree)
        try:
            yield given
        finally:
            given.watch(before)
    else:
        yield given


def totals(loop: LoopMeter) -> dict[str, Any]:
    """A loop's totals over all machines, as `Totals.load_totals` takes them. All ranks call it."""
    mine = loop.state_dict()
    every: list[Mapping[str, Any]] = gathered(mine)
    found = dict(every[0])
    for key in ("joules", "low", "high", "aside"):
        found[key] = sum(t[key] for t in every)
    # Of other ranks only what is missing: a window counts once.
    found["unknown_windows"] = max(t["unknown_windows"] for t in every)
    marginals = [t["marginal"] for t in every if t["pedigree"] is not None]
    found["marginal"] = None if not marginals or None in marginals else sum(marginals)
    known = [t["pedigree"] for t in every if t["pedigree"] is not None]
    found["pedigree"] = max(known, key=_PEDIGREES.index) if known else None
    return found


def own_share(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a rank goes on from, so that the sum over ranks is ``state``."""
    if rank() == 0:
        return dict(state)
    nothing = dict.fromkeys(("joules", "low", "high", "aside", "marginal"), 0.0)
    return {**state, **nothing, "unknown_windows": 0, "pedigree": None}


def joules_now(loop: LoopMeter) -> float | None:
    """Of all machines, of closed windows; None where one of them is unknown."""
    mine = loop.joules
    joules, unknown = added([mine or 0.0, float(mine is None)])
    return None if unknown else joules
