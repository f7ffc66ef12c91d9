"""A program's end where its group broke; what ranks share is looked at in `train/test_parallel`."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys
from joulesmith.ranks import broke, leaving
atexit.register(print, "Python's own end")
with leaving():
    if {broken}:
        broke()
    sys.stdout.write("printed ")
    {last}
"""


@pytest.mark.parametrize(
    ("broken", "last", "out", "said", "code"),
    [
        (True, "sys.exit(2)", "printed ", "", 2),
        (True, "sys.exit()", "printed ", "", 0),
        (True, "pass", "printed ", "", 0),
        (True, "raise KeyboardInterrupt", "printed ", "KeyboardInterrupt\n", 130),
        (True, "sys.exit('why')", "printed ", "why\n", 1),
        (True, "raise KeyError('fault')", "printed ", "KeyError: 'fault'\n", 1),
        (False, "sys.exit(3)", "printed Python's own end\n", "", 3),
        (False, "raise KeyError('fault')", "printed Python's own end\n", "KeyError: 'fault'\n", 1),
    ],
)
def test_leaving(broken: bool, last: str, out: str, said: str, code: int) -> None:
    """Where the group broke nothing comes after the program, and nothing it printed is lost."""
    p = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(broken=broken, last=last)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (p.stdout, p.returncode) == (out, code)
    assert p.stderr.endswith(said) and bool(p.stderr) == bool(said)
