"""Run a command to its end as ``time`` does: streams, signals and exit status are its own.

Knows processes and signals; knows no joules. The command stays in this process's
group, so the terminal's keys reach it as if it had been started alone.

Descendants that outlive their parent become ours (Linux: child subreaper), so that
their CPU time is still counted and ended ones are collected. What still runs when
the command itself ends is left alone, and told.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from joulesmith.energy.memory import own_peak
from joulesmith.errors import JoulesmithError

NOT_FOUND, NOT_EXECUTABLE = 127, 126
_FORWARDED = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGQUIT", "SIGTERM", "SIGHUP")
    if hasattr(signal, name)
)
_LINUX = sys.platform.startswith("linux")
_WNOTHREAD = 0x20000000  # include/uapi/linux/wait.h: only children of the calling thread
_POLL_SECONDS = 0.02
_SLACK = 2**20  # the kernel counts resident pages in batches a processor
_SET_SUBREAPER, _GET_SUBREAPER = 36, 37  # include/uapi/linux/prctl.h


class CommandNotRunError(JoulesmithError):
    """The command could not be started: exit code 127 (absent) or 126, as shells give."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    exit_code: its own, or 128 + n when signal ``signal`` = n killed it.
    largest_bytes: resident memory of its largest process; ``None`` when it stayed below
    what this process holds, since the kernel's figure starts there.
    left_running: processes of it that live on. stopped: a signal to stop came meanwhile.
    """

    exit_code: int
    signal: int | None
    largest_bytes: int | None
    left_running: int
    stopped: bool


def launch(command: Sequence[str], started: Callable[[int], object] = lambda pid: None) -> Ended:
    """Run ``command`` (no shell) and wait for it.

    started: called with its process id at once. While it runs, SIGINT, SIGQUIT, SIGTERM
    and SIGHUP are passed on instead of ending this process (only in the main thread).
    Raises `CommandNotRunError`.
    """
    with _adopting(), _passing_on() as relay:
        before = _children()
        process = _start(command)
        relay.target(process.pid)
        # A new process is billed for this one's peak until it executes (not on macOS).
        own = 0 if sys.platform == "darwin" else own_peak()
        started(process.pid)
        try:
            status, usage = _wait(process.pid, before)
        finally:
            relay.target(None)
        # Popen must not wait for what is collected already.
        process.returncode = code = os.waitstatus_to_exitcode(status)
        left = sum(1 for p in _children() - before if _alive(p))
    largest = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Ended(
        exit_code=code if code >= 0 else 128 - code,
        signal=-code if code < 0 else None,
        largest_bytes=largest if own is not None and largest > own + _SLACK else None,
        left_running=left,
        stopped=relay.stopped,
    )


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    name = command[0]
    try:
        if not name:  # else every folder of the PATH is tried as a program
            raise FileNotFoundError
        try:
            # Descriptors of the caller's redirections stay open; ours are not inheritable.
            return subprocess.Popen(list(command), close_fds=False)
        except OSError as e:
            if e.errno != errno.ENOEXEC:
                raise
            # A script without "#!": as shells and execvp(3) do.
            path = shutil.which(name) or name
            return subprocess.Popen(["/bin/sh", path, *command[1:]], close_fds=False)
    except FileNotFoundError:
        found = shutil.which(name)
        what = (
            f"cannot run {found}: the interpreter its first line names does not exist"
            if found
            else f"command not found: {name!r}: give a program on the PATH or its path"
        )
        raise CommandNotRunError(what, NOT_FOUND) from None
    except NotADirectoryError:
        raise CommandNotRunError(f"command not found: {name!r}: not a path", NOT_FOUND) from None
    except OSError as e:
        what = f"cannot run {name!r}: {e.strerror or e}: is it a program that you may execute?"
        raise CommandNotRunError(what, NOT_EXECUTABLE) from None


def _wait(pid: int, before: set[int]) -> tuple[int, Any]:
    """Wait for ``pid``, collecting adopted descendants that end before it."""
    while _LINUX:
        seen = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | _WNOTHREAD)
        if seen is None or seen.si_pid == pid:
            break
        if seen.si_pid in before:
            return _poll(pid, before)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(seen.si_pid, os.WNOHANG)
    _, status, usage = os.wait4(pid, 0)
    return status, usage


def _poll(pid: int, before: set[int]) -> tuple[int, Any]:
    """As `_wait`, where a child that the caller had before has ended: it is the caller's to
    collect, and until then hides all others from a wait for any."""
    while True:
        for other in _children() - before - {pid}:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(other, os.WNOHANG)
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            return status, usage
        time.sleep(_POLL_SECONDS)


def _children() -> set[int]:
    """Children of the calling thread; empty where the system does not tell."""
    try:
        with open(f"/proc/self/task/{threading.get_native_id()}/children", "rb") as f:
            return {int(p) for p in f.read().split()}
    except (OSError, ValueError):
        return set()


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            return f.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (OSError, IndexError):
        return False


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """Orphaned descendants become children of this process (Linux), not of process 1."""
    if not _LINUX:
        yield
        return
    import ctypes

    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    was = ctypes.c_int(0)
    if prctl is None or prctl(_GET_SUBREAPER, ctypes.byref(was), 0, 0, 0) != 0 or was.value:
        yield
        return
    prctl(_SET_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_SET_SUBREAPER, 0, 0, 0, 0)


class _Relay:
    """Passes signals on to the command; those that come before it runs are kept for it."""

    def __init__(self) -> None:
        self.stopped = False
        self._pid: int | None = None
        self._early: list[int] = []

    def target(self, pid: int | None) -> None:
        self._pid = pid
        if pid is not None:
            for number in self._early:
                self._send(number)
            self._early.clear()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self._pid is None:
            self._early.append(number)
        elif not (number in (signal.SIGINT, signal.SIGQUIT) and _keyboard_is_ours()):
            # The terminal sends its own to the whole group: not a second time.
            self._send(number)

    def _send(self, number: int) -> None:
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self._pid, number)


def _keyboard_is_ours() -> bool:
    """Whether this process group is the one that the terminal's Ctrl-C goes to."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


@contextlib.contextmanager
def _passing_on() -> Iterator[_Relay]:
    relay = _Relay()
    if threading.current_thread() is not threading.main_thread():
        yield relay
        return
    old: dict[int, Any] = {}
    try:
        for number in _FORWARDED:
            # What the caller ignores (nohup) the command must ignore too.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                old[number] = signal.signal(number, relay)
        if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
            # Ignored, children vanish without a status.
            old[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield relay
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
