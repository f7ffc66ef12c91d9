"""Coverage-guided fuzzing of the parsers that joulesmith owns, with atheris.

    pip install atheris
    python benchmarks/fuzz/parsers.py safetensors CORPUS_FOLDER -max_total_time=300

One parser a run: gguf, safetensors, index, onnx, openvino, llama2c. Arguments after the
folder are libFuzzer's. Seeds are written into an empty folder. A finding is an exception
other than JoulesmithError, an error of more than one line, or (-rss_limit_mb,
-timeout) memory or time; libFuzzer then leaves the input as crash-*.
"""

from __future__ import annotations

import os
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["joulesmith.formats", "joulesmith.gguf_file"]):
    from joulesmith.formats import onnx_file, openvino_file, safetensors_file
    from joulesmith.formats.llama2c_file import read_llama2c
    from joulesmith.formats.packed import logical
    from joulesmith.gguf_file import read_gguf

from joulesmith.errors import JoulesmithError

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "formats"))
import files_made as made

FOLDER = Path(
    tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
)


def gguf(path: Path) -> None:
    file = read_gguf(path)
    for tensor in file.tensors[:8]:
        file.data(tensor)


def safetensors(path: Path) -> None:
    logical(safetensors_file.read_safetensors(path), {"config_groups": {}})


def index(path: Path) -> None:
    safetensors_file.read_folder(path.parent)


def onnx(path: Path) -> None:
    onnx_file.weights_of(onnx_file.read_onnx(path))


def openvino(path: Path) -> None:
    openvino_file.weights_of(openvino_file.read_openvino(path))


PARSERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "gguf": ("m.gguf", gguf),
    "safetensors": ("m.safetensors", safetensors),
    "index": ("model.safetensors.index.json", index),
    "onnx": ("m.onnx", onnx),
    "openvino": ("openvino_model.xml", openvino),
    "llama2c": ("m.bin", read_llama2c),
}


def seeds(name: str) -> list[bytes]:
    """Sound files to start from."""
    four, eight = b"\0" * 4, b"\0" * 8
    if name == "gguf":
        text = struct.pack("<Q", 1) + b"k"
        keys = text + struct.pack("<II", 4, 32) + struct.pack("<Q", 1) + b"a"
        keys += struct.pack("<IIQ", 9, 8, 1) + text
        tensor = text + struct.pack("<IQIQ", 1, 32, 2, 0)
        head = b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + keys + tensor
        return [head + b"\0" * (-len(head) % 32) + b"\0" * 32]
    if name == "safetensors":
        parts = {
            "a.weight_packed": ("I32", [1, 1], four),
            "a.weight_scale": ("F16", [1, 1], b"\0\0"),
            "a.weight_shape": ("I64", [2], struct.pack("<qq", 1, 8)),
            "b.qweight": ("I32", [1, 1], four),
            "c.weight": ("U8", [4], four),
            "c.weight.absmax": ("F32", [1], four),
            "d_blocks": ("U8", [1, 4], four),
            "d_scales": ("U8", [1], b"\0"),
        }
        return [made.safetensors(parts, x="y"), made.safetensors({})]
    if name == "index":
        return [b'{"metadata": {}, "weight_map": {"a": "1.safetensors"}}']
    if name == "onnx":
        packed = [made.tensor("q", 2, [1, 1, 8], eight), made.tensor("s", 1, [1, 1], four)]
        nodes = [
            made.node("MatMulNBits", ["x", "q", "s"], N=1, K=16, block_size=16, bits=4),
            made.node("Cast", ["s"], ["t"]),
            made.node("DequantizeLinear", ["q", "t"]),
        ]
        outside = made.tensor("w", 1, [2], location="data", offset="0", length="8")
        return [made.onnx(packed, nodes), made.onnx([outside])]
    if name == "openvino":
        layers = [made.constant(0, "u4", "2,8", 0, 8), made.layer(1, "Convert"),
                  made.constant(2, "f32", "2,1", 8, 8), made.layer(3, "Multiply")]  # fmt: skip
        return [made.ir(layers, [(0, 1), (1, 3), (2, 3)])]
    return [made.llama2c(), made.llama2c(vocabulary=-10)]


def main() -> None:
    name, corpus = sys.argv[1], Path(sys.argv[2])
    file_name, parse = PARSERS[name]
    corpus.mkdir(parents=True, exist_ok=True)
    for i, raw in enumerate(seeds(name)):
        (corpus / f"seed{i}").write_bytes(raw)
    path = FOLDER / file_name
    (FOLDER / "openvino_model.bin").write_bytes(bytes(64))
    (FOLDER / "data").write_bytes(bytes(64))
    if name == "index":
        (FOLDER / "1.safetensors").write_bytes(made.safetensors({"a": ("F32", [1], b"\0" * 4)}))

    def once(raw: bytes) -> None:
        with open(path, "wb") as f:
            f.write(raw)
        try:
            parse(path)
        except JoulesmithError as e:
            if "\n" in str(e) or len(str(e)) > 2000:
                raise AssertionError(f"no short line: {e!r}") from e

    atheris.Setup([sys.argv[0], str(corpus), *sys.argv[3:]], once)
    atheris.Fuzz()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
