"""What people look at: page, terminal, JSON.

Names load on first use: the page needs the optional chart packages, reading a
result does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from joulesmith.report.files import load_result, write_json
    from joulesmith.report.heat_map import damage_of, heat_map_page, render_map
    from joulesmith.report.page import write_page
    from joulesmith.report.terminal import render_terminal

__all__ = [
    "damage_of",
    "heat_map_page",
    "load_result",
    "render_map",
    "render_terminal",
    "write_json",
    "write_page",
]

_HOME = {
    "damage_of": "heat_map",
    "heat_map_page": "heat_map",
    "render_map": "heat_map",
    "load_result": "files",
    "render_terminal": "terminal",
    "write_json": "files",
    "write_page": "page",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
