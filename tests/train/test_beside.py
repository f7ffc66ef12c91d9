"""Joules beside the steps of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from joulesmith.energy.reading import Reading
from joulesmith.errors import JoulesmithError
from joulesmith.train.beside import Beside

BAD = (
    "",
    "[]",
    '{"joules": {"a": "b"}, "pedigree": null, "lost": [], "begun": null}',
    '{"joules": {}, "pedigree": "sure", "lost": [], "begun": null}',
    "[" * 100_000,
)


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
    again = Beside(Meter(5.0, 2.0, 1.0), path)
    with again.of("text"):
        pass
    assert again.joules == {"text": 8.0, "judging": 4.0} and again.pedigree == "modelled"
    with pytest.raises(KeyError), again.of("judging"):
        raise KeyError
    assert again.joules["judging"] == 6.0, "what was spent until it failed"
    with again.of("judging"):
        pass
    assert Beside(None, path).joules == again.joules == {"text": 8.0, "judging": 7.0}
    assert again.notes == []


def test_a_run_that_was_killed_is_told(tmp_path: Path) -> None:
    path = tmp_path / "beside.json"
    some = Beside(Meter(3.0, 4.0), path)
    with some.of("text"):
        assert not path.exists(), "an error here leaves no trace"
    with some.of("judging"):
        killed = path.read_bytes()
    path.write_bytes(killed)
    on = Beside(Meter(1.0), path)
    with on.of("judging"):
        pass
    assert "killed during: judging" in Beside(None, path).notes[0]
    assert on.joules == {"text": 3.0, "judging": 1.0}


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


@pytest.mark.parametrize("body", BAD)
def test_a_damaged_file_is_told(tmp_path: Path, body: str) -> None:
    path = tmp_path / "beside.json"
    path.write_text(body)
    with pytest.raises(JoulesmithError, match="damaged"):
        Beside(None, path)
