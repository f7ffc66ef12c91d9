"""Keeping resident memory near what is in use (glibc; elsewhere nothing is done)."""

from __future__ import annotations

import ctypes
import gc
import os
from typing import Any

_M_MMAP_THRESHOLD = -3
_LARGE = 4 << 20


def _of_libc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None


def return_large_blocks() -> None:
    """From now on, buffers of 4 MiB and more go back to the system as they are freed.

    By itself the C library raises that size to 32 MiB as a program frees such buffers,
    and then keeps them: a quarter of what rounding held was not in use.
    """
    if (mallopt := _of_libc("mallopt")) is not None and _of_libc("malloc_trim") is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


def release_memory() -> None:
    """Collect garbage and give freed memory back to the system."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Give freed memory back to the system, where the C library keeps it."""
    if (trim := _of_libc("malloc_trim")) is not None:
        trim(0)
