"""Checkpoints of a step: parts of its work on disk, each complete or not at all, of one job only.

Knows tensors and JSON; not what they are of.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from joulesmith._version import __version__
from joulesmith.atomic import atomic_path
from joulesmith.errors import JoulesmithError


class Checkpoint:
    """Parts by name in ``folder``, which is made when the first is kept; None keeps nothing.

    job: all that the parts depend on, see `digest`. A part that is damaged, or of another job or
    version, counts as not kept.
    """

    def __init__(self, folder: Path | None, *job: object) -> None:
        self._folder = folder
        self._job = "" if folder is None else digest(__version__, *job)

    def put(self, name: str, value: Any) -> None:
        """Keep JSON. Raises `JoulesmithError` where it cannot be written."""
        if self._folder is not None:
            with atomic_path(self._folder / f"{name}.json") as temporary:
                temporary.write_text(json.dumps(self._sealed(value)))

    def get(self, name: str) -> Any:
        """What was put under that name, None where nothing was."""
        if self._folder is None:
            return None
        try:
            return self._opened(json.loads((self._folder / f"{name}.json").read_bytes()), {})
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def put_tensors(self, name: str, value: Any, tensors: Mapping[str, Tensor]) -> None:
        """Keep JSON with tensors that share no memory. Raises `JoulesmithError` as `put`."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if self._folder is None:
            return
        parts = {n: t.detach().contiguous() for n, t in tensors.items()}
        size = sum(t.numel() * t.element_size() for t in parts.values())
        sealed = {"checkpoint": json.dumps(self._sealed(value, parts))}
        with atomic_path(self._folder / f"{name}.safetensors", needed=size) as temporary:
            try:
                save_file(parts, temporary, sealed)
            except SafetensorError as e:
                raise JoulesmithError(
                    f"cannot write in {self._folder}: {e}; free some space"
                ) from e

    def get_tensors(self, name: str) -> tuple[Any, dict[str, Tensor]] | None:
        """What was put under that name, None where nothing was."""
        from safetensors import SafetensorError, safe_open

        if self._folder is None:
            return None
        try:
            with safe_open(self._folder / f"{name}.safetensors", framework="pt") as file:
                # copied: sums over memory that is aligned otherwise may differ in the last bit
                tensors = {n: file.get_tensor(n).clone() for n in file.keys()}  # noqa: SIM118
                value = self._opened(json.loads(file.metadata()["checkpoint"]), tensors)
        except (SafetensorError, OSError, ValueError, LookupError, TypeError):
            return None
        return None if value is None else (value, tensors)

    def _sealed(self, value: Any, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        plain = json.loads(json.dumps(value))  # as it will be read
        return {"job": self._job, "value": plain, "digest": digest(plain, tensors or {})}

    def _opened(self, sealed: Any, tensors: Mapping[str, Tensor]) -> Any:
        good = sealed["job"] == self._job and sealed["digest"] == digest(sealed["value"], tensors)
        return sealed["value"] if good else None


def digest(*values: object) -> str:
    """Sixteen hexadecimal digits of values: a module's structure, config and weights, the
    elements of tensors and arrays, and what these lie in; the rest as it prints."""
    found = hashlib.sha256()
    for line in _lines(values):
        found.update(line.encode() + b"\n")
    return found.hexdigest()[:16]


def _lines(value: object) -> Iterator[str]:
    if isinstance(value, nn.Module):
        yield f"{value} {getattr(value, 'config', None)}"
        yield from _lines(dict(chain(value.named_parameters(), value.named_buffers())))
    elif isinstance(value, np.ndarray):
        yield from _lines(torch.from_numpy(np.ascontiguousarray(value)))
    elif isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        yield f"{value.dtype} {tuple(value.shape)} {zlib.crc32(raw.data):08x}"
    elif isinstance(value, Mapping):
        yield f"{len(value)} by name"
        for key in sorted(value, key=repr):
            yield repr(key)
            yield from _lines(value[key])
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        yield f"{len(value)} in order"
        for item in value:
            yield from _lines(item)
    else:
        yield repr(value)
