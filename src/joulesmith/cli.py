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


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    type_: Annotated[
        str,
        typer.Option(
            "--type",
            help="INT4-G128, INT4-G64-ZP (with zeros), INT8-G128 ...; with 8-bit inputs too: "
            "W8A8, W8A8-STATIC, FP8.",
        ),
    ] = "INT4-G64",
    calib: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Text file to calibrate on. Default: the model's own samples."),
    ] = None,
    eval_: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--eval", help="Text file to judge on. Default: English that Python ships."),
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help="compressed-tensors, onnx or openvino.")
    ] = "compressed-tensors",
    effort: Annotated[
        str,
        typer.Option(
            help="nearest; default: error feedback, then scales and norms tuned; thorough: "
            "rounding learned block by block as well, many times slower."
        ),
    ] = "default",
    rotate: Annotated[
        bool,
        typer.Option("--rotate", help="Rotate the residual stream first; unties a tied head."),
    ] = False,
    map_: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--map", help="HTML file to write: the damage of every matrix, as a map."),
    ] = None,
    kv_cache: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Judge with keys and values on 8 or 4 bits as well."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling and of splits.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Quantize a model for vLLM, transformers, ONNX Runtime or OpenVINO; say what is kept.

    Every matrix of the decoder blocks gets the one type; the rest is float16. What is kept
    is judged with inputs rounded, where the type does that. The same command again goes on
    where it stopped.
    """
    from joulesmith.job.quantize import quantize as run
    from joulesmith.progress import Progress

    if map_ is not None and not map_.parent.is_dir():
        raise JoulesmithError(f"no such folder for --map: {map_.parent}")
    with _interruptible("the same command goes on where it stopped"):
        found = run(
            model,
            type_,
            out,
            calib=calib,
            evaluation=eval_,
            seed=seed,
            kv_cache=kv_cache,
            effort=effort,
            rotate=rotate,
            form=format_,
            progress=Progress({}),
        )
    if map_ is not None:
        from joulesmith.report import damage_of, heat_map_page

        title = f"{found.type} of {model}"
        heat_map_page(damage_of(found.damage, found.type, found.bits_per_weight, title=title), map_)
    if json_:
        _print_json(found)
    else:
        from joulesmith.report.model_tables import render_quantized

        render_quantized(found, _console())


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
    from joulesmith.energy.rates import carbon_rate, price_rate

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
    rate = room.price_for(where) if price is None else price_rate(price)
    if output is not None:
        check_output(output)
    with (
        _interruptible("nothing was measured"),
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


@app.command()
def doctor(
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which sources of joules exist here, which are blocked, and how to open them."""
    from joulesmith.energy.doctor import examine, render

    findings = examine()
    if json_:
        _print_json(findings)
    else:
        render(findings, _console())


@app.command("calibrate-power")
def calibrate_power(
    idle: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="WATTS", help="Draw of the machine when nothing runs."),
    ] = None,
    max_: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--max", metavar="WATTS", help="Draw of the machine with all CPUs busy."),
    ] = None,
    log: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE",
            help="CSV of a wall meter: watts with load, or time,watts while this command steps "
            "the load (about two minutes).",
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Show what is stored.")] = False,
    forget: Annotated[bool, typer.Option("--forget", help="Remove what is stored.")] = False,
) -> None:
    """Tell the power model this machine's watts, once: modelled joules come within about 15 %.

    Watts are those of the whole machine at the wall, without GPUs.
    """
    from joulesmith.energy import calibrate_power as room

    if show + forget + (log is not None) + (idle is not None or max_ is not None) != 1:
        raise JoulesmithError("give --idle W --max W, or --log FILE, or --show, or --forget")
    if forget:
        print("Forgotten." if room.forget() else "Nothing was stored.")
        return
    if show:
        found = room.load()
        if found is None:
            print("Nothing is stored: joulesmith calibrate-power --idle W --max W")
            return
    else:
        with _interruptible("nothing was stored"):
            found = room.calibrate(idle, max_, log, tell=lambda s: print(s, file=sys.stderr))
    for name, text in found.rows():
        print(f"{name:<14} {text}")


@app.command()
def inspect(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE_OR_FOLDER",
            help=".gguf, .safetensors, a Hugging Face folder, .onnx, OpenVINO .xml, llama2.c.",
        ),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    map_: Annotated[
        bool, typer.Option("--map", help="Bits per weight of every matrix, layers by roles.")
    ] = False,
    joules: Annotated[
        bool,
        typer.Option(
            "--joules",
            help="Predict joules per decoded token: measures matrices like these for up to a "
            "minute, once.",
        ),
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a model file holds: architecture, types, bits per weight, bytes, joules.

    Only headers are read; nothing in the file is run or unpacked.
    """
    from joulesmith.inspection import inspect_model

    found = inspect_model(file)
    if joules:
        from dataclasses import replace

        from joulesmith.job.cost import decode_cost
        from joulesmith.progress import Progress

        progress = Progress({"measure": 1})
        with _interruptible("nothing was written"), progress.stage("measure") as tick:
            found = replace(found, cost=decode_cost(found, tick))
    if json_:
        _print_json(found)
    else:
        from joulesmith.report.model_tables import render_inspection

        render_inspection(found, _console(), every_tensor=tensors, heat_map=map_)


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


def _print_json(value: Any) -> None:
    import dataclasses
    import json

    many = isinstance(value, list | tuple)
    found = [dataclasses.asdict(v) for v in value] if many else dataclasses.asdict(value)
    print(json.dumps(found, indent=1))


def main() -> None:
    """Entry point: errors that a user can act on become one line and an exit code."""
    try:
        app()
    except JoulesmithError as e:
        # Names in it may come from a file: nothing in them drives the terminal.
        line = " ".join(str(e).split())
        message = "".join(c if c.isprintable() else "\ufffd" for c in line)
        print(f"joulesmith: {message}", file=sys.stderr)
        sys.exit(e.exit_code)
    except BrokenPipeError:
        # The reader went away: nothing more to say, and nothing to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
