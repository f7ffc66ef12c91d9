"""Reads the headers of safetensors files, and of folders of them, whole or sharded.

Format: https://github.com/huggingface/safetensors (8 bytes of length, a JSON header,
then the tensors without holes). The library reads the same headers; this reader also
gives offsets, needs no torch, bounds memory, and refuses in one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from joulesmith.errors import JoulesmithError
from joulesmith.formats.files import (
    AGAIN,
    MAX_NAME,
    MAX_TENSORS,
    StoredTensor,
    bounded_json,
    member,
    overlapping,
    quoted,
    read_bounded_json,
    regular_size,
    stored_bytes,
)
from joulesmith.units import size

MAX_HEADER = 1 << 25
"""The format allows 100 MB; a real header takes about 100 bytes a tensor."""

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_safetensors(path: Path) -> list[StoredTensor]:
    """The tensors of a file, by name. Raises `JoulesmithError` (one line) for a damaged one."""
    length = regular_size(path)

    def bad(why: str) -> JoulesmithError:
        return JoulesmithError(f"damaged safetensors file: {path}: {why}: {AGAIN}")

    try:
        with path.open("rb") as f:
            n = int.from_bytes(f.read(8), "little")
            if length < 10:
                raise bad(f"{length} bytes are no header")
            if n > MAX_HEADER or n > length - 8:
                raise bad(f"a header of {size(n)} in a file of {size(length)}")
            raw = f.read(n)
    except OSError as e:
        raise JoulesmithError(f"cannot read: {path}: {e.strerror or e}") from e
    if raw[:1] != b"{" or len(raw) < n:
        raise bad("no JSON header")
    # each tensor: one object, two arrays, at most 16 sides
    header = bounded_json(raw, path, objects=3 * MAX_TENSORS, items=8 * MAX_TENSORS)
    about = header.pop("__metadata__", {})
    if not isinstance(about, dict) or any(not isinstance(v, str) for v in about.values()):
        raise bad("__metadata__ holds more than text")
    if len(header) > MAX_TENSORS:
        raise bad(f"{len(header)} tensors")
    begin, room = 8 + n, length - 8 - n
    found = [_tensor(name, entry, path, begin, room, bad) for name, entry in header.items()]
    if (twice := overlapping(found)) is not None:
        raise bad(f"tensor {quoted(twice)} overlaps another")
    if sum(t.nbytes for t in found) != room:
        raise bad(f"{size(room)} of data, {size(sum(t.nbytes for t in found))} of tensors")
    return sorted(found, key=lambda t: t.name)


def _tensor(name: str, entry: Any, path: Path, begin: int, room: int, bad: Any) -> StoredTensor:
    if not 0 < len(name) <= MAX_NAME:
        raise bad(f"tensor name {quoted(name)}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad(f"tensor {quoted(name)} wants dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in BITS:
        raise bad(f"tensor {quoted(name)} has unknown type {quoted(kind)}")
    if not (_whole(shape) and _whole(offsets) and len(offsets) == 2):
        raise bad(f"tensor {quoted(name)}: shape or offsets are no whole numbers")
    want = stored_bytes(tuple(shape), BITS[kind])
    start, stop = offsets
    if want is None or not 0 <= start <= stop <= room or stop - start != want:
        raise bad(f"tensor {quoted(name)}: its {kind} shape does not fit its place")
    return StoredTensor(name, tuple(shape), kind, BITS[kind], path, begin + start, want)


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def read_folder(folder: Path) -> list[StoredTensor]:
    """All tensors of a Hugging Face folder, by name.

    Raises `JoulesmithError` for an index that names files elsewhere or tensors that are
    not there, a tensor in two files, or pickled weights only (they are never opened).
    """
    found: dict[str, StoredTensor] = {}
    for file in shards(folder):
        for t in read_safetensors(file):
            if t.name in found:
                raise JoulesmithError(f"tensor {quoted(t.name)} is in two files: {folder}: {AGAIN}")
            found[t.name] = t
    if (folder / INDEX).is_file():
        for name, file_name in _weight_map(folder / INDEX).items():
            at = found.get(name)
            if at is None or at.file.name != file_name:
                raise JoulesmithError(
                    f"tensor {quoted(name)} is not in {quoted(file_name)}: {folder}: {AGAIN}"
                )
    return sorted(found.values(), key=lambda t: t.name)


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those of its index, else all there are."""
    index = folder / INDEX
    if index.is_file():
        return [member(folder, n, index) for n in sorted(set(_weight_map(index).values()))]
    names = sorted(p.name for p in folder.glob("model*.safetensors"))
    names = names or sorted(p.name for p in folder.glob("*.safetensors"))
    if names:
        return [member(folder, n, folder) for n in names]
    if any(p.suffix in _PICKLES for p in folder.iterdir()):
        raise JoulesmithError(
            f"only pickled weights (.bin), which can run code: {folder}: "
            "convert them to .safetensors, or download the .safetensors version"
        )
    raise JoulesmithError(f"no *.safetensors file: {folder}: {AGAIN}")


def _weight_map(index: Path) -> dict[str, str]:
    found = read_bounded_json(index, 1 << 26, 64, "index").get("weight_map")
    if not isinstance(found, dict) or len(found) > MAX_TENSORS:
        raise JoulesmithError(f"damaged index: {index}: no weight_map: {AGAIN}")
    for file_name in set(map(_text_of, found.values())):
        if file_name is None or not file_name.endswith(".safetensors"):
            raise JoulesmithError(f"damaged index: {index}: names no safetensors file: {AGAIN}")
    return found


def _text_of(value: object) -> str | None:
    return value if isinstance(value, str) else None
