"""What people look at: page, terminal, JSON.

Names load on first use: the page needs the optional chart packages, reading a
result does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from joulesmith.report.files import load_result, write_json
    from joulesmith.report.page import write_page
    from joulesmith.report.terminal import render_terminal

__all__ = ["load_result", "render_terminal", "write_json", "write_page"]

_HOME = {
    "load_result": "files",
    "render_terminal": "terminal",
    "write_json": "files",
    "write_page": "page",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
