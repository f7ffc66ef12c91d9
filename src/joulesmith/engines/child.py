"""A worker process from its parent's side: start, ask, and never leave a zombie.

Every way in which the worker can end (crash, kill, silence) is an `EngineError` of
one line that carries the last lines it wrote. Knows the wire, not what is asked.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import joulesmith
from joulesmith.engines import wire
from joulesmith.errors import EngineError

_GRACE = 5.0  # seconds a worker gets to end by itself once its stdin is closed


class WorkerProcess:
    """``python -m module`` with a request-answer channel.

    silence: seconds without any message during a request after which the worker is
    taken for stuck and killed. Safe to share between threads: requests queue up.
    """

    def __init__(self, module: str, *, silence: float) -> None:
        self.silence = silence
        self._lock = threading.RLock()
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by _reap
        arguments = [sys.executable, "-m", module]
        # PDEATHSIG fires when the *thread* that started the child ends
        if threading.current_thread() is threading.main_thread():
            arguments.append("--die-with-parent")
        home = str(Path(joulesmith.__file__).resolve().parents[1])
        path = os.pathsep.join(p for p in (home, os.environ.get("PYTHONPATH")) if p)
        environment = {**os.environ, "PYTHONPATH": path, "GGML_NO_BACKTRACE": "1"}
        try:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=0,
                env=environment,
            )
        except OSError as e:
            self._errors.close()
            raise EngineError(f"cannot start the engine's worker: {e}") from e
        self._pending = bytearray()
        self._finalizer = weakref.finalize(self, _reap, self._process, self._errors)

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can be asked anything."""
        return self._finalizer.alive and self._process.poll() is None

    def ask(
        self,
        request: dict[str, Any],
        arrays: Sequence[wire.Array] = (),
        progress: Callable[[float], None] | None = None,
    ) -> tuple[dict[str, Any], list[wire.Array]]:
        """Send a request and wait for its answer, handing on progress shares in 0..1.

        Raises `EngineError`: the worker's refusal, its death, or its silence.
        """
        with self._lock:
            if not self._finalizer.alive:
                raise EngineError("the engine session is closed")
            try:
                return self._ask(request, arrays, progress)
            except EngineError:
                raise
            except BaseException:
                # half an exchange cannot be resumed, whatever interrupted it
                self.close(kill=True)
                raise

    def _ask(
        self,
        request: dict[str, Any],
        arrays: Sequence[wire.Array],
        progress: Callable[[float], None] | None,
    ) -> tuple[dict[str, Any], list[wire.Array]]:
        what = str(request.get("op"))
        try:
            wire.send(self._write, request, arrays)
            while True:
                message, out = wire.receive(self._read_line, self._read_into)
                if "answer" in message:
                    return message["answer"], out
                if "error" in message:
                    raise EngineError(str(message["error"]))
                if progress is not None:
                    progress(float(message["progress"]))
        except TimeoutError:
            self.close(kill=True)
            raise EngineError(
                f"the engine did not answer for {self.silence:g} s during {what}: it was stopped"
            ) from None
        except (wire.WireError, OSError) as e:
            raise EngineError(self._obituary(what, e)) from None

    def _write(self, data: bytes | memoryview) -> None:
        assert self._process.stdin is not None
        rest = memoryview(data)
        while rest:
            written = self._process.stdin.write(rest)
            rest = rest[written or 0 :]

    def _more(self) -> memoryview:
        """At least one further byte of stdout."""
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(fd, select.POLLIN | select.POLLHUP)
        deadline = time.monotonic() + self.silence
        while not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            if time.monotonic() >= deadline:
                raise TimeoutError
        data = os.read(fd, 1 << 20)
        if not data:
            raise wire.WireError("end of stream")
        return memoryview(data)

    def _read_line(self) -> bytes:
        searched = 0
        while (at := self._pending.find(b"\n", searched)) < 0:
            searched = len(self._pending)
            self._pending += self._more()
        line = bytes(self._pending[: at + 1])
        del self._pending[: at + 1]
        return line

    def _read_into(self, view: memoryview) -> None:
        done = min(len(view), len(self._pending))
        view[:done] = self._pending[:done]
        del self._pending[:done]
        while done < len(view):
            data = self._more()
            take = min(len(data), len(view) - done)
            view[done : done + take] = data[:take]
            done += take
            self._pending += data[take:]

    def _obituary(self, what: str, cause: Exception) -> str:
        """Why the worker ended, in one line; reaps it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
        code = self._process.poll()
        words = _last_lines(self._errors)
        self.close(kill=True)
        if code is None:
            reason = f"sent something that is not an answer ({cause})"
        elif code < 0:
            with contextlib.suppress(ValueError):
                code = -code
                reason = f"was killed by {signal.Signals(code).name}"
        else:
            reason = f"ended with status {code}"
        return f"the engine's worker {reason} during {what}" + (f": {words}" if words else "")

    def close(self, *, kill: bool = False) -> None:
        """End the worker and wait for it. Does nothing the second time."""
        if kill:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        self._finalizer()


def _reap(process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    try:
        process.wait(_GRACE)
    except BaseException:  # a second Ctrl-C must not leave it behind either
        process.kill()
        process.wait()
    errors.close()


def _last_lines(errors: IO[bytes], count: int = 3) -> str:
    try:
        size = errors.seek(0, os.SEEK_END)
        errors.seek(max(0, size - 4096))
        lines = errors.read().decode("utf-8", "replace").splitlines()
    except (OSError, ValueError):
        return ""
    kept = [" ".join(line.split()) for line in lines if line.strip()]
    return "; ".join(kept[-count:])[-600:]
