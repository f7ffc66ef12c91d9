"""The GGUF writer: readable by others, the same bytes twice, never half a file."""

import errno
import io
from pathlib import Path

import gguf
import numpy as np
import pytest

from joulesmith.errors import JoulesmithError
from joulesmith.export.gguf import write_gguf
from joulesmith.gguf_file import MetaValue, ValueType, read_gguf

RNG = np.random.default_rng(1)
WEIGHT = RNG.normal(size=(6, 64)).astype(np.float32)
Q4 = gguf.quants.quantize(WEIGHT, gguf.GGMLQuantizationType.Q4_0)
META = {
    "general.architecture": MetaValue.string("llama"),
    "general.file_type": MetaValue.u32(99),
    "llama.block_count": MetaValue.u32(2),
    "llama.rope.freq_base": MetaValue.f32(10000.0),
    "tokenizer.ggml.tokens": MetaValue.array(["a", "\udcff", "日"], ValueType.STRING),
    "tokenizer.ggml.token_type": MetaValue.array([1, 3, 1], ValueType.INT32),
    "some.flag": MetaValue.boolean(True),
}
TENSORS = [
    ("norm", "F32", (5,), np.arange(5, dtype=np.float32)),
    ("quantized", "Q4_0", (6, 64), lambda: Q4),
    ("plain", "F32", (6, 64), WEIGHT.tobytes()),
]


def test_the_gguf_package_reads_it(tmp_path):
    path = tmp_path / "a.gguf"
    meta = {**META, "tokenizer.ggml.tokens": MetaValue.array(["a", "b", "日"], ValueType.STRING)}
    n = write_gguf(path, meta, TENSORS, provenance={"recipe": "x"})
    assert path.stat().st_size == n
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b", "日"]
    assert reader.fields["some.flag"].contents() is True
    assert reader.fields["joulesmith.recipe"].contents() == "x"
    assert reader.fields["general.quantization_version"].contents() == 2
    assert reader.fields["general.file_type"].contents() in (0, 2)
    tensors = {t.name: t for t in reader.tensors}
    assert tuple(tensors["quantized"].shape) == (64, 6)
    np.testing.assert_array_equal(tensors["quantized"].data, Q4)
    np.testing.assert_array_equal(tensors["plain"].data, WEIGHT)
    np.testing.assert_array_equal(tensors["norm"].data, np.arange(5))


def test_round_trip_keeps_types_and_odd_bytes(tmp_path):
    write_gguf(tmp_path / "a.gguf", META, TENSORS)
    file = read_gguf(tmp_path / "a.gguf")
    for key in META.keys() - {"general.file_type"}:
        assert file.metadata[key] == META[key]
    assert [(t.name, t.type, t.shape) for t in file.tensors] == [t[:3] for t in TENSORS]
    np.testing.assert_array_equal(file.dequantize("plain"), WEIGHT)


def test_the_same_input_gives_the_same_bytes(tmp_path):
    write_gguf(tmp_path / "a.gguf", META, TENSORS)
    write_gguf(tmp_path / "b.gguf", META, TENSORS)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_file_type_is_of_the_most_common_type(tmp_path):
    write_gguf(tmp_path / "a.gguf", META, [TENSORS[0], TENSORS[1]])
    assert read_gguf(tmp_path / "a.gguf").value("general.file_type") == 2


def test_alignment_of_the_source_is_kept(tmp_path):
    meta = {**META, "general.alignment": MetaValue.u32(128)}
    write_gguf(tmp_path / "a.gguf", meta, TENSORS)
    file = read_gguf(tmp_path / "a.gguf")
    assert file.alignment == 128
    assert all(t.offset % 128 == 0 for t in file.tensors)


def test_tensors_are_made_one_at_a_time(tmp_path):
    made = []

    def make(i):
        def call():
            made.append(i)
            return np.full((4,), i, np.float32)

        return call

    write_gguf(tmp_path / "a.gguf", {}, [(f"t{i}", "F32", (4,), make(i)) for i in range(5)])
    assert made == [0, 1, 2, 3, 4]


def boom():
    raise RuntimeError("no bytes")


def interrupted():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("call", "error"), [(boom, RuntimeError), (interrupted, KeyboardInterrupt)]
)
def test_an_error_leaves_the_old_file_and_no_rubbish(tmp_path, call, error):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    with pytest.raises(error):
        write_gguf(path, META, [TENSORS[0], ("bad", "F32", (4,), call)])
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    real = Path.open
    monkeypatch.setattr(
        Path, "open", lambda p, mode="r", *a, **k: Full(p, "x") if mode == "xb" else real(p, mode)
    )
    with pytest.raises(JoulesmithError, match=r"disk full: .* bytes\) needed") as found:
        write_gguf(tmp_path / "a.gguf", META, TENSORS)
    assert "\n" not in str(found.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("meta", "tensors", "match"),
    [
        ({}, [("t", "Q4_0", (2, 33), b"")], "do not divide"),
        ({}, [("t", "NOPE", (2, 32), b"")], "unknown ggml type"),
        ({}, [("t", "F32", (2,), b"1234567")], "7 bytes given, 8 belong"),
        ({}, [("t", "F32", (2,), b"12345678")] * 2, "given twice"),
        ({}, [("n" * 64, "F32", (2,), b"12345678")], "cannot be stored"),
        ({}, [("t", "F32", (1, 1, 1, 1, 2), b"12345678")], "cannot be stored"),
        ({"k": MetaValue.u32(-1)}, [], "metadata k cannot be written as UINT32"),
        ({"k": MetaValue.u32(1 << 32)}, [], "metadata k"),
        ({"k": MetaValue("x", ValueType.FLOAT32)}, [], "metadata k"),
        ({"k": MetaValue(3, ValueType.STRING)}, [], "metadata k"),
        ({"k": MetaValue([1], ValueType.ARRAY)}, [], "metadata k"),
        ({"general.alignment": MetaValue.u32(12)}, [], "alignment"),
    ],
)
def test_what_cannot_be_written_is_one_line(tmp_path, meta, tensors, match):
    with pytest.raises(JoulesmithError, match=match):
        write_gguf(tmp_path / "a.gguf", meta, tensors)
    assert list(tmp_path.iterdir()) == []
