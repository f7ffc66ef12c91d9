"""The command line: parse, call, render. No work is done here."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from joulesmith._version import __version__
from joulesmith.errors import JoulesmithError

app = typer.Typer(
    name="joulesmith",
    help="Make language models spend fewer joules, at a quality floor you set.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        print(f"joulesmith {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="smollm2 (bundled), a .gguf file, a Hugging Face folder (safetensors), or a hub id.",
    ),
]
Workload = Annotated[
    str, typer.Option(help="Tokens of the request to make cheap, as prefill:decode.")
]
EngineName = Annotated[str, typer.Option("--engine", help="Engine that runs the model.")]
EngineLib = Annotated[
    Optional[str],  # noqa: UP045 - typer reads the annotation on Python 3.10
    typer.Option(help="A llama.cpp library to use instead of the wheel's (see docs/engine.md)."),
]


@app.command()
def optimize(
    model: Model,
    keep: Annotated[
        str,
        typer.Option(
            help="Least quality to keep: a share (perplexity ratio), or a type such as Q4_K_M: "
            "what that keeps."
        ),
    ] = "0.99",
    engine: EngineName = "llama.cpp",
    workload: Workload = "64:256",
    calib: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Text file to calibrate on. Default: the model's own samples."),
    ] = None,
    eval_: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--eval",
            help="Text file (or hf:DATASET) to judge on. Default: English that Python ships.",
        ),
    ] = None,
    grid: Annotated[
        str, typer.Option(help="Country or region of the electricity grid, e.g. DE.")
    ] = "WORLD",
    time_budget: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="About how long it may take, e.g. 10m or 600s: fewer trials, same floor."
        ),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of the run. Default: one under joulesmith-out/."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling and of splits.")] = 0,
    pairs: Annotated[int, typer.Option(help="Interleaved rounds of measuring.")] = 7,
    engine_lib: EngineLib = None,
) -> None:
    """Find the cheapest model above the floor, write it, measure it, report it.

    The same command again goes on where it stopped, or says that it is done. Exit code 3:
    no plan keeps the quality that was asked for.
    """
    from joulesmith.job.run import run
    from joulesmith.job.settings import Settings
    from joulesmith.progress import Progress
    from joulesmith.report.files import PAGE_NAME, RESULT_NAME, load_result

    settings = Settings(
        model=model,
        keep=parse_keep(keep),
        engine=engine,
        workload=parse_workload(workload),
        calib=calib,
        eval=eval_,
        grid=grid,
        time_budget=None if time_budget is None else parse_duration(time_budget),
        out=out,
        seed=seed,
        pairs=pairs,
        engine_lib=engine_lib,
    )
    folder = settings.folder()
    done = (folder / RESULT_NAME).exists()
    try:
        with _interruptible("the same command goes on where it stopped"):
            run(settings, Progress({}))
    finally:
        if (folder / RESULT_NAME).exists():
            _show(load_result(folder))
            print(f"Report: {folder / PAGE_NAME}")
            if done:
                print("This run was done before; nothing was computed again.")


@app.command("measure-model")
def measure_model(
    model: Model,
    workload: Workload = "64:256",
    repeat: Annotated[int, typer.Option(help="Requests to measure; medians are shown.")] = 5,
    engine: EngineName = "llama.cpp",
    engine_lib: EngineLib = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure joules per token of a model as it is, prefill and decode apart."""
    from joulesmith.measure import measure_model as measure
    from joulesmith.progress import Progress

    progress = Progress({"measure": 1})
    with _interruptible("nothing was written"), progress.stage("measure") as tick:
        found = measure(
            model,
            workload=parse_workload(workload),
            repeat=repeat,
            engine=engine,
            engine_lib=engine_lib,
            progress=tick,
        )
    if json_:
        _print_json(found)
    else:
        from joulesmith.report.model_tables import render_measurement

        render_measurement(found, _console())


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A .gguf file.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a model file holds: architecture, types, bits per weight, bytes."""
    from joulesmith.gguf_file import read_gguf
    from joulesmith.inspection import summarize

    found = summarize(read_gguf(file))
    if json_:
        _print_json(found)
    else:
        from joulesmith.report.model_tables import render_inspection

        render_inspection(found, _console(), every_tensor=tensors)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a finished run.")],
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show a finished run again, and write its page anew."""
    from joulesmith.report.files import PAGE_NAME, load_result

    result = load_result(folder)
    if json_:
        print(result.model_dump_json(indent=1))
        return
    from joulesmith.report import write_page

    page = (folder if folder.is_dir() else folder.parent) / PAGE_NAME
    write_page(result, page)
    _show(result)
    print(f"Report: {page}")


def parse_keep(text: str) -> float | str:
    """ "0.99" -> 0.99; anything else is taken as the name of a mixture."""
    try:
        return float(text)
    except ValueError:
        return text


def parse_workload(text: str) -> tuple[int, int]:
    """ "64:256" -> (64, 256). Raises `JoulesmithError`."""
    match = re.fullmatch(r"(\d{1,7}):(\d{1,7})", text.strip())
    if match is None:
        raise JoulesmithError(f"--workload is prefill:decode, e.g. 64:256, got {text!r}")
    return int(match[1]), int(match[2])


def parse_duration(text: str) -> float:
    """ "10m", "600s", "1h", "90" (seconds) -> seconds. Raises `JoulesmithError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h)?", text.strip())
    if match is None:
        raise JoulesmithError(f"--time-budget is a time such as 10m, 600s or 1h, got {text!r}")
    return float(match[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600, None: 1}[match[2]]


@contextmanager
def _interruptible(advice: str) -> Iterator[None]:
    """Ctrl-C is a decision, not an accident: one line and the usual exit code."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\njoulesmith: interrupted; {advice}", file=sys.stderr)
        raise typer.Exit(130) from None


def _console() -> Any:
    from rich.console import Console

    return Console()


def _show(result: Any) -> None:
    from joulesmith.report import render_terminal

    render_terminal(result, _console())


def _print_json(value: Any) -> None:
    import dataclasses
    import json

    print(json.dumps(dataclasses.asdict(value), indent=1))


def main() -> None:
    """Entry point: errors that a user can act on become one line and an exit code."""
    try:
        app()
    except JoulesmithError as e:
        message = " ".join(str(e).split())
        print(f"joulesmith: {message}", file=sys.stderr)
        sys.exit(e.exit_code)
    except BrokenPipeError:
        # The reader went away: nothing more to say, and nothing to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
