"""The command line: parse, call, render. No work is done here."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from joulesmith._version import __version__
from joulesmith.cli.common import app, parse_duration, parse_keep, parse_workload
from joulesmith.errors import JoulesmithError
from joulesmith.ranks import leaving

# isort: off
# In the order in which --help lists the commands.
from joulesmith.cli import make, training, measuring, machine, looking, estimating  # noqa: F401
# isort: on

__all__ = ["app", "main", "parse_duration", "parse_keep", "parse_workload"]


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


def main() -> None:
    """Entry point: errors that a user can act on become one line and an exit code."""
    with leaving():
        _run()


def _run() -> None:
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
