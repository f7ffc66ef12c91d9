"""Keeping resident memory near what is in use."""

from __future__ import annotations

import ctypes
import gc
import os


def release_memory() -> None:
    """Give freed memory back to the system, where the C library keeps it (glibc)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
