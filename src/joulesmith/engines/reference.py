"""The reference's probabilities on disk, as every engine reads them."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from joulesmith.errors import EngineError


class Reference:
    """float16 log-probabilities (n_windows, length - 1, vocab) in a file, read as asked for.

    Not a memory map: pages of a map count as memory of the process that judges, and a file
    that is cut short meanwhile would kill it.
    """

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...]) -> None:
        self.path = path
        self.shape = shape
        self._offset = offset
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - read from until it goes
        self._lock = threading.Lock()

    def __getitem__(self, at: tuple[int, slice]) -> NDArray[np.float16]:
        """``reference[window, start:stop]`` -> (stop - start, vocab)."""
        window, rows = at
        _, length, vocab = self.shape
        start, stop, _ = rows.indices(length)
        count = max(0, stop - start) * vocab
        with self._lock:
            self._file.seek(self._offset + 2 * vocab * (window * length + start))
            raw = self._file.read(2 * count)
        if len(raw) != 2 * count:
            raise EngineError(f"the reference {self.path} was cut short")
        return np.frombuffer(raw, np.float16).reshape(-1, vocab)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


def open_reference(path: Path | str, shape: tuple[int, ...]) -> Reference:
    """Open a ``.npy`` of float16 log-probabilities, at least ``shape``'s n windows of
    (length - 1, vocab); the first n are used.

    Raises `EngineError` when it cannot be read or is of another shape.
    """
    try:
        array: NDArray[np.float16] = np.load(Path(path), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise EngineError(f"cannot read the reference {path}: {e}") from e
    fits = array.ndim == 3 and array.shape[0] >= shape[0] and array.shape[1:] == shape[1:]
    if not isinstance(array, np.memmap) or not fits or array.dtype != np.float16:
        raise EngineError(
            f"the reference {path} is {array.dtype} {array.shape}, not float16 {shape}: "
            "it belongs to another model or other windows"
        )
    return Reference(Path(path), array.offset, shape)
