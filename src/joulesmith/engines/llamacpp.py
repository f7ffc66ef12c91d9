"""The llama.cpp engine: each model in a worker process of its own.

Knows the worker's operations and the shapes of `engines.base`; no C.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from joulesmith.energy.reading import Reading
from joulesmith.engines.base import Bench, Scores
from joulesmith.engines.child import WorkerProcess
from joulesmith.engines.llama_abi import find_library
from joulesmith.engines.matmul import MatmulCell, MatmulCost
from joulesmith.errors import EngineError

_WORKER = "joulesmith.engines.llama_worker"
Progress = Callable[[float], None]
CACHE_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")
"""Types in which llama.cpp keeps keys and values."""


def available_threads() -> int:
    """Cores this process may use: affinity and cgroup quota respected, SMT siblings once.

    llama.cpp's threads wait for each other after every operation, so one thread too
    many costs a multiple of the speed.
    """
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    count = len(cores)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass
    return max(1, count)


class LlamaCpp:
    """Opens GGUF files in llama.cpp.

    library: a shared object to use instead of the installed wheel's, of the same source
    version. silence: seconds without a sign of life after which a worker is stopped.
    Raises `MissingExtraError` or `EngineError` when there is no such library.
    """

    name = "llama.cpp"

    def __init__(
        self, library: str | os.PathLike[str] | None = None, *, silence: float = 1800.0
    ) -> None:
        self._library = find_library(library)
        self._silence = silence
        self._identity: dict[str, Any] | None = None

    @property
    def version(self) -> str:
        """Version, build number and a hash of what the library was compiled for."""
        return str(self._identify()["version"])

    @property
    def system_info(self) -> str:
        """Instruction sets the library was compiled for, in llama.cpp's words."""
        return str(self._identify()["system_info"])

    @property
    def threads(self) -> int:
        """Threads that `load` and `matmul_table` use by default."""
        return available_threads()

    def _identify(self) -> dict[str, Any]:
        if self._identity is None:
            self._start().close()
        assert self._identity is not None
        return self._identity

    def _start(self) -> WorkerProcess:
        worker = WorkerProcess(_WORKER, silence=self._silence)
        try:
            self._identity, _ = worker.ask({"op": "open", "library": str(self._library)})
        except BaseException:
            worker.close(kill=True)
            raise
        return worker

    def load(
        self,
        path: Path,
        *,
        context: int = 1024,
        threads: int | None = None,
        cache_type: str = "F16",
        adapter: Path | None = None,
    ) -> LlamaSession:
        """Load a GGUF file into a new worker process.

        context: tokens a request may have, prompt and continuation together.
        threads: default `available_threads`. cache_type: of keys and values, one of
        `CACHE_TYPES`. adapter: a GGUF LoRA that is added to the weights. Raises `EngineError`
        when a file is absent, refused, or crashes llama.cpp, and for another cache type.
        """
        path = Path(path)
        for file in (path, *(() if adapter is None else (adapter,))):
            if not file.is_file():
                raise EngineError(f"no such model file: {file}")
        if context < 1:
            raise EngineError(f"context must be at least 1 token, got {context}")
        if cache_type not in CACHE_TYPES:
            raise EngineError(
                f"no key-value cache of type {cache_type}: llama.cpp has {', '.join(CACHE_TYPES)}"
            )
        threads = _threads(threads)
        worker = self._start()
        try:
            about, _ = worker.ask(
                {
                    "op": "load",
                    "path": str(path),
                    "context": context,
                    "threads": threads,
                    "cache_type": cache_type,
                    "adapter": None if adapter is None else str(adapter),
                }
            )
        except EngineError as e:
            worker.close(kill=True)
            message = str(e)
            raise EngineError(message if str(path) in message else f"{message}: {path}") from None
        except BaseException:
            worker.close(kill=True)
            raise
        return LlamaSession(worker, path, context, threads, about)

    def matmul_table(
        self,
        cells: Sequence[MatmulCell],
        *,
        batches: Sequence[int] = (1, 64),
        stream_weights: int = 2**27,
        repeats: int = 5,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> list[MatmulCost]:
        """Cost of ``y = W x`` on this engine's own kernels, for each cell and batch.

        stream_weights: weights passed over between two uses of the same matrix: the model's
        parameters. Decides what the caches can hold; memory taken is up to 256 MiB a type.
        repeats: rounds over all cells, so that drift of the machine hits all alike; medians
        are returned; from three rounds on it stops after a minute. Order: cells x batches.
        Raises `EngineError` for a cell that the engine cannot multiply.
        """
        if not cells:
            return []
        worker = self._start()
        try:
            answer, _ = worker.ask(
                {
                    "op": "matmul",
                    "cells": [[c.rows, c.columns, c.type] for c in cells],
                    "batches": list(batches),
                    "stream_weights": int(stream_weights),
                    "repeats": int(repeats),
                    "threads": _threads(threads),
                },
                progress=progress,
            )
        finally:
            worker.close(kill=True)
        kinds = [(cell, batch) for cell in cells for batch in batches]
        return [
            MatmulCost(cell, batch, **cost)
            for (cell, batch), cost in zip(kinds, answer["costs"], strict=True)
        ]


class LlamaSession:
    """A model in its worker. Close it, or use it as a context manager.

    vocab: number of tokens. weight_bytes: bytes of all weights as stored.
    """

    def __init__(
        self, worker: WorkerProcess, path: Path, context: int, threads: int, about: dict[str, Any]
    ) -> None:
        self._worker = worker
        self.path = path
        self.context = context
        self.threads = threads
        self.vocab = int(about["vocab"])
        self.weight_bytes = int(about["weight_bytes"])

    def __enter__(self) -> LlamaSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._worker.pid

    def close(self) -> None:
        """End the worker; its memory goes with it."""
        self._worker.close(kill=True)

    def logits(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """tokens (n,) -> logits (n, vocab), causal, from an empty context."""
        _, (out,) = self._worker.ask({"op": "logits"}, [_tokens(tokens, 1)])
        return out

    def score(
        self,
        windows: NDArray[np.int32],
        reference: Path | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """windows (n_windows, length) -> `Scores`, judged inside the worker.

        Memory stays at one micro-batch of logits (512 x vocab floats). Raises
        `EngineError` when the reference is of another shape or the windows do not fit.
        """
        where = None if reference is None else str(Path(reference).resolve())
        _, out = self._worker.ask(
            {"op": "score", "reference": where}, [_tokens(windows, 2)], progress
        )
        return Scores(out[0], *(out[1:] if len(out) == 3 else (None, None)))

    def generate(self, tokens: NDArray[np.int32], n: int) -> list[int]:
        """Greedy continuation of ``tokens`` by ``n`` tokens."""
        answer, _ = self._worker.ask({"op": "generate", "n": int(n)}, [_tokens(tokens, 1)])
        return [int(t) for t in answer["tokens"]]

    def bench(self, prefill: int, decode: int, seed: int = 0) -> Bench:
        """One request on random tokens, prefill and decode metered apart in the worker."""
        request = {"op": "bench", "prefill": int(prefill), "decode": int(decode), "seed": seed}
        answer, _ = self._worker.ask(request)
        return Bench(
            int(prefill),
            int(decode),
            Reading.from_dict(answer["prefill"]),
            Reading.from_dict(answer["decode"]),
            answer["peak_rss"],
        )


def _threads(threads: int | None) -> int:
    if threads is None:
        return available_threads()
    if threads < 1:
        raise EngineError(f"threads must be at least 1, got {threads}")
    return threads


def _tokens(tokens: NDArray[np.int32], ndim: int) -> NDArray[np.int32]:
    array = np.ascontiguousarray(tokens, np.int32)
    if array.ndim != ndim:
        raise EngineError(f"tokens must have {ndim} dimension(s), got shape {array.shape}")
    return array
