"""The optional build: everything up to the compiler, and refusals in one line."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from joulesmith.engines import native
from joulesmith.errors import EngineError


def archive(path: Path, names: dict[str, bytes], link: str | None = None) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in names.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        if link is not None:
            info = tarfile.TarInfo(link)
            info.type = tarfile.SYMTYPE
            info.linkname = "/etc/passwd"
            tar.addfile(info)
    return path


HEADER = "xllamacpp-1/thirdparty/llama.cpp/include/llama.h"


def test_only_the_engine_is_unpacked(tmp_path: Path) -> None:
    names = {HEADER: b"x", "xllamacpp-1/setup.py": b"evil", "xllamacpp-1/thirdparty/other/a": b"y"}
    link = "xllamacpp-1/thirdparty/llama.cpp/link"
    tree = native._unpack(archive(tmp_path / "a.tar.gz", names, link), tmp_path / "out")
    assert [p.name for p in sorted(tree.rglob("*"))] == ["include", "llama.h"]


@pytest.mark.parametrize(
    "name",
    [
        "xllamacpp-1/thirdparty/llama.cpp/../../../../x",
        "xllamacpp-1/thirdparty/llama.cpp/a/../../../b",
    ],
)
def test_names_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(EngineError, match="unsafe name"):
        native._unpack(archive(tmp_path / "a.tar.gz", {HEADER: b"", name: b""}), tmp_path / "o")
    assert not (tmp_path / "x").exists() and not (tmp_path / "b").exists()


def test_bad_sources(tmp_path: Path) -> None:
    (tmp_path / "bad.tar.gz").write_bytes(b"no archive")
    empty = archive(tmp_path / "empty.tar.gz", {})
    for source in (tmp_path / "bad.tar.gz", empty, tmp_path / "none", tmp_path):
        with pytest.raises(EngineError) as e:
            native._tree(source, "1", tmp_path / "scratch")
        assert "\n" not in str(e.value)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda _: None)
    with pytest.raises(EngineError, match="needs cmake"):
        native.build_native(tmp_path / "dest", tmp_path)


def test_a_source_that_does_not_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "src" / "include").mkdir(parents=True)
    (tmp_path / "src" / "include" / "llama.h").write_text("")
    monkeypatch.setattr(native.shutil, "which", lambda t: t)
    with pytest.raises(EngineError, match=r"cmake configuration (failed|could not start)") as e:
        native.build_native(tmp_path / "dest", tmp_path / "src")
    assert "\n" not in str(e.value) and not (tmp_path / "dest").exists()
