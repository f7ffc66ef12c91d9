"""Freed memory goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from joulesmith.energy.memory import resident
from joulesmith.memory import release_memory, return_large_blocks
import numpy as np, os
if "blocks" in sys.argv: return_large_blocks()
def held(): return resident(os.getpid())[0] >> 20
for _ in range(3): np.ones(6 << 20, np.uint8)  # the C library learns that these are usual
before, big, pins = held(), [], []
for _ in range(20):
    big.append(np.ones(6 << 20, np.uint8))
    pins.append(np.ones(60_000, np.uint8))  # keeps the heap from shrinking at its end
del big
if "trim" in sys.argv: release_memory()
print(held() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed")
@pytest.mark.parametrize("how", ["blocks", "trim"])
def test_freed_buffers_leave_the_process(how: str) -> None:
    def kept(*words: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert kept(how) < 20
    assert kept() > 60, "the C library by itself keeps them: nothing was shown"
