"""A CSV file with one frozen dataclass a row. Knows no devices.

The columns are the dataclass's fields, units in their names; a cell that is left empty is
unknown. Files are hostile input: sizes are bounded, numbers are plain, and what is wrong
is told in one line with the file, the line and the column.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import io
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from joulesmith.errors import JoulesmithError

MAX_BYTES = 1_000_000
MAX_ROWS = 5_000
MAX_CELL = 2_000
MAX_NUMBER = 1e12

_NUMBER = re.compile(r"\d{1,13}(?:\.\d{1,12})?(?:[eE][+-]?\d{1,2})?", re.ASCII)
Cells = dict[str, Any]


def shipped(file: str) -> str:
    """Text of a table of this package."""
    return (resources.files("joulesmith.estimate") / file).read_text(encoding="utf-8")


def read(path: Path | str) -> str:
    """Text of a user's file. Raises `JoulesmithError` where there is none or it is too large."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise JoulesmithError(f"not a file: {path}: give a CSV file")
        with path.open("rb") as f:
            data = f.read(MAX_BYTES + 1)
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", None) or e
        raise JoulesmithError(f"cannot read: {path}: {why}: give a CSV file") from e
    if len(data) > MAX_BYTES:
        raise JoulesmithError(f"too large: {path}: more than {MAX_BYTES} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise JoulesmithError(f"not a text file: {path}: give a CSV file in UTF-8") from e


def parse(
    text: str, name: str, cls: type[Any], needed: Sequence[str], extra: Sequence[str] = ()
) -> Iterator[tuple[str, Cells]]:
    """Where each row stands, and its cells by field, empty ones left out.

    cls: a dataclass of fields str, tuple[str, ...] (cells split at ";"), int | None (a
    year) and float | None (above 0). needed: columns that each row must fill. extra:
    columns of text beside the fields. Raises `JoulesmithError`.
    """
    kinds = {f.name: str(f.type) for f in dataclasses.fields(cls)} | dict.fromkeys(extra, "str")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    count = 0
    try:
        for row in reader:
            row = [cell.strip() for cell in row]
            if not any(row):
                continue
            where = f"{name}, line {reader.line_num}"
            if header is None:
                header = _header(row, where, kinds, needed)
                continue
            count += 1
            if count > MAX_ROWS:
                raise JoulesmithError(f"{where}: more than {MAX_ROWS} rows")
            if len(row) > len(header):
                raise JoulesmithError(f"{where}: {len(row)} cells, the header has {len(header)}")
            cells = {
                column: _value(cell, kinds[column], f"{where}, {column}")
                for column, cell in zip(header, row, strict=False)
                if cell
            }
            for column in needed:
                if column not in cells:
                    raise JoulesmithError(f"{where}, {column}: empty: every row needs it")
            yield where, cells
    except csv.Error as e:
        raise JoulesmithError(f"{name}, line {reader.line_num}: not CSV: {e}") from e
    if header is None:
        raise JoulesmithError(f"{name}: empty: it needs a header with {', '.join(needed)}")


def _header(row: list[str], where: str, kinds: dict[str, str], needed: Sequence[str]) -> list[str]:
    for column in row:
        if column not in kinds:
            near = difflib.get_close_matches(column[:40].lower(), kinds, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"columns: {', '.join(kinds)}"
            raise JoulesmithError(f"{where}: unknown column {column[:40]!r}: {hint}")
        if row.count(column) > 1:
            raise JoulesmithError(f"{where}: column {column} stands there twice")
    for column in needed:
        if column not in row:
            raise JoulesmithError(f"{where}: no column {column!r}")
    return row


def _value(cell: str, kind: str, where: str) -> Any:
    if len(cell) > MAX_CELL or any(c < " " or c == "\x7f" for c in cell):
        raise JoulesmithError(f"{where}: text must be one line of at most {MAX_CELL} characters")
    if kind == "str":
        return cell
    if kind.startswith("tuple"):
        return tuple(part.strip() for part in cell.split(";") if part.strip())
    if kind.startswith("int"):
        if re.fullmatch(r"(?:19|20)\d\d", cell, re.ASCII):
            return int(cell)
        raise JoulesmithError(f"{where}: must be a year like 2024, got {cell[:40]!r}")
    value = float(cell) if _NUMBER.fullmatch(cell) else 0.0
    if 0 < value <= MAX_NUMBER:
        return value
    raise JoulesmithError(
        f"{where}: must be a number above 0 without a unit, or empty when unknown, "
        f"got {cell[:40]!r}"
    )
