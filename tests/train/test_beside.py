"""Joules beside the steps of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from joulesmith.energy.reading import Reading
from joulesmith.errors import JoulesmithError
from joulesmith.train.beside import Beside


class Meter:
    """Windows of so many joules, one after the other."""

    def __init__(self, *joules: float | None) -> None:
        self.joules = list(joules)

    def window(self, name: str) -> Any:
        joules = self.joules.pop(0)

        class Window:
            reading = Reading(joules, 1.0, pedigree=None if joules is None else "modelled")

            def __enter__(self) -> Window:
                return self

            def __exit__(self, *exc: object) -> None: ...

        return Window()


def test_adds_up_over_runs(tmp_path: Path) -> None:
    path = tmp_path / "beside.json"
    first = Beside(Meter(3.0, 4.0), path)
    with first.of("text"):
        pass
    with first.of("judging", together=False):
        pass
    again = Beside(Meter(5.0, None, 1.0), path)
    with again.of("text"):
        pass
    assert again.joules == {"text": 8.0, "judging": 4.0} and again.pedigree == "modelled"
    with pytest.raises(KeyError), again.of("judging"):
        raise KeyError
    assert again.joules["judging"] == 4.0, "what failed is not counted, its window was 0"
    with again.of("judging"):
        pass
    assert Beside(None, path).joules == again.joules


def test_unknown_stays_unknown(tmp_path: Path) -> None:
    some = Beside(Meter(3.0, None, 4.0), tmp_path / "beside.json")
    for _ in range(3):
        with some.of("text"):
            pass
    assert Beside(None, tmp_path / "beside.json").joules == {"text": None}


def test_without_a_meter() -> None:
    none = Beside()
    with none.of("text"):
        pass
    assert none.joules == {}


@pytest.mark.parametrize("body", ["", "[]", "[[], null]", '[{"a": "b"}, null]', '[{}, "sure"]'])
def test_a_damaged_file_is_told(tmp_path: Path, body: str) -> None:
    path = tmp_path / "beside.json"
    path.write_text(body)
    with pytest.raises(JoulesmithError, match="damaged"):
        Beside(None, path)
