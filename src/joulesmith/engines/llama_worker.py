"""The process that holds llama.cpp: ``python -m joulesmith.engines.llama_worker``.

Reads requests on stdin and answers on stdout (`wire`). It exists because llama.cpp
abort()s on damaged files, which must not take the caller along, and because its
peak resident set is then the model's. Dies with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import queue
import resource
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, BinaryIO

from joulesmith.engines import wire
from joulesmith.engines.llama_abi import PACKAGE, Library, open_library, package_version
from joulesmith.errors import JoulesmithError

Answer = tuple[dict[str, Any], list[wire.Array]]
_PR_SET_PDEATHSIG = 1


class Worker:
    """One library, at most one model, and the operations by name."""

    def __init__(self, emit: Callable[[dict[str, Any]], None]) -> None:
        self._emit = emit
        self._library: Library | None = None
        self._model: Any = None
        self._meter: Any = None

    def handle(self, request: dict[str, Any], arrays: list[wire.Array]) -> Answer:
        """Run ``request["op"]``. Raises `JoulesmithError` on anything a user can mend."""
        op = getattr(self, "op_" + str(request.pop("op")))
        answer: Answer = op(*arrays, **request)
        return answer

    def op_open(self, library: str | None) -> Answer:
        """Open the library; answers what identifies this build."""
        self._library = lib = open_library(library)
        # two builds of one version differ in what they were compiled for, and in size
        build = f"{lib.system_info} {lib.version} {lib.path.stat().st_size}"
        digest = hashlib.sha256(build.encode()).hexdigest()[:8]
        wheel = package_version() if lib.path.parent.name == PACKAGE else None
        source = f"{PACKAGE} {wheel}" if wheel else lib.path.name
        number = f" b{wheel.split('.')[-1]}" if wheel else ""
        version = f"llama.cpp {lib.version}{number} ({source}, {digest})"
        return {"version": version, "system_info": lib.system_info, "path": str(lib.path)}, []

    def op_load(
        self,
        path: str,
        context: int,
        threads: int,
        cache_type: str = "F16",
        adapter: str | None = None,
    ) -> Answer:
        from joulesmith.engines.llama_model import Model

        assert self._library is not None
        self._model = Model(self._library, path, context, threads, cache_type, adapter)
        return {"vocab": self._model.vocab, "weight_bytes": self._model.weight_bytes}, []

    def op_logits(self, tokens: wire.Array) -> Answer:
        return {}, [self._model.logits(tokens)]

    def op_score(self, windows: wire.Array, reference: str | None) -> Answer:
        nll, kl, agree = self._model.score(windows, reference, self._progress)
        return {}, [nll] if kl is None else [nll, kl, agree]

    def op_generate(self, tokens: wire.Array, n: int) -> Answer:
        return {"tokens": self._model.generate(tokens, n)}, []

    def op_bench(self, prefill: int, decode: int, seed: int) -> Answer:
        return self._model.bench(prefill, decode, seed, self._energy()), []

    def op_matmul(self, **request: Any) -> Answer:
        from joulesmith.engines.llama_matmul import measure

        assert self._library is not None
        costs = measure(self._library, self._energy(), progress=self._progress, **request)
        return {"costs": costs}, []

    def _energy(self) -> Any:
        if self._meter is None:
            from joulesmith.energy import EnergyMeter

            self._meter = EnergyMeter()
        return self._meter

    def _progress(self, share: float) -> None:
        self._emit({"progress": share})


def _serve(source: BinaryIO, sink: BinaryIO) -> None:
    def write(data: bytes | memoryview) -> None:
        sink.write(data)

    def emit(message: dict[str, Any], arrays: list[wire.Array] | None = None) -> None:
        try:
            wire.send(write, message, arrays or [])
            sink.flush()
        except BrokenPipeError:
            os._exit(0)

    requests: queue.Queue[tuple[dict[str, Any], list[wire.Array]]] = queue.Queue()

    def read_into(view: memoryview) -> None:
        done = 0
        while done < len(view):
            n = source.readinto(view[done:])  # type: ignore[attr-defined]
            if not n:
                raise wire.WireError("end of stream")
            done += n

    def listen() -> None:
        # A thread, so that the end of stdin ends the process even in the middle of a decode.
        try:
            while True:
                requests.put(wire.receive(source.readline, read_into))
        except BaseException:
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    worker = Worker(emit)
    while True:
        request, arrays = requests.get()
        try:
            answer, out = worker.handle(request, arrays)
        except JoulesmithError as e:
            emit({"error": " ".join(str(e).split())})
        except Exception as e:
            emit({"error": f"the engine's worker failed: {type(e).__name__}: {e}"})
        else:
            emit({"answer": answer}, out)


def main() -> None:
    """Take over stdin and stdout and serve until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if "--die-with-parent" in sys.argv and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # C code prints to fd 1 as it likes; the protocol moves to a descriptor it cannot know.
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    source = os.fdopen(os.dup(0), "rb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    _serve(source, sink)


if __name__ == "__main__":
    main()
