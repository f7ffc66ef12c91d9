"""``result.json`` on disk. Knows no layout and no run."""

from __future__ import annotations

from pathlib import Path

from joulesmith.atomic import atomic_path
from joulesmith.errors import JoulesmithError
from joulesmith.report.result import Result, read_result

RESULT_NAME = "result.json"
PAGE_NAME = "report.html"


def write_json(result: Result, path: Path) -> None:
    """Write ``result`` whole or not at all: an interrupted write leaves the old file."""
    text = result.model_dump_json(indent=1)
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode() + b"\n")


def load_result(folder: Path) -> Result:
    """The result of a run folder (or of a ``result.json`` itself).

    Raises `JoulesmithError`, one line, where there is none.
    """
    if folder.is_file():
        return read_result(folder)
    if not folder.is_dir():
        raise JoulesmithError(f"no such run folder: {folder}")
    path = folder / RESULT_NAME
    if not path.is_file():
        raise JoulesmithError(
            f"no {RESULT_NAME} in {folder}: the run has not finished; "
            "the same command again takes it up where it stopped"
        )
    return read_result(path)
