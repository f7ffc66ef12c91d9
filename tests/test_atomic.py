"""Files appear whole or not at all."""

import errno
import os
from collections import namedtuple

import pytest

from joulesmith import atomic
from joulesmith.atomic import atomic_folder, atomic_path
from joulesmith.errors import JoulesmithError


def test_a_file_appears_only_when_complete(tmp_path):
    final = tmp_path / "new" / "a.bin"
    with atomic_path(final) as temp:
        assert temp.parent == final.parent
        temp.write_bytes(b"whole")
        assert not final.exists()
    assert final.read_bytes() == b"whole"
    assert [p.name for p in final.parent.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_file_and_no_rubbish(tmp_path, error):
    final = tmp_path / "a.bin"
    final.write_bytes(b"old")
    with pytest.raises(error), atomic_path(final) as temp:
        temp.write_bytes(b"half")
        raise error
    assert final.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_with_the_bytes_needed(tmp_path, code):
    final = tmp_path / "a.bin"
    with (
        pytest.raises(JoulesmithError, match=r"disk full: .*1000 bytes"),
        atomic_path(final, needed=1000) as temp,
    ):
        temp.write_bytes(b"half")
        raise OSError(code, os.strerror(code))
    assert list(tmp_path.iterdir()) == []


def test_space_is_checked_before_writing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: usage(10, 5, 5))
    with (
        pytest.raises(JoulesmithError, match=r"not enough disk space.*6 bytes"),
        atomic_path(tmp_path / "a", needed=6),
    ):
        pytest.fail("the body must not run")


def test_a_parent_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(JoulesmithError, match="cannot write"), atomic_path(tmp_path / "f" / "a"):
        pytest.fail("the body must not run")


def test_a_folder_as_target_is_refused(tmp_path):
    with pytest.raises(JoulesmithError, match="not a regular file"), atomic_path(tmp_path):
        pytest.fail("the body must not run")


def test_other_errors_are_left_alone(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a"):
        (tmp_path / "elsewhere").read_bytes()


def test_a_folder_appears_whole(tmp_path):
    final = tmp_path / "model"
    final.mkdir()  # empty is fine
    with atomic_folder(final) as temp:
        (temp / "sub").mkdir()
        (temp / "sub" / "a").write_text("1")
    assert (final / "sub" / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_files_is_not_touched(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(JoulesmithError, match="not empty"), atomic_folder(tmp_path):
        pytest.fail("the body must not run")
    with pytest.raises(ValueError), atomic_folder(tmp_path / "new") as temp:
        (temp / "a").write_text("half")
        raise ValueError
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_files_of_a_folder_are_as_readable_as_the_folder(tmp_path):
    with atomic_folder(tmp_path / "out") as temp:
        (temp / "secret").write_text("x")
        (temp / "secret").chmod(0o600)
    folder, file = (p.stat().st_mode for p in (tmp_path / "out", tmp_path / "out" / "secret"))
    assert file & 0o777 == folder & 0o666
