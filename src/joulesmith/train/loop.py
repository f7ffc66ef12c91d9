"""The loop: windows in, a trained module and the joules that it took. One for training,
distillation and recovery, which differ in the objective that they give it.

Knows a module, windows of tokens and an objective; not what is trained for, nor models' files.
Everything that a step does follows from its number and the seed, so that a run that was killed
goes on with the losses that it would have had.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from joulesmith.energy.totals import Totals
from joulesmith.energy.training import LoopMeter
from joulesmith.errors import JoulesmithError
from joulesmith.progress import Tick, silent
from joulesmith.ranks import added, rank, world
from joulesmith.ranks import told as told_by_first
from joulesmith.train import budget, checkpoint, group, optimizers, rank_energy, schedule
from joulesmith.train.modes import training as _training
from joulesmith.train.parallel import (
    ParallelSettings,
    Spread,
    check_hook,
    moved_hook,
    spread,
)
from joulesmith.train.passes import gradients, leaves_out, length_of
from joulesmith.train.scaling import Probe, Scaling
from joulesmith.train.settings import TrainSettings

__all__ = ["Cost", "Hook", "Judge", "Objective", "Scaling", "Trained", "train"]

PROBE = "ranks against one"
UNKNOWN_SECONDS = 30.0
"""Of training whose joules are all unknown, after which one that they should end is refused."""

Judge = Callable[[nn.Module], float]
"""Held-out loss of the module, nats a token."""
Cost = Callable[[str], AbstractContextManager[object]]
"""Told what for; counts what runs inside, as `Beside.of`."""


class Objective(Protocol):
    """The loss of some windows, a mean over their tokens."""

    def __call__(self, module: nn.Module, tokens: Tensor, places: NDArray[np.int64]) -> Tensor:
        """tokens: int64 (n, length); places: which windows they are."""


class Hook(Protocol):
    """What changes weights between steps, such as sparse training."""

    @property
    def identity(self) -> Any:
        """What tells it from another, JSON."""

    def wrap(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer of the training, once, before all else: the one given or another."""

    def before(self, step: int) -> None:
        """Called when the step's gradients are whole, before they are clipped."""

    def after(self, step: int) -> None:
        """Called when they have moved."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, JSON."""

    def tensors(self) -> dict[str, Tensor]:
        """What else it keeps, in shapes that never change: a checkpoint is loaded into them, before
        weights and optimizer states are, whose shapes may follow from them."""

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from there."""

    def end(self) -> None:
        """Called at the end, after an error too: the module is as it was but for its weights."""


@dataclass(frozen=True)
class Trained:
    """steps: done in all. stopped: why, in words. losses: of each step, those before a resume too,
    nats a token. curve: (joules or None, held-out loss) at each evaluation. joules and the interval
    of all steps and of all ranks, those before a resume included; None unknown. optimizer_bytes:
    its state, on this rank. tokens: predicted in all steps, by all ranks; a window whose end is the
    student's own counts whole. scaling: of several ranks against one, where it was looked at.
    aside: joules of evaluations, as far as known."""

    steps: int
    stopped: str
    losses: tuple[float, ...]
    curve: tuple[tuple[float | None, float], ...]
    joules: float | None
    low: float | None
    high: float | None
    pedigree: str | None
    seconds: float
    optimizer_bytes: int
    tokens: int = 0
    notes: tuple[str, ...] = ()
    scaling: Scaling | None = None
    aside: float = 0.0


@dataclass
class _State:
    """What is kept of a run beside tensors."""

    step: int = 0
    curve: list[tuple[float | None, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def train(
    module: nn.Module,
    windows: NDArray[np.int32],
    objective: Objective,
    settings: TrainSettings,
    *,
    judge: Judge | None = None,
    folder: Path | None = None,
    identity: object = None,
    hook: Hook | None = None,
    meter: Any = None,
    save_seconds: float = 60.0,
    points: Path | None = None,
    progress: Tick = silent,
    tell: Callable[[str], None] | None = None,
    parallel: ParallelSettings | None = None,
    beside: Cost = lambda _: nullcontext(),
) -> Trained:
    """Train what in ``module`` requires gradients, in place.

    windows: int32 (n, length). judge: held-out loss, taken at the start, every ``settings.every``
    steps and at the end. folder: of checkpoints, written every ``save_seconds`` and at the end; a
    run of the same settings, windows, parameters and ``identity`` that stopped there goes on.
    meter: an `EnergyMeter`. points: file of the energy curve, by the first rank.

    Of several ranks all call it with the same; ``parallel`` says how they share the work. Then
    evaluations, checkpoints and the end are of all of them, and so are joules: the first rank of
    each machine counts that machine's, with ``meter`` or its own, and they are added up. beside:
    what looks at ranks before the training runs in its context, as `Beside.of`.

    Raises `JoulesmithError` for windows that are none, a loss or gradient that is not finite (the
    last checkpoint is kept), checkpoints of another run, a full disk, and as `spread`.
    """
    how = parallel or ParallelSettings()
    check_hook(hook, how)
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 2:
        raise JoulesmithError("no windows to train on: give more text")
    how.check_batch(settings.batch, world())
    if settings.joules_per_percent is not None and (judge is None or not settings.every):
        raise JoulesmithError(
            "the next percent of quality is told by held-out losses: say every how many steps "
            "one is taken"
        )
    told = identity if hook is None else [identity, hook.identity]
    print_of = _identity(module, windows, settings, told)
    state, scaling = _State(), None
    with ExitStack() as stack:
        meter = stack.enter_context(rank_energy.meter_of_machine(meter))
        stack.enter_context(_training(module, settings))
        probe = None
        if world() > 1 and how.probe:
            probe = Probe(windows, objective, settings, how.probe, meter)
            with beside(PROBE):
                probe.on_one(module)
        ddp = world() > 1 and how.data == "replicate" and how.tensor == 1
        out = ddp and leaves_out(module, windows, objective, settings)
        shared = stack.enter_context(spread(module, how, out))
        if probe is not None:
            with beside(PROBE):
                scaling = probe.on_all(shared)
        moved_hook(hook, shared.moved)
        chosen = {n: p for n, p in shared.inner.named_parameters() if p.requires_grad}
        optimizer = optimizers.build(chosen, settings)
        if hook is not None:
            stack.callback(hook.end)
            optimizer = hook.wrap(optimizer)
        first = rank() == 0
        loop = stack.enter_context(
            LoopMeter(
                meter, parameters=module, budget_joules=settings.budget_joules,
                path=points if first else None,
            )
        )  # fmt: skip
        run = _Run(
            shared, windows, objective, settings, optimizer, judge, folder, print_of, hook, loop,
            state, save_seconds, progress, tell or (lambda _: None),
        )  # fmt: skip
        stopped = run.go()
        loop.stop()
        spent = Totals()
        spent.load_totals(rank_energy.totals(loop))
    return Trained(
        steps=state.step,
        stopped=stopped,
        losses=tuple(state.losses),
        curve=tuple(state.curve),
        joules=spent.joules,
        low=spent.low,
        high=spent.high,
        pedigree=spent.pedigree,
        seconds=loop.seconds,
        optimizer_bytes=optimizers.state_bytes(optimizer),
        tokens=int(loop.tokens or 0),
        notes=tuple(loop.notes),
        scaling=scaling,
        aside=spent.aside,
    )


class _Run:
    """One call of `train`."""

    def __init__(
        self, shared: Spread, windows: NDArray[np.int32], objective: Objective,
        settings: TrainSettings, optimizer: torch.optim.Optimizer, judge: Judge | None,
        folder: Path | None, identity: str, hook: Hook | None, loop: LoopMeter, state: _State,
        save_seconds: float, progress: Tick, tell: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.shared, self.module, self.s = shared, shared.inner, settings
        self.windows, self.objective = windows, objective
        self.optimizer, self.judge, self.folder, self.identity = optimizer, judge, folder, identity
        self.hook, self.loop, self.state, self.tell = hook, loop, state, tell
        self.save_seconds, self.progress = save_seconds, progress
        self.device = next(p for p in self.module.parameters() if p.requires_grad).device
        self.saved_at, self.saved_step = time.monotonic(), -1
        self.judged_step = -1
        self.spent = 0.0

    def go(self) -> str:
        """Steps until there is a reason to stop, which is returned."""
        s, state = self.s, self.state
        self._resume()
        if state.step:  # for the time left: what was done before
            self.progress(self._done())
        if not state.curve:
            self._judge()
        stopped = self._reason()
        while not stopped:
            self._step(state.step)
            state.step += 1
            self.progress(self._done())
            if s.every and state.step % s.every == 0 and state.step < s.steps:
                self._judge()
            stopped = self._reason()
            due = time.monotonic() - self.saved_at >= self.save_seconds
            if not stopped and _any(due):  # clocks of ranks differ; all save or none
                self._save()
        if state.step != self.saved_step:
            if state.step != self.judged_step:
                self._judge()
            self._save()
        return stopped

    def _done(self) -> float:
        """Share of the training behind: by steps, or by joules where the budget ends it first."""
        share = self.state.step / self.s.steps
        if self.s.budget_joules is not None:
            share = max(share, self.spent / self.s.budget_joules)
        return min(1.0, share)

    def _reason(self) -> str:
        s = self.s
        if self.state.step >= s.steps:
            return "all steps done"
        stop = ""
        if s.budget_joules is not None or s.joules_per_percent is not None:
            self.spent = added([self.loop.spent - self.loop.aside])[0]
            if not self.spent and self._seconds() >= UNKNOWN_SECONDS:
                raise JoulesmithError(
                    "joules are unknown on this machine, and are to end the training: see  "
                    "joulesmith doctor, or leave --budget and --next-percent out"
                )
        if s.budget_joules is not None and self.spent >= s.budget_joules:
            stop = f"the budget of {s.budget_joules:g} J is spent"
        elif s.budget_seconds is not None and self._seconds() >= s.budget_seconds:
            stop = f"the {s.budget_seconds:g} s are over"
        elif s.joules_per_percent is not None:
            known = [(j, x) for j, x in self.state.curve if j is not None]
            if budget.enough(known, s.joules_per_percent):
                stop = f"the next percent of quality costs more than {s.joules_per_percent:g} J"
        return stop

    def _seconds(self) -> float:
        """Of training, by the first rank's clock."""
        return float(told_by_first(self.loop.seconds))

    def _step(self, step: int) -> None:
        s = self.s
        optimizers.set_rate(self.optimizer, schedule.rate(s, (step + 0.5) / s.steps))
        whole = self.windows.shape[1]
        pieces = whole // length_of(s, step, whole)
        count = s.batch * (whole - pieces)  # the first of a piece is not predicted
        with self.loop.step(tokens=count, samples=s.batch) as told:
            total = gradients(self.shared, self.windows, self.objective, s, step, self.device)
            told.loss = total
            value = added([float(total)])[0] / world()
            if not math.isfinite(value):
                raise self._broken(f"the loss became {value} at step {step}")
            if self.hook is not None:
                self.hook.before(step)
            norm = self.shared.clip(s.clip or math.inf)
            if not math.isfinite(norm):
                raise self._broken(f"the gradient became {norm} at step {step}")
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.hook is not None:
                self.hook.after(step)
        self.state.losses.append(value)

    def _broken(self, what: str) -> JoulesmithError:
        kept = "" if self.folder is None else _kept(self.folder)
        return JoulesmithError(
            f"{what}: lower the learning rate ({self.s.rate:g}) or the gradient's clip{kept}"
        )

    def _judge(self) -> None:
        if self.judge is None:
            return
        training = self.module.training
        self.module.eval()
        with self.loop.pause("evaluate"), torch.no_grad():
            loss = self.judge(self.module)
        self.module.train(training)
        self.loop.record(eval_loss=loss)
        joules = rank_energy.joules_now(self.loop)
        if joules is not None and not self.state.step:
            joules = 0.0  # of no step: what opening a window took is none of the training's
        self.state.curve.append((joules, loss))
        self.judged_step = self.state.step
        spent = "" if joules is None else f", {joules:.4g} J"
        self.tell(f"step {self.state.step}: held-out loss {loss:.4f}{spent}")

    def _save(self) -> None:
        if self.folder is None:
            return
        state = {
            "identity": self.identity,
            "curve": self.state.curve,
            "losses": self.state.losses,
            "loop": rank_energy.totals(self.loop),
            "hook": None if self.hook is None else self.hook.state(),
        }
        extra = {} if self.hook is None else self.hook.tensors()
        checkpoint.save(self.folder, self.state.step, self.module, self.optimizer, state, extra)
        self.saved_at, self.saved_step = time.monotonic(), self.state.step

    def _resume(self) -> None:
        if self.folder is None:
            return
        folder = self.folder
        group.goes_on_from(lambda: checkpoint.latest(folder))
        path = checkpoint.latest(folder)
        if (name := told_by_first(None if path is None else path.name)) is None:
            return
        path = folder / name
        if not path.is_dir():
            raise JoulesmithError(
                f"rank {rank()} does not see {path}, from which the first one goes on: give a "
                "folder on a file system that all machines see"
            )
        kept = checkpoint.read_state(path)
        if kept.get("identity") != self.identity:
            raise JoulesmithError(
                f"{self.folder} holds checkpoints of another training: give another folder"
            )
        extra = {} if self.hook is None else self.hook.tensors()
        checkpoint.load(path, self.module, self.optimizer, extra)
        self.state.step = self.saved_step = kept["step"]
        self.state.curve[:] = [(j, x) for j, x in kept["curve"]]
        self.state.losses[:] = kept["losses"]
        self.loop.load_state_dict(rank_energy.own_share(kept["loop"]))
        if self.hook is not None:
            self.hook.load(kept["hook"])
        self.tell(f"goes on at step {self.state.step}")


def _kept(folder: Path) -> str:
    last = checkpoint.latest(folder)
    return "" if last is None else f"; the checkpoint {last.name} is kept"


def _identity(
    module: nn.Module, windows: NDArray[np.int32], settings: TrainSettings, identity: object
) -> str:
    """What tells one training from another: not the ranks, nor where it stopped."""
    names = [(n, list(p.shape), p.requires_grad) for n, p in module.named_parameters()]
    told = json.dumps([settings.model_dump(), names, identity], sort_keys=True, default=str)
    h = hashlib.sha256(told.encode())
    h.update(np.ascontiguousarray(windows).tobytes())
    return h.hexdigest()[:16]


def _any(x: bool) -> bool:
    """Whether it is so on some rank."""
    return added([float(x)])[0] > 0
