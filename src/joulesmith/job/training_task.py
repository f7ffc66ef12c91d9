"""What a training is asked to do, and what of that cannot work: told before any work is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from joulesmith._version import __version__
from joulesmith.compress.quantize.choice import check_type
from joulesmith.engines import get_engine
from joulesmith.errors import JoulesmithError
from joulesmith.export import forms
from joulesmith.job import student
from joulesmith.job.compress import shrink_parts
from joulesmith.job.quantize import check_out
from joulesmith.ranks import world
from joulesmith.report.training_result import Kind
from joulesmith.train.lesson_settings import LessonSettings
from joulesmith.workspace import file_identity

if TYPE_CHECKING:
    import torch

    from joulesmith.models import Model
    from joulesmith.train.lesson import Limits


@dataclass(frozen=True)
class Task:
    """What is asked for.

    model: to train; of `distill`, the teacher. kind: which command. teacher: of `recover`. student:
    of `distill`, a model; else ``shape`` ("layers=4,width=128") or ``config`` (a file) make one
    with fresh weights, and ``shrink`` cuts one out of the teacher, as `compress --shrink`; for
    `train`, ``shape``, ``config`` and ``scratch`` (its own shape) begin anew. text: trained on;
    None for what the teacher writes. evaluation: judged on; None for a part of the text. length:
    tokens of a window; most: windows. samples: windows that the teacher writes beside the text, or
    the model itself without one. form: of `forms.FORMATS`. device: "cpu", "cuda", "cuda:1" or
    "auto". grid: whose carbon and price are told.
    """

    kind: Kind
    model: str
    out: Path
    lesson: LessonSettings
    limits: Limits | None = None
    teacher: str | None = None
    student: str | None = None
    shape: str | None = None
    config: Path | None = None
    scratch: bool = False
    shrink: str | None = None
    text: str | None = None
    evaluation: str | None = None
    length: int = 256
    most: int | None = None
    samples: int = 0
    form: str | None = None
    device: str = "auto"
    grid: str = "WORLD"
    command: str = ""

    @property
    def seed(self) -> int:
        """Of all that is drawn."""
        return self.lesson.train.seed

    @property
    def format(self) -> str:
        """Asked for, or by the name of ``out`` and the mode."""
        if self.form is not None:
            return self.form
        if self.out.suffix.lower() == ".gguf":
            return forms.GGUF
        if self.lesson.how.mode == "quantized":
            return "compressed-tensors"
        return forms.SPARSE if self.lesson.sparse is not None else forms.PLAIN


def check(task: Task, device: torch.device) -> None:
    """Refuse what cannot work, before any work is done. Raises `JoulesmithError`."""
    from joulesmith.energy import grid
    from joulesmith.train.passes import length_of

    forms.ready(task.format)
    if task.format == forms.GGUF:
        get_engine("llama.cpp")
    check_out(task.out, task.format)
    grid(task.grid)
    for option, path in (("--text", task.text), ("--eval", task.evaluation)):
        named = path is None or path == "english" or path.startswith("hf:")
        if not named and not Path(str(path)).is_file():
            raise JoulesmithError(f"no such text file: {option} {path}: give a file that is there")
    if task.length < 8:
        raise JoulesmithError(f"--length {task.length}: give windows of 8 tokens or more")
    made = [w for w in ("student", "shape", "config", "shrink") if getattr(task, w) is not None]
    if task.kind == "distill" and len(made) != 1:
        raise JoulesmithError(
            "say who learns: one of --student, --shape, --config and --shrink"
            + (f", not {' and '.join('--' + w for w in made)}" if made else "")
        )
    fresh = [*made, *(["scratch"] if task.scratch else [])]
    if task.kind == "train" and len(fresh) > 1:
        raise JoulesmithError(f"give one of --{' and --'.join(fresh)}")
    if task.kind == "train" and task.text is None:
        raise JoulesmithError("say what to train on: --text FILE (or english, or hf:DATASET)")
    if task.shape is not None:
        student.shape_of(task.shape)
    if task.shrink is not None and "joules" in shrink_parts(task.shrink):
        raise JoulesmithError("--shrink joules= is priced by  joulesmith compress: run that first")
    task.lesson.check_ranks(world())
    length_of(task.lesson.train, 0, task.length)
    if task.kind == "train" and task.lesson.data.by == "learnable":
        raise JoulesmithError("what is learnable is told by a teacher: choose by loss or gradient")
    how = task.lesson.how
    if how.mode == "quantized":
        if isinstance(how.types, str):
            check_type(how.types)
        if task.format in (forms.PLAIN, forms.SPARSE):
            raise JoulesmithError(
                f"--mode quantized writes {how.types}, which {task.format} does not hold: give "
                "--format compressed-tensors, or a name that ends in .gguf"
            )
    elif task.format == "compressed-tensors":
        raise JoulesmithError(
            "nothing is quantized: compressed-tensors wants a matrix of another type than F16: "
            "train into another --format, then  joulesmith quantize  it"
        )
    if device.type not in ("cpu", "cuda"):
        raise JoulesmithError(f"--device {task.device[:40]}: give auto, cpu, cuda or cuda:1")
    if device.type == "cuda":
        import torch

        have = torch.cuda.device_count()
        if (device.index or 0) >= have:
            raise JoulesmithError(
                f"--device {task.device}: this machine has {have} GPUs that torch can use"
            )


def check_form(task: Task, model: Model) -> None:
    """Refuse a grid that the format cannot hold, by the model's own matrices, before it trains.
    Raises `JoulesmithError`."""
    how = task.lesson.how
    if how.mode == "quantized" and isinstance(how.types, str):
        for ref in model.tensors.values():
            if len(ref.shape) == 2 and (ref.layer is not None or ref.role == "output"):
                forms.check(task.format, ref, how.types)


def frozen_zeros(task: Task, model: Model) -> list[str]:
    """What is to be said of weights that are zero and will stay so."""
    how = task.lesson.how
    if not how.keep_zeros or how.mode != "full" or task.lesson.sparse is not None:
        return []
    matrices = [p for p in model.module.parameters() if p.ndim >= 2]
    zeros = sum(int((p == 0).sum()) for p in matrices)
    if not zeros:
        return []
    share = zeros / sum(p.numel() for p in matrices)
    return [f"{share:.2%} of the weights are zero and stay so (--fill-zeros trains them too)"]


def identity(task: Task) -> dict[str, Any]:
    """What tells one run from another, JSON."""
    limits = task.limits
    return {
        "version": __version__,
        "kind": task.kind,
        "model": [task.model, file_identity(task.model)],
        "teacher": [task.teacher, file_identity(task.teacher)],
        "student": [task.student, file_identity(task.student)],
        "shape": task.shape,
        "config": file_identity(None if task.config is None else str(task.config)),
        "scratch": task.scratch,
        "shrink": task.shrink,
        "text": file_identity(task.text),
        "eval": file_identity(task.evaluation),
        "length": task.length,
        "windows": task.most,
        "samples": task.samples,
        "format": task.format,
        "lesson": task.lesson.model_dump(mode="json", exclude={"parallel"}),
        "limits": None if limits is None else [limits.epochs, limits.seconds, limits.joules],
    }
