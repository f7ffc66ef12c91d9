"""What all commands share: the app, options, values in words, and how answers are shown."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Optional

import typer

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


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="smollm2 (bundled), a .gguf file, a Hugging Face folder (safetensors), a llama2.c "
        "file, or a hub id.",
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

Calib = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Text file to calibrate on. Default: the model's own samples."),
]
Eval = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--eval", help="Text file to judge on. Default: English that Python ships."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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


def parse_duration(text: str, option: str = "--time-budget") -> float:
    """ "10m", "600s", "50ms", "1h", "90" (seconds) -> seconds. Raises `JoulesmithError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|min|h)?", text.strip())
    if match is None:
        raise JoulesmithError(f"{option} is a time such as 50ms, 600s, 10m or 1h, got {text!r}")
    return float(match[1]) * {"ms": 1e-3, "s": 1, "m": 60, "min": 60, "h": 3600, None: 1}[match[2]]


def parse_latency(text: str) -> float:
    """As `parse_duration`, with a unit: of bare numbers, nobody knows whether they are seconds."""
    if re.fullmatch(r"[\d.]+", text.strip()):
        raise JoulesmithError(f"--latency {text.strip()} has no unit: give 50ms or 0.5s")
    return parse_duration(text, "--latency")


@contextmanager
def interruptible(advice: str) -> Iterator[None]:
    """Ctrl-C is a decision, not an accident: one line and the usual exit code."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\njoulesmith: interrupted; {advice}", file=sys.stderr)
        raise typer.Exit(130) from None


def console() -> Any:
    from rich.console import Console

    return Console()


def show(result: Any) -> None:
    from joulesmith.report import render_terminal

    render_terminal(result, console())


def print_json(value: Any) -> None:
    import dataclasses
    import json

    many = isinstance(value, list | tuple)
    found = [dataclasses.asdict(v) for v in value] if many else dataclasses.asdict(value)
    print(json.dumps(found, indent=1))
