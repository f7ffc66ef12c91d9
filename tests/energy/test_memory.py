from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.energy import memory
from joulesmith.energy.memory import Resident, resident

MIB = 2**20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_this_process() -> None:
    found = resident(os.getpid())
    assert found is not None
    now, mark = found
    assert 1 * MIB < now < 64 * 2**30
    assert mark is None or mark >= now * 0.9


def test_what_was_held_between_two_looks_is_seen() -> None:
    """Memory taken and given back meanwhile shows in the kernel's mark, if it is a new one."""
    code = (
        "import sys\nfor size in (1, 200):\n"
        " x = bytearray(size * 2**20); del x\n print(flush=True); sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as p:
        assert p.stdout is not None and p.stdin is not None
        p.stdout.readline()
        r = Resident()
        held, _ = r.look([p.pid])
        p.stdin.write(b"\n")
        p.stdin.flush()
        p.stdout.readline()
        after, most = r.look([p.pid])
        p.communicate(b"\n")
    assert held is not None and after is not None and most is not None
    assert most >= after
    if sys.platform.startswith("linux"):
        assert most >= held + 190 * MIB and after < held + 100 * MIB


@linux
def test_nobody_is_unknown_not_zero() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as p:
        pass
    assert resident(p.pid) is None
    assert Resident().look([p.pid]) == (None, None)


def test_without_proc_psutil_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_LINUX", False)
    found = resident(os.getpid())
    assert found is not None and found[0] > MIB


@pytest.mark.parametrize("junk", [b"", b"\nVmRSS:\tx kB", b"\nVmRSS:", b"Name: \nVmRSS:"])
def test_garbage_is_unknown(junk: bytes) -> None:
    assert memory._field(junk, b"\nVmRSS:") is None


look = st.dictionaries(st.integers(1, 4), st.integers(0, 100), max_size=4)


@given(st.lists(look, min_size=1, max_size=8))
def test_the_most_is_never_less_than_what_any_look_saw(looks: list[dict[int, int]]) -> None:
    state: dict[int, tuple[int, int | None]] = {}
    marks: dict[int, int] = {}
    r = Resident()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(memory, "resident", lambda pid: state.get(pid))
        before: int | None = None
        for seen in looks:
            for pid, size in seen.items():
                marks[pid] = max(marks.get(pid, 0), size)
            state.clear()
            state.update({pid: (size, marks[pid]) for pid, size in seen.items()})
            held, most = r.look(seen)
            if not seen:
                assert (held, most) == (None, None)
                before = None
                continue
            assert held == sum(seen.values())
            assert most is not None and held is not None and most >= max(held, before or 0)
            assert most <= sum(marks.values())
            before = held


def test_proc_is_read_whole(tmp_path: Path) -> None:
    text = b"Name:\tVmRSS:\nVmPeak:\t 9 kB\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\n"
    assert memory._field(text, b"\nVmRSS:") == MIB
    assert memory._field(text, b"\nVmHWM:") == 2 * MIB
