"""The terminal table: 80 columns, plain in a pipe, no control codes from names."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from joulesmith.report import render_terminal
from joulesmith.report.result import Result


def show(
    result: Result, page: Path | None = None, *, width: int = 80, encoding: str = "utf-8"
) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    render_terminal(result, Console(file=file, width=width), page)
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [80, 120])
def test_fits(passed: Result, none: Result, width: int) -> None:
    for result in (passed, none):
        out = show(result, width=width)
        assert max(map(len, out.splitlines())) <= width
        assert "\x1b" not in out and "\r" not in out


def test_says_what_matters(passed: Result) -> None:
    page = Path(
        "/somewhere/rather/long/that/must/not/be/broken/by/the/width/of/the/console/report.html"
    )
    out = show(passed, page)
    flat = " ".join(out.split())
    assert passed.verdict in flat
    assert "1.24x fewer joules per token than smollm2-135m-q8_0.gguf, the file given" in flat
    assert "57.1 mJ" in out and "46.8 mJ" in out and "1.24x less" in out
    assert "lower 95 % bound 0.9905 clears the floor 0.99" in flat
    assert "modelled; workload 24.4 to 70.7 mJ per token (90 %)" in flat
    assert f"report: {page}" in out


def test_unknown_and_misses(none: Result) -> None:
    out = show(none)
    assert "nearest miss" in out and "unknown" in out
    assert "misses the floor 0.99" in out
    assert "None" not in out and "0 J" not in out


def test_a_loss_is_called_more(passed: Result) -> None:
    ratios = tuple(
        r.model_copy(update={"ratio": 0.8, "low": 0.78, "high": 0.82}) for r in passed.ratios
    )
    out = show(passed.model_copy(update={"ratios": ratios}))
    assert "1.25x more" in out and "x less" not in out


def test_markup_and_old_terminals(passed: Result) -> None:
    odd = passed.model_copy(update={"verdict": "[red]über[/red] \x1b[2J [/] 5 µJ"})
    assert "[red]über[/red]" in show(odd)
    out = show(odd, encoding="ascii")
    assert "[red]?ber[/red]" in out and "5 uJ" in out
