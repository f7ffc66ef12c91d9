"""A run's folder: claimed once, resumed, never shared."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from joulesmith.errors import JoulesmithError
from joulesmith.workspace import Workspace, file_identity, fingerprint


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
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"], "left something there"


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


def test_an_error_before_any_work_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(JoulesmithError), Workspace(tmp_path / "run", {"a": 1}):
        raise JoulesmithError("bad text")
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(JoulesmithError), Workspace(tmp_path / "mine", {"a": 1}):
        raise JoulesmithError("bad text")
    assert list((tmp_path / "mine").iterdir()) == [], "a folder that was there stays"


def test_an_error_after_some_work_keeps_it(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Workspace(tmp_path / "run", {"a": 1}) as w:
        w.put("x", 1)
        raise KeyboardInterrupt
    with Workspace(tmp_path / "run", {"a": 1}) as w:
        assert w.get("x") == 1


def test_an_error_told_by_a_finished_run_keeps_it(tmp_path: Path) -> None:
    """A run that ends with "no plan keeps the quality" raises after its work is cleaned away."""
    for _ in range(2):  # the second time the result is only read
        with pytest.raises(JoulesmithError, match="told"), Workspace(tmp_path / "run", {}) as space:
            space.write_json(space.folder / "result.json", {})
            space.clean()
            raise JoulesmithError("told")
        with pytest.raises(JoulesmithError, match="told"), Workspace(tmp_path / "run", {}):
            raise JoulesmithError("told")  # work is there again, and empty
        assert (tmp_path / "run" / "run.json").exists()
        assert (tmp_path / "run" / "result.json").exists()


def test_a_refused_claim_takes_nothing_away(tmp_path: Path) -> None:
    with Workspace(tmp_path, {"a": 1}):
        pass
    with pytest.raises(JoulesmithError, match="a differ"), Workspace(tmp_path, {"a": 2}):
        pass
    assert (tmp_path / "run.json").exists()


def test_files_that_change_are_told_apart(tmp_path: Path) -> None:
    assert file_identity(None) is None
    assert file_identity("hf:some/set") == ["hf:some/set"]
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"one")
    folder, file = file_identity(str(tmp_path)), file_identity(str(path))
    assert file_identity(str(tmp_path)) == folder
    os.utime(path, ns=(1, 1))
    assert file_identity(str(tmp_path)) != folder and file_identity(str(path)) != file


def test_a_damaged_stage_is_computed_again(tmp_path: Path) -> None:
    with Workspace(tmp_path, {}) as w:
        w.put("x", 1)
        (w.work / "x.json").write_text("{half")
        assert w.once("x", lambda: 3) == 3


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(JoulesmithError, match="cannot write"),
        Workspace(tmp_path / "file" / "x", {}),
    ):
        pass


def test_fingerprint_ignores_order() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
