"""A run's folder: claimed once, resumed, never shared."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from joulesmith.errors import JoulesmithError
from joulesmith.workspace import Workspace, fingerprint


def test_the_same_arguments_resume(tmp_path: Path) -> None:
    with Workspace(tmp_path / "run", {"a": 1}) as w:
        assert w.once("x", lambda: {"v": 2}) == {"v": 2}
    with Workspace(tmp_path / "run", {"a": 1}) as w:
        assert w.once("x", lambda: pytest.fail("computed again")) == {"v": 2}


def test_other_arguments_are_refused_by_name(tmp_path: Path) -> None:
    with Workspace(tmp_path, {"a": 1, "b": 2}):
        pass
    with (
        pytest.raises(JoulesmithError, match=r"other arguments \(b differ\)"),
        Workspace(tmp_path, {"a": 1, "b": 3}),
    ):
        pass


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(JoulesmithError, match="not empty"), Workspace(tmp_path, {}):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_two_processes_do_not_share(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from joulesmith.workspace import Workspace\n"
        "from joulesmith.errors import JoulesmithError\n"
        "try:\n"
        "    with Workspace(Path(sys.argv[1]), {}): pass\n"
        "except JoulesmithError as e: print(e)"
    )
    with Workspace(tmp_path, {}):
        out = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
        )
    assert "another joulesmith works" in out.stdout


def test_a_damaged_stage_is_computed_again(tmp_path: Path) -> None:
    with Workspace(tmp_path, {}) as w:
        w.put("x", 1)
        (w.work / "x.json").write_text("{half")
        assert w.once("x", lambda: 3) == 3


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JoulesmithError, match="cannot use"), Workspace(tmp_path / "file" / "x", {}):
        pass


def test_fingerprint_ignores_order() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
