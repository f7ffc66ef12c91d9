"""Commands that train: `train`, `distill` and `recover`."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from joulesmith.cli.common import AsJson, Model, app, console, interruptible, parse_duration
from joulesmith.errors import JoulesmithError
from joulesmith.units import parse_joules

if TYPE_CHECKING:
    from joulesmith.train.lesson import Limits
    from joulesmith.train.lesson_settings import LessonSettings

# typer reads the annotations on Python 3.10
Out = Annotated[Path, typer.Option(help="Folder to write; for a GGUF, file FILE.gguf.")]
Text = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Text to train on: a file, english (what Python ships) or hf:DATASET. Default: what "
        "the teacher writes; train has none and needs it."
    ),
]
Eval = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--eval",
        help="Text to judge on. Default: a part of --text, never trained on; without it english.",
    ),
]
Steps = Annotated[Optional[int], typer.Option(min=1, help="Optimizer steps.")]  # noqa: UP045
Epochs = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(help="Instead of steps: times that each window is seen."),
]
Time = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--time", help="Instead of steps: as many as fit, e.g. 30m; a few are timed."),
]
Budget = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Joules to spend at most, e.g. 50kJ; without steps, as many as they pay for."
    ),
]
NextPercent = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="JOULES", help="Stop when the next percent of perplexity costs more, e.g. 2kJ."
    ),
]
Every = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        min=1, help="Steps between points of the energy-to-quality curve. Default: about 12 points."
    ),
]
Batch = Annotated[int, typer.Option(help="Windows a step, over all ranks.")]
Micro = Annotated[int, typer.Option(help="Windows in one pass; gradients add up to a batch.")]
Length = Annotated[int, typer.Option(help="Tokens of a window.")]
Windows = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Windows of the text to use at most."),
]
Samples = Annotated[
    int,
    typer.Option(
        min=0,
        help="Windows that the teacher writes (without one, the model) to train on beside --text. "
        "Without --text: 256.",
    ),
]
OptimizerName = Annotated[
    str, typer.Option("--optimizer", help="sgd, momentum, adamw, adafactor or muon.")
]
Rate = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(help="Highest learning rate. Default: by optimizer and command, see the docs."),
]
Schedule = Annotated[str, typer.Option(help="Of the rate: cosine, linear or constant.")]
Precision = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Of products: float32 or bfloat16. Default: bfloat16 where it is native, else float32."
    ),
]
Recompute = Annotated[
    bool, typer.Option("--recompute", help="Activations again going backward: less memory.")
]
Sparse = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="METHOD=SHARE",
        help="Train with zeros: rigl=0.8, set, magnitude (gradual), movement or static; rigl=2:4.",
    ),
]
Repeats = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        metavar="SHARE", help="Leave out windows of which more was seen before, e.g. 0.5."
    ),
]
Select = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="[BY:]KEEP=SHARE",
        help="Train on a share of the windows: middle=0.5, high or low by the teacher's loss (the "
        "model's own without one); gradient:high=0.5; learnable:high=0.5 (needs a teacher).",
    ),
]
StartLength = Annotated[
    int,
    typer.Option(help="Begin with windows cut to so many tokens, a divisor of --length; 0: whole."),
]
Cache = Annotated[
    int,
    typer.Option(help="Ask the teacher once and keep so many likeliest tokens; 0: in each step."),
]
Hard = Annotated[float, typer.Option(help="Weight of the text itself in the loss.")]
Soft = Annotated[float, typer.Option(help="Weight of the teacher's probabilities.")]
Hidden = Annotated[float, typer.Option(help="Weight of matching hidden states (equal widths).")]
Attention = Annotated[float, typer.Option(help="Weight of matching attention.")]
Temperature = Annotated[float, typer.Option(help="Of both models' probabilities.")]
OnPolicy = Annotated[float, typer.Option(help="Share of passes on text that the student writes.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")]
FillZeros = Annotated[
    bool, typer.Option("--fill-zeros", help="Weights that are zero may train too.")
]
Form = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--format",
        help="transformers, gguf, sparse, compressed-tensors, onnx or openvino. Default: gguf "
        "where --out ends so, else what the training needs.",
    ),
]
Compiled = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="On a processor: steps of large models in about half the time after a minute or two; "
        "needs a C++ compiler.",
    ),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="Under torchrun: replicate, the whole model on each rank; shard, a part (FSDP2).",
    ),
]
Tensor = Annotated[
    int, typer.Option("--tensor", help="Under torchrun: ranks that share each matrix.")
]
Grid = Annotated[str, typer.Option(help="Country or region of the electricity grid, e.g. DE.")]
Seed = Annotated[int, typer.Option(help="Seed of all that is drawn.")]
Shape = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="PARTS",
        help="Fresh weights of another shape: layers=4,width=128,heads=4,neurons=344 ...",
    ),
]
Config = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(metavar="FILE", help="Fresh weights of a transformers config.json."),
]


@app.command()
def train(
    model: Model,
    out: Out,
    text: Text = None,
    eval_: Eval = None,
    scratch: Annotated[
        bool, typer.Option("--scratch", help="Fresh weights; MODEL gives shape and tokenizer.")
    ] = False,
    shape: Shape = None,
    config: Config = None,
    steps: Steps = None,
    epochs: Epochs = None,
    time_: Time = None,
    budget: Budget = None,
    next_percent: NextPercent = None,
    every: Every = None,
    batch: Batch = 8,
    micro: Micro = 4,
    length: Length = 256,
    windows: Windows = None,
    samples: Samples = 0,
    optimizer: OptimizerName = "adamw",
    rate: Rate = None,
    schedule: Schedule = "cosine",
    precision: Precision = None,
    recompute: Recompute = False,
    sparse: Sparse = None,
    fill_zeros: FillZeros = False,
    repeats: Repeats = None,
    select: Select = None,
    start_length: StartLength = 0,
    compiled: Compiled = False,
    device: Device = "auto",
    data: Data = "replicate",
    tensor: Tensor = 1,
    format_: Form = None,
    grid: Grid = "WORLD",
    seed: Seed = 0,
    json_: AsJson = False,
) -> None:
    """Train a model on a text, or one from nothing; tell the joules.

    Stops after --steps, --epochs, --time or --budget. The page shows quality against joules. The
    same command again goes on where it stopped.
    """
    fresh = scratch or shape is not None or config is not None
    lesson, limits = _lesson(
        steps, epochs, time_, budget, next_percent, every, batch, micro, optimizer,
        _rate(rate, optimizer, 1.0 if fresh else 0.1), schedule, precision, recompute, seed,
        sparse, repeats, select, {"hard": 1.0, "soft": 0.0},
        {"keep_zeros": not fill_zeros}, 0, data, tensor, start_length, compiled, device,
    )  # fmt: skip
    _run(
        "train", model, out, lesson, limits, json_,
        text=text, evaluation=eval_, shape=shape, config=config, scratch=scratch, length=length,
        most=windows, samples=samples, form=format_, device=device, grid=grid,
    )  # fmt: skip


@app.command()
def distill(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="As MODEL elsewhere.")],
    out: Out,
    student: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="MODEL", help="Who learns: a model of the same tokenizer."),
    ] = None,
    shape: Shape = None,
    config: Config = None,
    shrink: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="SHARE|COUNT|PARTS", help="Cut out of the teacher, as in compress."),
    ] = None,
    text: Text = None,
    eval_: Eval = None,
    hard: Hard = 0.1,
    soft: Soft = 0.9,
    hidden: Hidden = 0.0,
    attention: Attention = 0.0,
    temperature: Temperature = 1.0,
    on_policy: OnPolicy = 0.0,
    cache: Cache = 0,
    steps: Steps = None,
    epochs: Epochs = None,
    time_: Time = None,
    budget: Budget = None,
    next_percent: NextPercent = None,
    every: Every = None,
    batch: Batch = 8,
    micro: Micro = 4,
    length: Length = 256,
    windows: Windows = None,
    samples: Samples = 0,
    optimizer: OptimizerName = "adamw",
    rate: Rate = None,
    schedule: Schedule = "cosine",
    precision: Precision = None,
    recompute: Recompute = False,
    sparse: Sparse = None,
    fill_zeros: FillZeros = False,
    repeats: Repeats = None,
    select: Select = None,
    start_length: StartLength = 0,
    compiled: Compiled = False,
    device: Device = "auto",
    data: Data = "replicate",
    tensor: Tensor = 1,
    format_: Form = None,
    grid: Grid = "WORLD",
    seed: Seed = 0,
    json_: AsJson = False,
) -> None:
    """Teach a smaller model what a larger one knows; tell the joules.

    The student is --student, or made with fresh weights (--shape, --config), or cut out of the
    teacher (--shrink). Without --text it learns from what the teacher writes. The same command
    again goes on where it stopped.
    """
    fresh = shape is not None or config is not None
    distil = {
        "hard": hard, "soft": soft, "hidden": hidden, "attention": attention,
        "temperature": temperature, "on_policy": on_policy,
    }  # fmt: skip
    lesson, limits = _lesson(
        steps, epochs, time_, budget, next_percent, every, batch, micro, optimizer,
        _rate(rate, optimizer, 1.0 if fresh else 0.3), schedule, precision, recompute, seed,
        sparse, repeats, select, distil, {"keep_zeros": not fill_zeros}, cache, data,
        tensor, start_length, compiled, device,
    )  # fmt: skip
    _run(
        "distill", teacher, out, lesson, limits, json_,
        student=student, shape=shape, config=config, shrink=shrink, text=text, evaluation=eval_,
        length=length, most=windows, samples=samples, form=format_, device=device, grid=grid,
    )  # fmt: skip


@app.command()
def recover(
    model: Model,
    out: Out,
    teacher: Annotated[
        str, typer.Option(metavar="MODEL", help="The model before it was compressed.")
    ],
    mode: Annotated[
        str,
        typer.Option(
            help="What trains: full; lora, merged at the end; norms, and biases; quantized, on the "
            "grid of --type."
        ),
    ] = "full",
    type_: Annotated[
        str,
        typer.Option(
            "--type",
            help="Of --mode quantized: INT4-G32, INT8-G64 ...; for a .gguf also Q8_0, Q4_0.",
        ),
    ] = "INT4-G32",
    rank: Annotated[int, typer.Option(help="Of --mode lora.")] = 8,
    fill_zeros: FillZeros = False,
    text: Text = None,
    eval_: Eval = None,
    hard: Hard = 0.0,
    soft: Soft = 1.0,
    hidden: Hidden = 0.0,
    attention: Attention = 0.0,
    temperature: Temperature = 1.0,
    on_policy: OnPolicy = 0.0,
    cache: Cache = 0,
    steps: Steps = None,
    epochs: Epochs = None,
    time_: Time = None,
    budget: Budget = None,
    next_percent: NextPercent = None,
    every: Every = None,
    batch: Batch = 8,
    micro: Micro = 4,
    length: Length = 256,
    windows: Windows = None,
    samples: Samples = 0,
    optimizer: OptimizerName = "adamw",
    rate: Rate = None,
    schedule: Schedule = "cosine",
    precision: Precision = None,
    recompute: Recompute = False,
    repeats: Repeats = None,
    select: Select = None,
    start_length: StartLength = 0,
    compiled: Compiled = False,
    device: Device = "auto",
    data: Data = "replicate",
    tensor: Tensor = 1,
    format_: Form = None,
    grid: Grid = "WORLD",
    seed: Seed = 0,
    json_: AsJson = False,
) -> None:
    """Win back what a compression took, by training against the model before it.

    Zeros stay zero. Without --text it learns from what the teacher writes. What is written is
    judged. The same command again goes on where it stopped.
    """
    distil = {
        "hard": hard, "soft": soft, "hidden": hidden, "attention": attention,
        "temperature": temperature, "on_policy": on_policy,
    }  # fmt: skip
    how = {"mode": mode, "rank": rank, "types": type_, "keep_zeros": not fill_zeros, "seed": seed}
    share = {"lora": 1.0, "norms": 1.0, "quantized": 0.02}.get(mode, 0.5)
    lesson, limits = _lesson(
        steps, epochs, time_, budget, next_percent, every, batch, micro, optimizer,
        _rate(rate, optimizer, share), schedule, precision, recompute, seed, None, repeats,
        select, distil, how, cache, data, tensor, start_length, compiled, device,
    )  # fmt: skip
    _run(
        "recover", model, out, lesson, limits, json_,
        teacher=teacher, text=text, evaluation=eval_, length=length, most=windows, samples=samples,
        form=format_, device=device, grid=grid,
    )  # fmt: skip


RATES = {"adamw": 1e-3, "muon": 1e-2, "adafactor": 1e-2, "momentum": 3e-2, "sgd": 1e-1}
"""For fresh weights of a small model; shares of it for weights that are trained already."""


def _rate(asked: float | None, optimizer: str, share: float) -> float:
    return asked if asked is not None else RATES.get(optimizer, 1e-3) * share


def _lesson(
    steps: int | None, epochs: float | None, time_: str | None, budget: str | None,
    next_percent: str | None, every: int | None, batch: int, micro: int, optimizer: str,
    rate: float, schedule: str, precision: str | None, recompute: bool, seed: int,
    sparse: str | None, repeats: float | None, select: str | None, distil: dict[str, Any],
    how: dict[str, Any], cache: int, data: str, tensor: int,
    start_length: int, compiled: bool, device: str,
) -> tuple[LessonSettings, Limits]:  # fmt: skip
    """Options -> settings. Raises `JoulesmithError` in one line."""
    from pydantic import ValidationError

    from joulesmith.compress.recipe import first_error
    from joulesmith.train.lesson import Limits, native_precision
    from joulesmith.train.lesson_settings import LessonSettings

    told = [n for n, v in (("steps", steps), ("epochs", epochs), ("time", time_)) if v is not None]
    if len(told) > 1:
        raise JoulesmithError(f"give one of --{' and --'.join(told)}")
    if epochs is not None and not 0 < epochs < math.inf:
        raise JoulesmithError(f"--epochs {epochs:g}: give more than 0")
    joules = None if budget is None else parse_joules(budget, "--budget")
    if not told and joules is None:
        raise JoulesmithError("say when to stop: --steps, --epochs, --time 30m or --budget 50kJ")
    limits = Limits(
        epochs=epochs,
        seconds=None if time_ is None else parse_duration(time_, "--time"),
        joules=joules if not told or time_ is not None else None,
    )
    plain: dict[str, Any] = {
        "train": {
            "steps": steps or 1, "batch": batch, "micro": min(micro, batch),
            "optimizer": optimizer, "rate": rate, "schedule": schedule,
            "precision": precision or native_precision(device), "recompute": recompute,
            "every": every or 0, "seed": seed, "budget_joules": joules,
            "start_length": start_length,
            "joules_per_percent": None if next_percent is None
            else parse_joules(next_percent, "--next-percent"),
        },
        "parallel": {"data": data, "tensor": tensor},
        "compiled": compiled, "distil": distil, "how": how, "cache": cache,
        "points": 0 if every else 12,
        "sparse": None if sparse is None else _sparse(sparse, seed),
        "data": {
            **({} if select is None else _select(select)),
            **({} if repeats is None else {"repeats": repeats}),
        },
    }  # fmt: skip
    try:
        found = LessonSettings(**plain)
    except ValidationError as e:
        raise JoulesmithError(first_error(e)) from e
    return found, limits


def _sparse(text: str, seed: int) -> dict[str, Any]:
    method, _, value = text.partition("=")
    found: dict[str, Any] = {"method": method, "seed": seed}
    if ":" in value:
        return {**found, "pattern": value}
    try:
        return {**found, "sparsity": float(value)}
    except ValueError as e:
        raise JoulesmithError(f"--sparse {text[:40]!r}: give e.g. rigl=0.8 or magnitude=2:4") from e


def _select(text: str) -> dict[str, Any]:
    head, sign, value = text.partition("=")
    by, colon, keep = head.rpartition(":")
    try:
        return {"by": by if colon else "loss", "keep": keep, "share": float(value if sign else "?")}
    except ValueError as e:
        raise JoulesmithError(
            f"--select {text[:40]!r}: give e.g. middle=0.5 or gradient:high=0.5"
        ) from e


def _run(
    kind: Any, model: str, out: Path, lesson: LessonSettings, limits: Limits, json_: bool,
    **given: Any,
) -> None:  # fmt: skip
    from joulesmith.job.training import Task, places, run
    from joulesmith.progress import Progress

    words = ["joulesmith", *sys.argv[1:]]
    task = Task(
        kind, model, out, lesson, limits, command=" ".join(shlex.quote(w) for w in words), **given
    )
    with interruptible("the same command goes on where it stopped"):
        found = run(task, Progress({}))
    if found is None:  # a rank that has nothing to say
        return
    if json_:
        print(found.model_dump_json(indent=1))
        return
    from joulesmith.report.training_tables import render_training

    render_training(found, console())
    print(f"Report: {places(out, task.format)[1]}")
