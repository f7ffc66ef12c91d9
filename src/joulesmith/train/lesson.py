"""One training of a loaded model, whatever it is for: which windows, from which teacher, what of
the model trains, and what is kept to go on from. `train`, `distill` and `recover` are three names
for it.

Knows models and windows; not where a text is from, nor what becomes of the model.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from joulesmith.compress.checkpoint import digest
from joulesmith.energy.meter import EnergyMeter
from joulesmith.errors import JoulesmithError
from joulesmith.progress import Progress
from joulesmith.ranks import rank, shared, told, world
from joulesmith.train import data, loop, rank_energy
from joulesmith.train.data_settings import DataSettings
from joulesmith.train.distil import Distil, check_tokenizers
from joulesmith.train.lesson_settings import LessonSettings
from joulesmith.train.modes import fits, training
from joulesmith.train.outputs import device_of, eager, fused, plainly
from joulesmith.train.parallel import spread
from joulesmith.train.passes import leaves_out
from joulesmith.train.recover import Packed, prepared, recover
from joulesmith.train.scaling import Probe
from joulesmith.train.scores import HeldOut, Score, scores
from joulesmith.train.settings import TrainSettings
from joulesmith.train.sparse import SparseTraining
from joulesmith.train.teacher import cache_top

if TYPE_CHECKING:
    from joulesmith.models import Model

TRIAL_STEPS = 3
"""Steps that are timed where a time or joules are given in the place of steps."""


@dataclass(frozen=True)
class Taught:
    """What came of it.

    trained: by the loop. windows: trained on, of how many there were. repeats: left out as such.
    steps: of the training, those that a budget was turned into. packed: of quantization-aware
    training, what linear layers now hold exactly. sparsity: of layers in sparse training, None
    without.
    """

    trained: loop.Trained
    windows: int
    of: int
    repeats: int
    settings: TrainSettings
    packed: dict[str, Any] = field(default_factory=dict)
    sparsity: float | None = None


@dataclass(frozen=True)
class Limits:
    """What ends a training beside its steps: one of them, or none. seconds: of training, teacher
    and data excluded. joules: of the same. epochs: times that each window is seen."""

    epochs: float | None = None
    seconds: float | None = None
    joules: float | None = None

    @property
    def timed(self) -> bool:
        """Whether a few steps are timed to know how many there are."""
        return self.epochs is None and (self.seconds is not None or self.joules is not None)


@fits()
def teach(
    student: Model,
    windows: NDArray[np.int32],
    held: NDArray[np.int32],
    s: LessonSettings,
    *,
    teacher: Model | None = None,
    limits: Limits | None = None,
    known: NDArray[np.int32] | None = None,
    folder: Path | None = None,
    meter: Any = None,
    points: Path | None = None,
    packed: Packed | None = None,
    show: Progress | None = None,
    beside: loop.Cost = lambda _: nullcontext(),
) -> Taught:
    """Train ``student.module`` in place.

    windows: int32 (n, length) to choose from; held: those of the energy-to-quality curve, never
    trained on. known: other windows that must not be repeated, such as those of the last
    judgement. folder: for checkpoints, teacher's predictions, scores and the number of steps; the
    same call goes on there. meter: an `EnergyMeter`; one of its own without. beside: what is made
    ready for the training runs in its context, as `Beside.of`.

    Raises `JoulesmithError` for tokenizers that differ, a budget of joules where they are unknown,
    and as `recover`, `loop.train` and `cache_top` do.
    """
    s.check_ranks(world())
    show, limits = show or Progress({}), limits or Limits()
    module = student.module
    vocab = None
    if teacher is not None:
        vocab = check_tokenizers(student.tokenizer, teacher.tokenizer)
    kept = _Kept(folder)
    judged = held if known is None else np.concatenate([held, known])
    with beside("choosing windows") if s.data.share < 1 else nullcontext():
        at, repeats = chosen(windows, judged, s.data, module, teacher, kept, show)
    mine = np.ascontiguousarray(windows[at])
    cache = None
    if s.cache and teacher is not None:
        if folder is None:
            raise JoulesmithError("a teacher's predictions are kept on disk: give a folder")
        show.expected.setdefault("teacher", 40)
        with beside("teacher's predictions"), show.stage("teacher") as tick:
            cache = cache_top(
                teacher.module, mine, s.cache, folder / "teacher", vocab=vocab,
                precision=s.train.precision, progress=tick,
            )  # fmt: skip
    asked = teacher.module if teacher is not None and s.asks else None
    objective = Distil(s.distil, teacher=asked, cache=cache, vocab=vocab, eos=student.tokenizer.eos)
    with ExitStack() as stack:
        if s.distil.attention:
            stack.enter_context(eager(module, *([] if asked is None else [asked])))
        if (
            s.compiled
            and device_of(module).type == "cpu"
            and not stack.enter_context(fused(module))
        ):
            show.say("no C++ compiler: blocks are not compiled")
        with beside("timing a few steps") if limits.timed else nullcontext():
            settings = counted(s, limits, module, mine, objective, kept, meter, packed)
        if s.points and not settings.every:
            settings = settings.model_copy(update={"every": -(-settings.steps // s.points)})
        show.expected["train"] = 200.0
        tick = stack.enter_context(show.stage("train"))
        judge = HeldOut(held)
        given: dict[str, Any] = {
            "judge": _Plainly(judge) if s.compiled else judge,
            "folder": None if folder is None else folder / "checkpoints",
            "meter": meter, "points": points, "progress": tick, "tell": show.say,
            "save_seconds": s.save_seconds, "parallel": s.parallel, "beside": beside,
        }  # fmt: skip
        if s.sparse is not None:
            hook = SparseTraining(module, s.sparse, settings)
            which = digest(s.distil.model_dump(), teacher and teacher.module, module)
            trained = loop.train(
                module, mine, objective, settings, hook=hook, identity=which, **given
            )
            return Taught(trained, len(mine), len(windows), repeats, settings, {}, hook.sparsity)
        found = recover(
            module, mine, settings, s.how, s.distil,
            teacher=asked, cache=cache, packed=packed, vocab=vocab,
            eos=student.tokenizer.eos, **given,
        )  # fmt: skip
    return Taught(found.trained, len(mine), len(windows), repeats, settings, dict(found.packed))


class _Plainly:
    """A judge that calls nothing compiled, which would be compiled again for its shapes."""

    def __init__(self, judge: loop.Judge) -> None:
        self.judge = judge

    def __call__(self, module: nn.Module) -> float:
        with plainly():
            return self.judge(module)


class _Kept:
    """Small results in a folder, or nowhere."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def array(self, name: str) -> NDArray[np.float64] | None:
        path = None if self.folder is None else self.folder / f"{name}.npy"
        if path is None or not path.is_file():
            return None
        found: NDArray[np.float64] = np.load(path, allow_pickle=False)
        return found

    def put(self, name: str, value: NDArray[np.float64]) -> None:
        from joulesmith.atomic import atomic_path

        if self.folder is not None and rank() == 0:
            with atomic_path(self.folder / f"{name}.npy") as part, part.open("wb") as f:
                np.save(f, value)


def chosen(
    windows: NDArray[np.int32],
    judged: NDArray[np.int32],
    s: DataSettings,
    module: nn.Module,
    teacher: Model | None,
    kept: _Kept,
    show: Progress,
) -> tuple[NDArray[np.int64], int]:
    """Places of the windows that are trained on, and how many were left out as repeats."""
    at = np.arange(len(windows))
    if s.repeats is not None:
        at = data.without_repeats(windows, s.repeats, min(data.GRAM, windows.shape[1]), judged)
        if not len(at):
            raise JoulesmithError(
                f"all {len(windows)} windows repeat others by more than {s.repeats:.0%}: allow more"
            )
    repeats = len(windows) - len(at)
    if s.share == 1:
        return at, repeats
    if s.by == "learnable" and teacher is None:
        raise JoulesmithError(
            "what is learnable is told by a teacher: give one, or choose by loss or gradient"
        )
    before = kept.array("scores") if rank() == 0 else None
    found = told(None if before is None or len(before) != len(at) else before.tolist())
    if found is None:
        show.expected.setdefault("choose", 20)
        with show.stage("choose") as tick:

            def every(m: nn.Module, kind: Score = "loss") -> NDArray[np.float64]:
                part: list[float] = shared(
                    at.tolist(), lambda mine: scores(m, windows[list(mine)], kind, tick).tolist()
                )
                return np.asarray(part, np.float64)

            judge = module if teacher is None else teacher.module
            if s.by == "learnable":
                found = data.learnable(every(module), every(judge))
            else:
                found = every(judge, s.by)
        kept.put("scores", found)
    found = np.asarray(found, np.float64)
    return at[data.by_score(found, s.share, s.keep)], repeats


def counted(
    s: LessonSettings,
    limits: Limits,
    module: nn.Module,
    windows: NDArray[np.int32],
    objective: loop.Objective,
    kept: _Kept,
    meter: Any,
    packed: Packed | None,
) -> TrainSettings:
    """The loop's settings with the steps that the limits come to: by epochs, or by a few steps'
    seconds or joules, so that the rate falls to its end just when the budget is spent.

    The number is kept with the run, which would else not be the same after it was stopped. Raises
    `JoulesmithError` for joules that are unknown here, and a budget below one step.
    """
    t = s.train
    if limits.epochs is not None:
        return t.model_copy(update={"steps": max(1, round(limits.epochs * len(windows) / t.batch))})
    if not limits.timed:
        return t
    before = kept.array("steps")
    if before is None or world() > 1:
        found = None if before is None else float(before[0])
        count = told(found)  # the first rank's, who wrote it
        if count is None:
            seconds, joules = trial(s, module, windows, objective, meter, packed)
            count = told(affordable(limits, seconds, joules))
        before = np.array([count])
        kept.put("steps", before)
    update = {
        "steps": int(before[0]), "budget_joules": limits.joules, "budget_seconds": limits.seconds,
    }  # fmt: skip
    return t.model_copy(update=update)


def affordable(limits: Limits, seconds: float, joules: float | None) -> float:
    """Steps that the limits pay for, of so many seconds and joules each. Raises `JoulesmithError`
    for joules that are unknown, and where they do not pay for one."""
    if limits.joules is not None and joules is None:
        raise JoulesmithError(
            "joules are unknown on this machine: see  joulesmith doctor, or give steps"
        )
    counts = [] if limits.seconds is None else [limits.seconds / seconds]
    if limits.joules is not None and joules:
        counts.append(limits.joules / joules)
    if min(counts) < 1:
        joined = "" if joules is None else f" and {joules:.3g} J"
        raise JoulesmithError(
            f"the budget ends before the first step, which takes {seconds:.2g} s{joined}: give "
            "more, or a smaller batch"
        )
    return float(int(min(counts)))


def native_precision(device: str = "auto") -> str:
    """What products are made in where nothing is asked for: "bfloat16" on GPUs, and on processors
    with instructions for it. device: that trains, as `--device`."""
    if device != "cpu" and torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    units = ("avx512_bf16", "amx_tile")
    native = any(getattr(torch.cpu, f"_is_{u}_supported", lambda: False)() for u in units)
    return "bfloat16" if native else "float32"


class _EnoughError(Exception):
    """Ends a trial."""


def trial(
    s: LessonSettings,
    module: nn.Module,
    windows: NDArray[np.int32],
    objective: loop.Objective,
    meter: Any,
    packed: Packed | None,
) -> tuple[float, float | None]:
    """Seconds and joules of a step, of all ranks, means over `TRIAL_STEPS`. Nothing moves."""
    found: tuple[float, float | None] = (0.0, None)
    with ExitStack() as stack:
        used = stack.enter_context(rank_energy.meter_of_machine(meter))
        if used is None:
            own = EnergyMeter()
            stack.callback(own.close)
            used = stack.enter_context(own)
        # An error leaves weights as they are, which putting the module together would round.
        stack.enter_context(suppress(_EnoughError))
        stack.enter_context(prepared(module, s.how, packed))
        stack.enter_context(training(module, s.train))
        replicated = world() > 1 and s.parallel.data == "replicate" and s.parallel.tensor == 1
        out = replicated and leaves_out(module, windows, objective, s.train)
        together = stack.enter_context(spread(module, s.parallel, out))
        found = Probe(windows, objective, s.train, TRIAL_STEPS, used).cost(together)
        raise _EnoughError
    return found
