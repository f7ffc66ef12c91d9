"""What engines share: the reference's probabilities on disk, the memory a process took."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from joulesmith.errors import EngineError


def open_reference(path: Path | str, shape: tuple[int, ...]) -> NDArray[np.float16]:
    """Map a ``.npy`` of float16 log-probabilities (n_windows, length - 1, vocab).

    Raises `EngineError` when it cannot be read or is of another shape.
    """
    try:
        array: NDArray[np.float16] = np.load(Path(path), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise EngineError(f"cannot read the reference {path}: {e}") from e
    if array.shape != shape or array.dtype != np.float16:
        raise EngineError(
            f"the reference {path} is {array.dtype} {array.shape}, not float16 {shape}: "
            "it belongs to another model or other windows"
        )
    return array


def peak_rss() -> int | None:
    """Largest resident set of this process so far, bytes; ``None`` when it is not told."""
    try:
        # not ru_maxrss: on Linux that survives exec and would tell the parent's peak
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        if sys.platform == "darwin":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
