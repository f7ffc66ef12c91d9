"""Commands about this machine: its counters, and its watts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from joulesmith.cli.common import app, console, interruptible, print_json
from joulesmith.errors import JoulesmithError


@app.command()
def doctor(
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which sources of joules exist here, which are blocked, and how to open them."""
    from joulesmith.energy.doctor import examine, render

    findings = examine()
    if json_:
        print_json(findings)
    else:
        render(findings, console())


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
        with interruptible("nothing was stored"):
            found = room.calibrate(idle, max_, log, tell=lambda s: print(s, file=sys.stderr))
    for name, text in found.rows():
        print(f"{name:<14} {text}")
