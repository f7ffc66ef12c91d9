"""Trainings as steps of a recipe: `train` on a text, `distill` from a teacher, `recover` what the
steps before took."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from joulesmith.compress.step import Resumable, StepRecord, register
from joulesmith.errors import JoulesmithError
from joulesmith.progress import Progress, Tick, silent
from joulesmith.train.lesson_settings import LessonSettings
from joulesmith.train.recover_settings import DistilSettings
from joulesmith.units import si

if TYPE_CHECKING:
    from joulesmith.models import Model
    from joulesmith.train.lesson import Taught

HELD = 32
"""Most windows that judge on the way; one in eight where there are fewer."""


class Lesson(Resumable):
    """text: a file, "english" or "hf:DATASET"; None for the recipe's calibration windows. length:
    tokens of a window of the text. epochs: times that each window is seen; None for the steps of
    ``lesson``. lesson: how it is trained.
    """

    text: str | None = None
    length: int = Field(default=256, ge=2)
    epochs: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    lesson: LessonSettings = LessonSettings()

    @model_validator(mode="before")
    @classmethod
    def _by_epochs(cls, given: Any) -> Any:
        """With ``epochs`` no steps need be given."""
        lesson = given.get("lesson") if isinstance(given, dict) else None
        if isinstance(lesson, dict) and given.get("epochs") is not None:
            train = lesson.get("train")
            if isinstance(train, dict):
                given = {**given, "lesson": {**lesson, "train": {"steps": 1, **train}}}
        return given

    @model_validator(mode="after")
    def _ends(self) -> Lesson:
        if self.epochs is None and self.lesson.train.steps < 2:  # 1 where nothing is said
            raise ValueError(
                "say how long it trains: give epochs, or lesson: {train: {steps: N}} of 2 or more"
            )
        return self

    def teacher_of(self, model: Model) -> str | None:
        """What to load as the teacher, None for none."""
        return None

    def apply(
        self,
        model: Model,
        calibration: NDArray[np.int32],
        progress: Tick = silent,
        keep: Path | None = None,
        judged: NDArray[np.int32] | None = None,
    ) -> StepRecord:
        """Train in place; one window in eight judges. judged: windows that the recipe's outcome is
        judged on: those of the text that have them are left out. Raises `JoulesmithError` as
        `lesson.teach`, and for a text that is missing or shorter than nine windows."""
        from joulesmith import models
        from joulesmith.train import data
        from joulesmith.train.lesson import Limits, teach
        from joulesmith.train.recover import to_gguf

        ref = self.teacher_of(model)
        teacher = None if ref is None else models.load(ref)
        windows = calibration if self.text is None else self._read(model)
        count = len(windows)
        if judged is not None:
            windows = windows[data.overlap(windows, judged) == 0]
        apart = count - len(windows)
        if len(windows) < 9:
            less = f", without {apart} that are judged on," if apart else ""
            raise JoulesmithError(
                f"{len(windows)} windows of {windows.shape[1]} tokens{less} are too little to "
                "train on: give a longer text"
            )
        order = np.random.default_rng(self.lesson.train.seed).permutation(len(windows))
        count = min(HELD, len(windows) // 8)
        held, mine = windows[np.sort(order[:count])], windows[np.sort(order[count:])]
        taught = teach(
            model, mine, held, self.lesson,
            teacher=teacher, limits=Limits(epochs=self.epochs), folder=keep,
            show=_OneTick(progress),
        )  # fmt: skip
        packed = to_gguf(model, taught.packed)
        notes = notes_of(taught)
        if apart:
            notes += (f"{apart} windows of the text were left out: they are judged on",)
        return StepRecord(self.name, packed=packed, notes=notes, trained=taught.trained)

    def _read(self, model: Model) -> NDArray[np.int32]:
        from joulesmith import text

        assert self.text is not None
        found = text.read(self.text)
        body = self.length - (model.tokenizer.bos is not None and model.tokenizer.add_bos)
        count = len(model.tokenizer.encode(found.text)) // body
        return text.windows(model, found, self.length, {"all": max(1, count)})["all"].tokens


def notes_of(taught: Taught) -> tuple[str, ...]:
    """What a training has to tell, in lines."""
    t = taught.trained
    cost = "joules unknown" if t.joules is None else f"{si(t.joules, 'J')} ({t.pedigree})"
    lines = [f"{t.steps} steps on {taught.windows} windows, {cost}: {t.stopped}"]
    if taught.repeats:
        lines.append(f"{taught.repeats} windows were left out as repeats")
    if t.curve:
        lines.append(f"held-out loss {t.curve[0][1]:.4f} became {t.curve[-1][1]:.4f} nats a token")
    if taught.sparsity is not None:
        lines.append(f"{taught.sparsity:.1%} of the weights of pruned layers are zero")
    return (*lines, *t.notes)


@register
class Train(Lesson):
    """On the text alone."""

    name: ClassVar[str] = "train"
    lesson: LessonSettings = LessonSettings(distil=DistilSettings(hard=1, soft=0))

    @model_validator(mode="before")
    @classmethod
    def _by_the_text(cls, given: Any) -> Any:
        """Without ``lesson.distil`` the text alone, whatever else the lesson says."""
        lesson = given.get("lesson") if isinstance(given, dict) else None
        if isinstance(lesson, dict):
            distil = {"hard": 1, "soft": 0} | (lesson.get("distil") or {})
            given = {**given, "lesson": {**lesson, "distil": distil}}
        return given

    @model_validator(mode="after")
    def _alone(self) -> Train:
        if self.lesson.taught:
            raise ValueError("lesson.distil asks a teacher: call the step distill or recover")
        return self


@register
class Distill(Lesson):
    """From a teacher of the same tokenizer: a folder, a file or a name, as models are given."""

    name: ClassVar[str] = "distill"
    teacher: str

    def teacher_of(self, model: Model) -> str | None:
        """As given."""
        return self.teacher if self.lesson.taught else None


@register
class Recover(Lesson):
    """From the model as it was before the recipe's steps, or from ``teacher``."""

    name: ClassVar[str] = "recover"
    teacher: str | None = None

    def teacher_of(self, model: Model) -> str | None:
        """What the model was loaded from, unless told."""
        return (self.teacher or str(model.path)) if self.lesson.taught else None


class _OneTick(Progress):
    """The progress of a step, which has one tick for all its stages; nothing is printed."""

    def __init__(self, tick: Tick) -> None:
        super().__init__({}, stream=io.StringIO())
        self.tick = tick

    @contextmanager
    def stage(self, name: str) -> Iterator[Tick]:
        """The training ticks; what is made ready for it does not."""
        yield self.tick if name == "train" else silent
