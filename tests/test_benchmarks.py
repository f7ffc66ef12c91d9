"""Every benchmark still imports what it names: they run too long to be run here."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(
    ".".join(p.relative_to(ROOT).with_suffix("").parts)
    for folder in ("benchmarks", "benchmarks/quantizers", "benchmarks/pruners")
    for p in (ROOT / folder).glob("*.py")
    if p.stem not in ("__init__", "__main__")
)


@pytest.mark.parametrize("name", NAMES)
def test_it_imports(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # for those that run as scripts
    monkeypatch.syspath_prepend(str(ROOT))
    assert importlib.import_module(name).__doc__
