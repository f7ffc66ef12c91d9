"""Keeping resident memory near what is in use. Does nothing where the C library is not glibc."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGEST = 32 << 20  # where glibc's own adjustment ends


def _libc(name: str) -> Any:
    if os.name != "posix":
        return None
    return getattr(ctypes.CDLL(None), name, None)


def release_memory() -> None:
    """Give freed memory back to the system."""
    gc.collect()
    trim = _libc("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def returning_memory(threshold: int = 1 << 20) -> Iterator[None]:
    """Blocks of ``threshold`` bytes and more go back to the system when they are freed.

    For work that allocates blocks of ever-growing sizes, such as a key-value cache that is
    concatenated at every step: the heap would keep them all.
    """
    setting = _libc("mallopt")
    if setting is not None:
        setting(_M_MMAP_THRESHOLD, threshold)
    try:
        yield
    finally:
        if setting is not None:
            setting(_M_MMAP_THRESHOLD, _LARGEST)
        release_memory()
