"""Several ranks against one: a few steps of the same batch on the first rank alone, then on all.

Nothing moves: the learning rate is 0, optimizer states are thrown away, and buffers are put back.
Knows spread modules, meters and clocks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from joulesmith.ranks import added, alone, rank, told, wait, world
from joulesmith.train import optimizers
from joulesmith.train.group import cores
from joulesmith.train.modes import out_of_memory
from joulesmith.train.parallel import Spread
from joulesmith.train.passes import gradients
from joulesmith.train.settings import TrainSettings


@dataclass(frozen=True)
class Scaling:
    """ranks: how many, ``plan``: how they share the work. seconds_alone, seconds: of a step on one
    rank and on all; joules_alone, joules: of the same, idle included. None is unknown, with why in
    ``note``.

    One rank has all processor cores that it may use, as the command has without torchrun, or its
    share of them where that is faster; of GPUs its own counts. communication: share of a step's
    time in which a collective of the first rank is under way, from its start until it is complete:
    waiting for slower ranks is in it, and so is what computing hides.
    """

    ranks: int
    plan: str
    seconds_alone: float | None = None
    seconds: float | None = None
    joules_alone: float | None = None
    joules: float | None = None
    communication: float | None = None
    note: str = ""

    @property
    def speed_up(self) -> float | None:
        """T1 / Tn."""
        return _ratio(self.seconds_alone, self.seconds)

    @property
    def joules_ratio(self) -> float | None:
        """Jn / J1."""
        return _ratio(self.joules, self.joules_alone)


class Probe:
    """The two halves of it. All ranks call both, `on_one` before the module is spread."""

    def __init__(
        self, windows: NDArray[np.int32], objective: Any, s: TrainSettings, steps: int, meter: Any
    ) -> None:
        self.windows, self.objective, self.s = windows, objective, s
        self.steps, self.meter = steps, meter
        self.one: tuple[float, float | None] | None = None
        self.note = ""

    def on_one(self, module: nn.Module) -> None:
        """The first rank, while the others wait. A model that is too large for it is a note."""
        found: Any = None
        if rank() == 0:
            threads = torch.get_num_threads()
            device = next(module.parameters()).device
            tries = {threads, max(threads, cores())} if device.type == "cpu" else {threads}
            try:
                with alone():
                    for count in tries:  # small models are slower with more threads
                        torch.set_num_threads(count)
                        seconds, reading = self._timed(Spread(module, module))
                        if found is None or seconds < found[0]:
                            joules = _of_one(reading, device)
                            found = seconds, None if joules is None else joules / self.steps
            except RuntimeError as e:  # which torch's OutOfMemoryError is
                if not out_of_memory(e):
                    raise
                self.note = "the model does not fit on one rank"
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            finally:
                torch.set_num_threads(threads)
        found, self.note = told([found, self.note])
        self.one = None if found is None else (found[0], found[1])

    def on_all(self, spread: Spread) -> Scaling:
        """All ranks together, and what both came to."""
        seconds, joules = self.cost(spread)
        share = told(self._communication(spread))
        return Scaling(
            world(), spread.plan,
            None if self.one is None else self.one[0], seconds,
            None if self.one is None else self.one[1],
            joules, share, self.note,
        )  # fmt: skip

    def cost(self, spread: Spread) -> tuple[float, float | None]:
        """Seconds and joules of a step, of all ranks. All call it."""
        wait()
        seconds, reading = self._timed(spread, wait)
        joules, unknown = added([reading.joules or 0.0, float(reading.joules is None)])
        return seconds, None if unknown else joules / self.steps

    def _timed(self, spread: Spread, meet: Any = lambda: None) -> tuple[float, Any]:
        """Seconds of a step, and the reading of all steps."""
        with _still(spread, self.s) as step:
            step(self.windows, self.objective, 0)
            meet()
            with self.meter.window("probe") as window:
                begun = time.perf_counter()
                for i in range(self.steps):
                    step(self.windows, self.objective, i + 1)
                meet()
                seconds = (time.perf_counter() - begun) / self.steps
        return seconds, window.reading

    def _communication(self, spread: Spread) -> float | None:
        """Share of a step's time."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it talks to stderr
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        with _still(spread, self.s) as step:
            step(self.windows, self.objective, 0)  # states are made
            wait()
            with profile(activities=activities) as found:
                begun = time.perf_counter()
                step(self.windows, self.objective, 1)
                took = time.perf_counter() - begun
        spans = [
            (e.time_range.start, e.time_range.end)
            for e in found.events() or ()
            if e.name.startswith(("gloo:", "ncclDevKernel", "ncclKernel"))
        ]
        return min(1.0, covered(spans) * 1e-6 / took) if took > 0 else None


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of spans (start, end)."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


@contextmanager
def _still(spread: Spread, s: TrainSettings) -> Iterator[Any]:
    """A step that moves nothing."""
    device = next(spread.inner.parameters()).device
    buffers = [(b, b.detach().clone()) for b in spread.inner.buffers()]
    chosen = {n: p for n, p in spread.inner.named_parameters() if p.requires_grad}
    optimizer = optimizers.build(chosen, s)
    optimizers.set_rate(optimizer, 0.0)

    def step(windows: NDArray[np.int32], objective: Any, i: int) -> None:
        float(gradients(spread, windows, objective, s, i, device))
        spread.clip(s.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    gpus = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=gpus):
            yield step
            if gpus:
                torch.cuda.synchronize(device)
    finally:
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for b, value in buffers:
                b.copy_(value)


def _of_one(reading: Any, device: torch.device) -> float | None:
    """Joules without those of GPUs that other ranks have."""
    joules: float | None = reading.joules
    gpus = [p for p in reading.parts if p.device.startswith("gpu") and p.within is None]
    if joules is None or device.type != "cuda" or reading.machine is not None:
        return joules
    others = [p for i, p in enumerate(gpus) if i != (device.index or 0)]
    if any(p.joules is None for p in others):
        return None
    return joules - float(sum(p.joules for p in others))


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b
