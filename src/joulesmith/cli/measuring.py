"""Commands that measure joules: of a model, and of any command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from joulesmith.cli.common import (
    EngineLib,
    EngineName,
    Model,
    Workload,
    app,
    console,
    interruptible,
    parse_workload,
    print_json,
)
from joulesmith.errors import JoulesmithError


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
    with interruptible("nothing was written"), progress.stage("measure") as tick:
        found = measure(
            model,
            workload=parse_workload(workload),
            repeat=repeat,
            engine=engine,
            engine_lib=engine_lib,
            progress=tick,
        )
    if json_:
        print_json(found)
    else:
        from joulesmith.report.model_tables import render_measurement

        render_measurement(found, console())


@app.command(context_settings={"allow_interspersed_args": False})
def measure(
    command: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="COMMAND", help="The command with its own options, after --."),
    ] = None,
    repeat: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Runs; medians and spread are shown. Default: 1, with --compare 5."),
    ] = None,
    compare: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="'OTHER COMMAND'",
            help="Run OTHER in turn with COMMAND and show OTHER / COMMAND. No shell: for a pipe "
            "give  sh -c '...'.",
        ),
    ] = None,
    label: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="What to call COMMAND in the report."),
    ] = None,
    grid: Annotated[
        str,
        typer.Option(
            help="Grid by country or region, e.g. DE, or grams of CO2e per kWh, or FILE.csv: "
            "hourly values (:ZONE), or a table of your own (:CODE)."
        ),
    ] = "WORLD",
    price: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Price by country, or money per kWh, or FILE.csv as for --grid. Default: the "
            "price where --grid is."
        ),
    ] = None,
    pue: Annotated[
        float, typer.Option(help="Energy of the building / energy of the machine, 1 or more.")
    ] = 1.0,
    idle: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="Measure the idle machine first: joules above idle."),
    ] = 0.0,
    meter_at: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--meter",
            metavar="WHERE",
            help="A meter at the wall: file:PATH or command:PROGRAM that gives watts.",
        ),
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="Print JSON, one line, the last on standard output.")
    ] = False,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", metavar="FILE", help="Write the report to FILE."),
    ] = None,
) -> None:
    """Measure what a command and all that it starts cost: joules, watts, memory, carbon, money.

    The command has standard input, output and error to itself. The report goes to
    standard error when the command has ended, as with time and perf stat; with --json to
    standard output; with -o FILE only there. The exit code is the command's (128 + n after
    signal n; 127 not found, 126 not executable). Ctrl-C goes to the command, and what was
    measured is still reported.
    """
    import shlex

    from joulesmith.energy import command as room
    from joulesmith.energy.cpu_time import Descendants
    from joulesmith.energy.meter import EnergyMeter
    from joulesmith.energy.rates import carbon_rate, price_for, price_rate

    if not command:
        raise JoulesmithError("no command given: joulesmith measure [options] -- COMMAND...")
    commands = [(label or shlex.join(command), command)]
    if compare is not None:
        commands.append((compare, split_command(compare)))
    if not pue >= 1 or pue == float("inf"):
        raise JoulesmithError(f"--pue must be 1 or more, got {pue:g}")
    if not 0 <= idle <= 3600:
        raise JoulesmithError(f"--idle must be a number of seconds up to 3600, got {idle:g}")
    if repeat is None:
        repeat = 1 if compare is None else room.COMPARE_ROUNDS
    where = carbon_rate(grid)
    rate = price_for(where) if price is None else price_rate(price)
    if output is not None:
        check_output(output)
    with (
        interruptible("nothing was measured"),
        EnergyMeter(Descendants(), external=meter_at) as meter,
    ):
        if idle and any(source.devices for source in meter.sources):
            meter.measure_idle(idle)
        elif idle:
            print("joulesmith: no counter here: idle watts are the model's", file=sys.stderr)
        rounds = room.measure_commands(commands, repeat, meter)
        found = room.report(rounds, meter, where, rate, pue)
    try:
        _tell(found, json_, output)
    except JoulesmithError as e:
        # The command's own failure tells more than ours.
        print(f"joulesmith: {e}", file=sys.stderr)
        raise typer.Exit(rounds.exit_code or e.exit_code) from None
    raise typer.Exit(rounds.exit_code)


def split_command(text: str) -> list[str]:
    """A command as a shell's words. Raises `JoulesmithError`."""
    import shlex

    try:
        words = shlex.split(text)
    except ValueError as e:
        raise JoulesmithError(f"--compare is no command: {text!r}: {e}") from None
    if not words:
        raise JoulesmithError("--compare is empty: give a command in quotes")
    return words


def check_output(path: Path) -> None:
    """Before hours of measuring: can the report be written? Raises `JoulesmithError`."""
    special = path.exists() and not path.is_file()  # /dev/stderr, a pipe: written as it is
    place = path if special else path.parent
    if path.is_dir() or not place.exists() or not os.access(place, os.W_OK):
        raise JoulesmithError(f"cannot write: {path}: give a file in a writable folder")


def _tell(found: Any, json_: bool, output: Path | None) -> None:
    """The report of `measure`, where it was asked for."""
    import io
    import json

    text = json.dumps(found.to_dict(), allow_nan=False) + "\n" if json_ else ""
    if json_ and output is None:
        # The command's own output may lack its last line break.
        print(f"\n{text}", end="", flush=True)
        return
    from rich.console import Console

    from joulesmith.report.energy_tables import render_report

    if output is None:
        render_report(found, Console(stderr=True, highlight=False))
        return
    from joulesmith.atomic import atomic_path

    if not json_:
        page = io.StringIO()
        render_report(found, Console(file=page, width=120, highlight=False))
        text = page.getvalue()
    if output.exists() and not output.is_file():
        output.write_text(text, encoding="utf-8")
        return
    with atomic_path(output) as temp:
        temp.write_text(text, encoding="utf-8")
