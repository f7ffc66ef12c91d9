"""Readers of headers: they agree with the formats' own libraries, and refuse everything
hostile in one line and little memory."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files_made import (
    chunk,
    constant,
    ir,
    layer,
    llama2c,
    node,
    number,
    onnx,
    safetensors,
    tensor,
    varint,
    with_header,
    write_ir,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from joulesmith.errors import JoulesmithError
from joulesmith.formats.llama2c_file import read_llama2c
from joulesmith.formats.onnx_file import read_onnx
from joulesmith.formats.openvino_file import read_openvino
from joulesmith.formats.safetensors_file import BITS, read_folder, read_safetensors
from joulesmith.gguf_file import read_gguf
from joulesmith.inspection import inspect_model

F4 = ("F32", [1], b"\0" * 4)


def refused(read: Callable[[Path], Any], path: Path, match: str) -> None:
    """One line that says what and where, in little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(JoulesmithError, match=match) as found:
            read(path)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 64e6
    assert "\n" not in str(found.value)
    assert str(path.parent) in str(found.value)


# --- safetensors ---------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    given_=st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda s: s != "__metadata__"),
        st.tuples(
            st.sampled_from(["float32", "float16", "int8", "uint8", "int64", "bool"]),
            st.lists(st.integers(0, 4), max_size=4),
        ),
        max_size=6,
    )
)
def test_what_the_library_writes_is_read(
    tmp_path: Path, given_: dict[str, tuple[str, list[int]]]
) -> None:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    arrays = {n: np.zeros(shape, kind) for n, (kind, shape) in given_.items()}
    path = tmp_path / "a.safetensors"
    save_file(arrays, path, metadata={"a": "b"})
    found = read_safetensors(path)
    assert {t.name: t.shape for t in found} == {n: a.shape for n, a in arrays.items()}
    assert sum(t.nbytes for t in found) == sum(a.nbytes for a in arrays.values())
    with safe_open(path, framework="np") as f:
        for t in found:
            assert f.get_slice(t.name).get_dtype() == t.type


def test_values_lie_where_the_reader_says(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    arrays = {f"t{i}": np.random.default_rng(i).normal(size=(3, i + 1)) for i in range(5)}
    save_file(arrays, tmp_path / "a.safetensors")
    raw = (tmp_path / "a.safetensors").read_bytes()
    for t in read_safetensors(tmp_path / "a.safetensors"):
        there = np.frombuffer(raw, "<f8", t.elements, t.offset).reshape(t.shape)
        np.testing.assert_array_equal(there, arrays[t.name])


def one(**changes: Any) -> dict[str, Any]:
    return {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


EIGHT = b"\0" * 8


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "0 bytes"),
        (b"\0" * 9, "9 bytes"),
        (struct.pack("<Q", 1 << 60) + b"{}", "header of"),
        (struct.pack("<Q", 100) + b"{}", "header of"),
        (with_header(b"[1, 2]"), "no JSON header"),
        (with_header(b"{" * 100), "damaged JSON"),
        (with_header(b'{"t":' + b"[" * 500_000), "absurdly large"),
        (with_header(b'{"a":' * 3000 + b"1" + b"}" * 3000), "damaged JSON"),
        (with_header(b'{"t": NaN}'), "damaged JSON"),
        (with_header(b'{"t": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, "t": 1}'), "twice"),
        (with_header(b'{"\xff": 1}'), "damaged JSON"),
        (with_header({"t": 5}, EIGHT), "wants dtype"),
        (with_header(one(more=1), EIGHT), "wants dtype"),
        (with_header(one(dtype="F31"), EIGHT), "unknown type"),
        (with_header(one(dtype=["F32"]), EIGHT), "unknown type"),
        (with_header(one(shape=[-2]), EIGHT), "whole numbers"),
        (with_header(one(shape=[2.0]), EIGHT), "whole numbers"),
        (with_header(one(shape=[True, 2]), EIGHT), "whole numbers"),
        (with_header(one(shape=[1 << 40, 1 << 40]), EIGHT), "does not fit"),
        (with_header(one(shape=[1] * 99), EIGHT), "does not fit"),
        (with_header(one(data_offsets=[0, 1 << 62]), EIGHT), "does not fit"),
        (with_header(one(data_offsets=[8, 0]), EIGHT), "does not fit"),
        (with_header(one(data_offsets=[0, 4]), EIGHT), "does not fit"),
        (with_header(one(data_offsets=[0, 8, 8]), EIGHT), "whole numbers"),
        (with_header(one(), EIGHT + b"\0"), "of data"),
        (with_header(one(), EIGHT[:-1]), "does not fit"),
        (with_header({"a": one()["t"], "b": one()["t"]}, EIGHT), "overlaps"),
        (with_header({"x" * 2000: one()["t"]}, EIGHT), "tensor name"),
        (with_header({"__metadata__": {"a": 1}, **one()}, EIGHT), "more than text"),
        (with_header({"__metadata__": [1], **one()}, EIGHT), "more than text"),
    ],
)
def test_damaged_safetensors(tmp_path: Path, raw: bytes, match: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw)
    refused(read_safetensors, path, match)


def test_every_type_has_its_width(tmp_path: Path) -> None:
    raw = safetensors({k: (k, [4], bytes(b // 2)) for k, b in BITS.items()})
    (tmp_path / "a.safetensors").write_bytes(raw)
    assert {t.type: t.nbytes for t in read_safetensors(tmp_path / "a.safetensors")} == {
        k: b // 2 for k, b in BITS.items()
    }


def sharded(folder: Path, names: dict[str, str]) -> Path:
    folder.mkdir()
    for file in set(names.values()) - {"../../x.safetensors", "/etc/x.safetensors", "gone"}:
        some = {n: F4 for n, f in names.items() if f == file}
        if "/" not in file:
            (folder / file).write_bytes(safetensors(some))
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_one_model(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {"a": "1.safetensors", "b": "2.safetensors"})
    assert [t.name for t in read_folder(folder)] == ["a", "b"]
    assert inspect_model(folder).format == "Hugging Face folder (safetensors, 2 files)"


@pytest.mark.parametrize(
    "name",
    ["../../x.safetensors", "/etc/x.safetensors", "a\\x.safetensors", "C:x.safetensors",
     "a/../x.safetensors", "x\n.safetensors", "n" * 300 + ".safetensors"],
)  # fmt: skip
def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (tmp_path / "x.safetensors").write_bytes(safetensors({"a": F4}))
    index = {"weight_map": {"a": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(read_folder, folder, "outside its folder")


def test_links_stay_in_the_folder_or_in_the_hubs_cache(tmp_path: Path) -> None:
    raw = safetensors({"a": F4})
    (tmp_path / "secret").write_bytes(raw)
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tmp_path / "secret")
    refused(read_folder, folder, "link out of its folder")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("gone")
    refused(read_folder, folder, "broken link")
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / "0123").write_bytes(raw)
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert [t.name for t in read_folder(snapshot)] == ["a"]


def test_an_index_and_its_files_agree(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {"a": "1.safetensors", "b": "2.safetensors"})
    (folder / "2.safetensors").write_bytes(safetensors({"a": F4}))
    refused(read_folder, folder, "in two files")
    (folder / "2.safetensors").write_bytes(safetensors({"c": F4}))
    refused(read_folder, folder, "'b' is not in")
    (folder / "2.safetensors").unlink()
    refused(read_folder, folder, "missing")
    for bad in (
        "[]",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        "{",
        '{"weight_map":{"a":""}}',
    ):
        (folder / "model.safetensors.index.json").write_text(bad)
        refused(read_folder, folder, "damaged|JSON")


# --- ONNX ----------------------------------------------------------------------------------

ONE = tensor("w", 1, [2], EIGHT)


def test_an_onnx_graph_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    codes, scales = bytes(8 * 2 * 16), bytes(4 * 8 * 2)
    parts = [
        tensor("q", 2, [8, 2, 16], codes),
        tensor("s", 1, [8, 2], scales),
        tensor("z", 2, [8, 1], bytes(8)),
        tensor("norm", 10, [64], bytes(128)),
        tensor("axes", 7, [1], EIGHT),
    ]
    multiply = node("MatMulNBits", ["x", "q", "s", "z"], N=8, K=64, bits=4, block_size=32)
    path.write_bytes(onnx(parts, [multiply]))
    found = inspect_model(path)
    assert found.parameters == 8 * 64 + 64
    by_type = {t.type: t for t in found.types}
    assert by_type["INT4-G32-ZP"].bytes == len(codes) + len(scales) + 8
    assert by_type["INT4-G32-ZP"].bits_per_weight == 8 * (len(codes) + len(scales) + 8) / 512
    assert by_type["I64 constants"].weights == 0
    assert by_type["I64 constants"].bits_per_weight is None
    assert found.made_by == "hand" and found.format == "ONNX (opset 18)"


def test_external_data_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    (tmp_path / "d").write_bytes(bytes(16))
    (tmp_path.parent / "out").write_bytes(bytes(16))
    good = {"location": "d", "offset": "8", "length": "8"}
    path.write_bytes(onnx([tensor("w", 1, [2], **good)]))
    (found,) = read_onnx(path).tensors.values()
    assert (found.file, found.offset, found.nbytes) == (tmp_path / "d", 8, 8)
    for change, match in [
        ({"location": "../out"}, "outside its folder"),
        ({"location": str(tmp_path.parent / "out")}, "outside its folder"),
        ({"location": ""}, "outside its folder"),
        ({"location": "gone"}, "missing"),
        ({"offset": "9"}, "does not fit"),
        ({"offset": "-8"}, "offset"),
        ({"offset": "1" * 30}, "offset"),
        ({"offset": "1e3"}, "offset"),
        ({"length": "4"}, "does not fit"),
        ({"length": str(1 << 62)}, "does not fit"),
    ]:
        path.write_bytes(onnx([tensor("w", 1, [2], **(good | change))]))
        refused(read_onnx, path, match)
    half = {"location": "d", "offset": "4", "length": "8"}
    path.write_bytes(onnx([tensor("w", 1, [2], **good), tensor("v", 1, [2], **half)]))
    refused(read_onnx, path, "overlaps")
    os.mkfifo(tmp_path / "pipe")
    path.write_bytes(onnx([tensor("w", 1, [2], location="pipe")]))
    refused(read_onnx, path, "not a regular file")


def nested(depth: int) -> bytes:
    graph = b""
    for _ in range(depth):
        graph = chunk(1, chunk(4, "If") + chunk(5, chunk(1, "then") + chunk(6, graph)))
    return graph


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "empty"),
        (b"\xff" * 40, "damaged"),
        (b"\x08\x0a", "not an ONNX"),
        (onnx([ONE])[:-25], "damaged|not an ONNX"),
        (onnx([ONE, ONE]), "appears twice"),
        (onnx([tensor("", 1, [2], EIGHT)]), "is empty"),
        (onnx([tensor("w", 99, [2], EIGHT)]), "unknown type 99"),
        (onnx([tensor("w", 0, [2], EIGHT)]), "unknown type 0"),
        (onnx([tensor("w", 1, [3], EIGHT)]), "belong to it"),
        (onnx([tensor("w", 1, [-2], EIGHT)]), "impossible shape"),
        (onnx([tensor("w", 1, [1 << 40, 1 << 40], EIGHT)]), "impossible shape"),
        (onnx([tensor("w", 1, [1] * 40, EIGHT)]), "dimensions"),
        (onnx([tensor("w", 1, [2])]), "no data"),
        (onnx([tensor("w", 1, [2], EIGHT) + number(3, 1)]), "segments"),
        (onnx([tensor("w" * 2000, 1, [2], EIGHT)]), "a tensor's name"),
        (onnx(more=chunk(15, b"")), "sparse"),
        (onnx(more=nested(40)), "nested deeper"),
        (onnx() + chunk(7, b""), "two graphs"),
        (onnx(more=varint(1 << 3 | 3)), "wire type 3"),
        (onnx(more=varint(0)), "field number 0"),
        (onnx(more=b"\x80" * 12), "truncated number"),
        (onnx([tensor("q", 2, [4], b"abcd")], [node("MatMulNBits", ["x", "q"], N=9, K=9)]), "codes"),
    ],
)  # fmt: skip
def test_damaged_onnx(tmp_path: Path, raw: bytes, match: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(raw)
    refused(inspect_model, path, match)


def test_a_flood_of_fields_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from joulesmith.formats import onnx_file

    monkeypatch.setattr(onnx_file, "MAX_FIELDS", 1000)
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx([tensor("w", 6, [2]) + number(5, 1) * 2000]))
    refused(read_onnx, path, "absurdly many")


# --- OpenVINO ------------------------------------------------------------------------------

U4 = [
    constant(0, "u4", "8, 2, 32", 0, 256),
    layer(1, "Convert"),
    constant(2, "u4", "8, 2, 1", 256, 8),
    layer(3, "Convert"),
    layer(4, "Subtract"),
    constant(5, "f16", "8, 2, 1", 264, 32),
    layer(6, "Multiply"),
    constant(7, "i64", "1", 296, 8),
    constant(8, "f32", "4", 304, 16),
]
EDGES = [(0, 1), (1, 4), (2, 3), (3, 4), (4, 6), (5, 6)]


@pytest.mark.parametrize("order", [1, -1])
def test_an_ir_is_read(tmp_path: Path, order: int) -> None:
    found = inspect_model(write_ir(tmp_path, ir(U4[::order], EDGES), bytes(320)))
    by_type = {t.type: t for t in found.types}
    packed = by_type["u4-G32-ZP"]
    assert (packed.weights, packed.bytes, packed.tensors) == (512, 256 + 8 + 32, 1)
    assert by_type["f32"].weights == 4 and by_type["i64 constants"].bits_per_weight is None
    assert found.parameters == 516


BOMB = (
    "<!DOCTYPE b ["
    + '<!ENTITY a "aaaaaaaaaa">'
    + "".join(f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 10}">' for i in range(12))
    + "]>"
)
OUTSIDE = '<!DOCTYPE b SYSTEM "file:///etc/passwd">'


@pytest.mark.parametrize(
    ("xml", "weights", "match"),
    [
        (b"<net", b"", "damaged"),
        (b"<html></html>", b"", "not an OpenVINO"),
        (b"", b"", "damaged"),
        (ir([], head=BOMB), b"", "document type"),
        (ir([], head=OUTSIDE), b"", "document type"),
        (b"<net>" + b"<a>" * 100 + b"</a>" * 100 + b"</net>", b"", "nested deeper"),
        (ir([constant(0, "f32", "2", 0, 8)]), b"\0" * 7, "does not fit"),
        (ir([constant(0, "f32", "2", 0, 8)]), None, "openvino_model.bin is missing"),
        (ir([constant(0, "f32", "3", 0, 8)]), EIGHT, "does not fit"),
        (ir([constant(0, "f32", "2", 1 << 62, 8)]), EIGHT, "does not fit"),
        (ir([constant(0, "f32", "2", -8, 8)]), EIGHT, "is wrong"),
        (ir([constant(0, "f32", "2,,x", 0, 8)]), EIGHT, "is wrong"),
        (ir([constant(0, "f32", ",".join("1" * 40), 0, 4)]), EIGHT, "is wrong"),
        (ir([constant(0, "f32", "9" * 30, 0, 8)]), EIGHT, "is wrong"),
        (ir([constant(0, "q9", "2", 0, 8)]), EIGHT, "unknown type"),
        (ir([constant(0, "f32", "1", 0, 4), constant(0, "f32", "1", 4, 4)]), EIGHT, "twice"),
        (ir([constant(0, "f32", "2", 0, 8), constant(1, "f32", "1", 4, 4)]), EIGHT, "overlaps"),
        (ir([layer(0, "Const", '<data element_type="f32" shape="1"/>')]), EIGHT, "is wrong"),
    ],
)
def test_damaged_ir(tmp_path: Path, xml: bytes, weights: bytes | None, match: str) -> None:
    refused(read_openvino, write_ir(tmp_path, xml, weights), match)


def test_equal_constants_are_stored_and_counted_once(tmp_path: Path) -> None:
    xml = ir([constant(0, "f32", "2", 0, 8), constant(1, "f32", "2", 0, 8)])
    found = inspect_model(write_ir(tmp_path, xml, EIGHT))
    assert (found.parameters, found.types[0].bytes) == (2, 8)


def test_weights_of_an_ir_are_no_link_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "secret").write_bytes(EIGHT)
    path = write_ir(tmp_path / "m", ir([constant(0, "f32", "2", 0, 8)]), None)
    path.with_suffix(".bin").symlink_to(tmp_path / "secret")
    refused(read_openvino, path, "link out of its folder")


# --- llama2.c, and files that are none of these ---------------------------------------------


@pytest.mark.parametrize("vocabulary", [10, -10])
def test_llama2c(tmp_path: Path, vocabulary: int) -> None:
    raw = llama2c(vocabulary=vocabulary)
    path = tmp_path / "m.bin"
    path.write_bytes(raw)
    found = inspect_model(path)
    head = 28 + 16 * 4 * 4  # and rotary tables: no weights
    assert (found.format, found.architecture, found.layers) == ("llama2.c", "llama", 2)
    assert found.parameters == (len(raw) - head) // 4
    assert found.tied_head is (vocabulary > 0)
    for other in (raw[:-4], raw + b"\0" * 4, raw[:20]):
        path.write_bytes(other)
        assert read_llama2c(path) is None


@pytest.mark.parametrize(
    ("name", "raw", "match"),
    [
        ("a.bin", b"", "empty file"),
        ("a.bin", b"PK\3\4" + b"\0" * 60, "zip archive"),
        ("a.pt", b"\x80\x02" + b"\0" * 60, "pickled"),
        ("a.gz", b"\x1f\x8b" + b"\0" * 60, "not unpacked"),
        ("a", b"hello, this is a text", "not a model file"),
        ("a", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("a", struct.pack("<7i", 1 << 30, 1 << 30, 1 << 30, 1, 1, 1 << 30, 1 << 30), "not a model"),
    ],
)
def test_other_files_are_told_apart(tmp_path: Path, name: str, raw: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(raw)
    refused(inspect_model, tmp_path / name, match)


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    for read in (inspect_model, read_gguf, read_safetensors, read_onnx, read_openvino):
        refused(read, tmp_path / "m.gguf", "not a regular file")
    refused(inspect_model, tmp_path / "gone", "cannot read")
    (tmp_path / "empty").mkdir()
    refused(inspect_model, tmp_path / "empty", "no .*file")


# --- anything at all -----------------------------------------------------------------------

SAMPLES: list[tuple[str, bytes]] = [
    ("m.safetensors", safetensors({"a": F4, "l.weight_packed": ("I32", [1, 1], bytes(4))}, x="y")),
    ("m.onnx", onnx([ONE, tensor("q", 2, [1, 1, 8], EIGHT)],
                    [node("MatMulNBits", ["x", "q"], N=1, K=16, block_size=16)])),
    ("openvino_model.xml", ir(U4, EDGES)),
    ("m.bin", llama2c()[:64]),
]  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=400)
@given(
    which=st.integers(0, len(SAMPLES) - 1),
    edits=st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(max_size=9)), max_size=5),
    cut=st.none() | st.integers(0, 2000),
)
def test_mutated_files_give_figures_or_one_line(
    tmp_path: Path, which: int, edits: list[tuple[int, bytes]], cut: int | None
) -> None:
    name, raw = SAMPLES[which]
    changed = bytearray(raw)
    for at, patch in edits:
        at %= len(raw)
        changed[at : at + len(patch)] = patch
    path = tmp_path / name
    path.write_bytes(changed[:cut])
    path.with_suffix(".bin").write_bytes(bytes(320)) if name.endswith("xml") else None
    try:
        found = inspect_model(path)
        assert found.parameters >= 0
    except JoulesmithError as e:
        assert "\n" not in str(e)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(raw=st.binary(max_size=300), name=st.sampled_from(["a.onnx", "a.xml", "a.safetensors", "a"]))
def test_any_bytes_give_figures_or_one_line(tmp_path: Path, raw: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(raw)
    try:
        inspect_model(tmp_path / name)
    except JoulesmithError as e:
        assert "\n" not in str(e)
