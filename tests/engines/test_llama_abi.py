"""A library that is not the one declared is refused before anything is called."""

from __future__ import annotations

import ctypes
import ctypes.util
from pathlib import Path

import pytest

from joulesmith.engines import llama_abi
from joulesmith.engines.llama_abi import ContextParams, ModelParams, find_library, open_library
from joulesmith.errors import EngineError, MissingExtraError


def test_the_installed_library_passes() -> None:
    library = open_library()
    assert library.version and "CPU" in library.system_info
    assert library.c.llama_context_default_params().n_ubatch == 512
    assert library.take_errors() == ""


def without(struct: type[ctypes.Structure], field: str) -> type[ctypes.Structure]:
    class Other(ctypes.Structure):
        _fields_ = [f for f in struct._fields_ if f[0] != field]

    return Other


@pytest.mark.parametrize(
    "struct, field",
    [
        (ContextParams, "moe_cache_size"),
        (ContextParams, "n_rs_seq"),
        (ContextParams, "flash_attn_type"),
        (ModelParams, "lazy_mode"),
        (ModelParams, "kv_overrides"),
    ],
)
def test_a_missing_field_is_noticed(
    monkeypatch: pytest.MonkeyPatch, struct: type[ctypes.Structure], field: str
) -> None:
    name = (
        "llama_context_default_params" if struct is ContextParams else "llama_model_default_params"
    )
    other = without(struct, field)
    monkeypatch.setitem(llama_abi._SIGNATURES, name, (other, []))
    with pytest.raises(EngineError, match=r"this llama.cpp build has another ABI") as e:
        open_library()
    assert "\n" not in str(e.value)


def test_a_renumbered_type_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(llama_abi.GGML_TYPES, "MXFP4", 40)
    with pytest.raises(EngineError, match="another ABI"):
        open_library()


def test_another_library(tmp_path: Path) -> None:
    import _ctypes

    with pytest.raises(EngineError, match=r"another ABI.*no function"):
        open_library(_ctypes.__file__)
    (tmp_path / "x.so").write_bytes(b"no library")
    with pytest.raises(EngineError, match="cannot load the engine library"):
        open_library(tmp_path / "x.so")
    with pytest.raises(EngineError, match="not found"):
        open_library(tmp_path / "none.so")


def test_where_the_library_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "libllama.so"
    file.write_bytes(b"")
    wheel = find_library()
    monkeypatch.setenv(llama_abi.LIBRARY_VARIABLE, str(file))
    assert find_library() == file.resolve()
    assert find_library(wheel) == wheel
    monkeypatch.delenv(llama_abi.LIBRARY_VARIABLE)
    monkeypatch.setattr(llama_abi.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match="pip install"):
        find_library()
