"""What one multiplication costs on llama.cpp's own kernels: small graphs of ``mul_mat``.

Each graph multiplies one input by many different weight matrices of one shape and type,
so that weights stream through the caches as they do while a model decodes. Weights lie
in the buffer type that llama.cpp itself would choose at load ("repacked" where the CPU
has a kernel for it, plain otherwise). Knows no models and no pipes.
"""

from __future__ import annotations

import ctypes as C
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from joulesmith.energy.reading import worst
from joulesmith.engines.llama_abi import GGML_TYPES, InitParams, Library, TensorHead
from joulesmith.errors import EngineError

_CPU = 0  # GGML_BACKEND_DEVICE_TYPE_CPU
_WEIGHTS = 1  # GGML_BACKEND_BUFFER_USAGE_WEIGHTS
_ALIGN = 64
_TILE_ROWS, _TILE_COLUMNS = 512, 256  # quantized once per type, then repeated in memory
_BATCH_FLOP = 2.0e9  # work of one graph with more than one column: enough to time
_PASS_SECONDS = 0.06  # longest timed pass; a slower graph is shortened
_NODES = 4096
_LARGEST_STREAM = 192 * 2**20  # far beyond caches, and no more memory than need be
_LEAST_REPEATS, _ENOUGH_SECONDS = 3, 60.0  # on a crowded machine fewer rounds must do


@dataclass
class _Arena:
    """Weight memory of one buffer type, which the types take turns to fill.

    A model of each type at once would be many times the model.
    """

    buffer: int
    base: int
    size: int
    kind: int | None = None
    """The type whose blocks fill its first ``filled`` bytes."""
    filled: int = 0
    tiles: dict[int, tuple[int, NDArray[np.uint8]]] = field(default_factory=dict)
    """Type -> its tile, a tensor at the arena's start, and the tile's bytes."""


@dataclass
class _Job:
    context: int
    graph: int
    count: int
    """Multiplications in the graph."""
    warm: bool
    """Whether a pass before the timed one must bring the caches into a stream's state."""
    arena: _Arena
    kind: int
    stream: int
    """Bytes of the arena that must hold blocks of ``kind``."""


class Kernels:
    """llama.cpp's CPU backend with ``threads`` threads, outside any model. Free with `close`."""

    def __init__(self, library: Library, threads: int) -> None:
        self._c = c = library.c
        self._device = c.ggml_backend_dev_by_type(_CPU)
        self._backend = c.ggml_backend_dev_init(self._device, None)
        if not self._backend:
            raise EngineError("llama.cpp has no CPU backend")
        registry = c.ggml_backend_dev_backend_reg(self._device)
        set_threads = c.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
        C.CFUNCTYPE(None, C.c_void_p, C.c_int)(set_threads)(self._backend, threads)
        extra = c.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        self._plain = int(c.ggml_backend_dev_buffer_type(self._device))
        self._buffer_types: list[int] = []
        if extra:
            found = C.CFUNCTYPE(C.POINTER(C.c_void_p), C.c_void_p)(extra)(self._device)
            for i in range(64):
                if not found or not found[i]:
                    break
                self._buffer_types.append(int(found[i] or 0))
        self._buffer_types.append(self._plain)
        self._buffers: list[int] = []
        self._contexts: list[int] = []

    def close(self) -> None:
        """Free everything."""
        for context in self._contexts:
            self._c.ggml_free(context)
        for buffer in self._buffers:
            self._c.ggml_backend_buffer_free(buffer)
        self._c.ggml_backend_free(self._backend)

    def context(self, tensors: int, nodes: int = 0) -> int:
        """A ggml context with room for ``tensors`` tensors and one graph of ``nodes``."""
        c = self._c
        size = tensors * c.ggml_tensor_overhead() + c.ggml_graph_overhead_custom(nodes, False)
        context = int(c.ggml_init(InitParams(size, None, True)) or 0)
        if not context:
            raise EngineError("llama.cpp: out of memory for a graph")
        self._contexts.append(context)
        return context

    def allocate(self, buffer_type: int, size: int) -> tuple[int, int]:
        """(buffer, base address) of ``size`` bytes. Raises `EngineError` when there are none."""
        buffer = self._c.ggml_backend_buft_alloc_buffer(buffer_type, size)
        if not buffer:
            raise EngineError(f"llama.cpp: no memory for {size} bytes of weights")
        self._buffers.append(buffer)
        return int(buffer), int(self._c.ggml_backend_buffer_get_base(buffer))

    def plain(self, size: int) -> tuple[int, int]:
        """Ordinary memory for inputs and outputs."""
        return self.allocate(self._plain, size)

    def buffer_type(self, kind: int, rows: int, columns: int) -> int:
        """Where llama.cpp would put such a weight: its ``select_weight_buft``, step by step."""
        c = self._c
        context = c.ggml_init(InitParams(8 * c.ggml_tensor_overhead(), None, True))
        try:
            weight = c.ggml_new_tensor_2d(context, kind, columns, rows)
            x = c.ggml_new_tensor_2d(context, GGML_TYPES["F32"], columns, 512)
            op = c.ggml_mul_mat(context, weight, x)
            head = TensorHead.from_address(weight)
            for candidate in self._buffer_types:
                # an empty buffer of the candidate type: supports_op looks at nothing else
                buffer = c.ggml_backend_buft_alloc_buffer(candidate, 0)
                head.buffer = buffer
                fits = c.ggml_backend_dev_supports_op(self._device, op)
                head.buffer = None
                c.ggml_backend_buffer_free(buffer)
                if fits:
                    return candidate
        finally:
            c.ggml_free(context)
        raise EngineError(f"llama.cpp cannot multiply by a {rows}x{columns} matrix of type {kind}")

    def quantize(self, kind: int, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
        """(rows, columns) floats -> the type's bytes, by llama.cpp's own quantizer."""
        c = self._c
        rows, columns = weights.shape
        weights = np.ascontiguousarray(weights, np.float32)
        size = rows * columns // c.ggml_blck_size(kind) * c.ggml_type_size(kind)
        out = np.empty(size, np.uint8)
        importance = np.ones(columns, np.float32)
        use = importance.ctypes.data if c.ggml_quantize_requires_imatrix(kind) else None
        c.ggml_quantize_chunk(kind, weights.ctypes.data, out.ctypes.data, 0, rows, columns, use)
        return out

    def place(self, buffer: int, address: int, tensor: int) -> None:
        """Give a tensor its memory; the buffer then also gives it its kernels."""
        if self._c.ggml_backend_tensor_alloc(buffer, tensor, address):
            raise EngineError("llama.cpp: a tensor does not fit its buffer")

    def compute(self, graph: int) -> None:
        """Run a graph. Raises `EngineError` when it fails."""
        status = self._c.ggml_backend_graph_compute(self._backend, graph)
        if status:
            raise EngineError(f"llama.cpp failed to multiply (status {status})")

    def arena(self, buffer_type: int, size: int) -> _Arena:
        """Weight memory of ``size`` bytes and room for a tile."""
        size += 4 * _TILE_ROWS * _TILE_COLUMNS
        buffer, base = self.allocate(buffer_type, size)
        self._c.ggml_backend_buffer_set_usage(buffer, _WEIGHTS)
        return _Arena(buffer, base, size)

    def fill(self, arena: _Arena, kind: int, size: int) -> None:
        """Valid blocks of type ``kind`` in the first ``size`` bytes of the arena."""
        if arena.kind == kind and arena.filled >= size:
            return
        c = self._c
        if kind not in arena.tiles:
            rng = np.random.default_rng(kind)
            tile = c.ggml_new_tensor_2d(self.context(1), kind, _TILE_COLUMNS, _TILE_ROWS)
            self.place(arena.buffer, arena.base, tile)
            weights = rng.standard_normal((_TILE_ROWS, _TILE_COLUMNS), np.float32)
            arena.tiles[kind] = int(tile), self.quantize(kind, weights)
        tile, data = arena.tiles[kind]
        c.ggml_backend_tensor_set(tile, data.ctypes.data, 0, data.size)  # repacks
        # Any matrix of this type is a run of such block groups, so the repacked tile is repeated.
        size = -(-max(size, data.size) // data.size) * data.size
        memory = np.frombuffer(memoryview((C.c_uint8 * size).from_address(arena.base)), np.uint8)
        memory = memory.reshape(-1, data.size)
        memory[1:] = memory[0]
        arena.kind, arena.filled = kind, size

    def job(
        self, arena: _Arena, cell: tuple[int, int, int], batch: int, count: int,
        stream: int, x: tuple[int, int], y: tuple[int, int],
    ) -> _Job:  # fmt: skip
        """A graph of ``count`` multiplications by different matrices in the first ``stream``
        bytes of ``arena``."""
        c = self._c
        rows, columns, kind = cell
        # Offsets of matrices are multiples of the layout's block groups.
        step = math.lcm(_ALIGN, 8 * c.ggml_type_size(kind))
        size = count + 1  # a graph also lists its leaves: each matrix and the input
        context = self.context(2 * count + 2, size)
        graph = int(c.ggml_new_graph_custom(context, size, False))
        source = c.ggml_new_tensor_2d(context, GGML_TYPES["F32"], columns, batch)
        self.place(*x, source)
        offset = 0
        for _ in range(count):
            weight = c.ggml_new_tensor_2d(context, kind, columns, rows)
            size = -(-int(c.ggml_nbytes(weight)) // step) * step
            if offset + size > stream:
                offset = 0
            self.place(arena.buffer, arena.base + offset, weight)
            offset += size
            out = c.ggml_mul_mat(context, weight, source)
            self.place(*y, out)  # all write to one place: nodes run one after another
            c.ggml_build_forward_expand(graph, out)
        return _Job(context, graph, count, batch == 1, arena, kind, stream)


def measure(
    library: Library,
    meter: Any,
    *,
    cells: Sequence[tuple[int, int, str]],
    batches: Sequence[int],
    stream_weights: int,
    repeats: int,
    threads: int,
    progress: Callable[[float], None],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Costs of one multiplication, ordered as cells x batches: the fields of `MatmulCost`.

    Raises `EngineError` for a type or shape that llama.cpp cannot multiply.
    """
    kernels = Kernels(library, threads)
    try:
        jobs = _prepare(kernels, library, cells, batches, stream_weights, seed)
        readings: list[list[Any]] = [[] for _ in jobs]
        start = time.perf_counter()
        # One type after another within a round: each change of type fills the memory anew.
        order = sorted(range(len(jobs)), key=lambda i: jobs[i].kind)
        for repeat in range(repeats):
            for i in order:
                job = jobs[i]
                kernels.fill(job.arena, job.kind, job.stream)
                if job.warm:
                    kernels.compute(job.graph)
                with meter.window("matmul") as window:
                    kernels.compute(job.graph)
                readings[i].append(window.reading.per(job.count))
            progress((repeat + 1) / repeats)
            if repeat + 1 >= _LEAST_REPEATS and time.perf_counter() - start > _ENOUGH_SECONDS:
                break
        return [_summary(r) for r in readings]
    finally:
        kernels.close()


def _prepare(
    kernels: Kernels,
    library: Library,
    cells: Sequence[tuple[int, int, str]],
    batches: Sequence[int],
    stream_weights: int,
    seed: int,
) -> list[_Job]:
    c = library.c
    rng = np.random.default_rng(seed)
    largest = min(_LARGEST_STREAM, psutil.virtual_memory().available // 8)
    sized: list[tuple[tuple[int, int, int], int, int, int]] = []
    need: dict[int, int] = {}
    for rows, columns, name in cells:
        kind = GGML_TYPES.get(name)
        if kind is None or rows < 1 or columns < 1 or columns % c.ggml_blck_size(kind):
            raise EngineError(f"llama.cpp has no {rows}x{columns} matrix of type {name}")
        size = rows * columns // c.ggml_blck_size(kind) * c.ggml_type_size(kind)
        where = kernels.buffer_type(kind, rows, columns)
        # the whole model in this type, as far as that is more than any cache
        stream = stream_weights // c.ggml_blck_size(kind) * c.ggml_type_size(kind)
        stream = min(stream, largest)
        stream = max(stream, size) + math.lcm(_ALIGN, 8 * c.ggml_type_size(kind))
        sized.append(((rows, columns, kind), size, where, stream))
        need[where] = max(need.get(where, 0), stream)
    arenas = {where: kernels.arena(where, size) for where, size in need.items()}
    widest = max(columns for _, columns, _ in cells) * max(batches)
    tallest = max(rows for rows, _, _ in cells) * max(batches)
    x, y = kernels.plain(4 * widest), kernels.plain(4 * tallest)
    view = np.frombuffer(memoryview((C.c_uint8 * (4 * widest)).from_address(x[1])), np.float32)
    view[:] = rng.standard_normal(widest, np.float32)
    jobs = []
    for cell, size, where, stream in sized:
        for batch in batches:
            flop = 2.0 * cell[0] * cell[1] * batch
            many = stream / size if batch == 1 else _BATCH_FLOP / flop
            count = min(_NODES, max(1, round(many)))
            kernels.fill(arenas[where], cell[2], stream)
            job = kernels.job(arenas[where], cell, batch, count, stream, x, y)
            kernels.compute(job.graph)
            start = time.perf_counter()
            kernels.compute(job.graph)
            seconds = time.perf_counter() - start
            if batch > 1 and seconds > _PASS_SECONDS and count > 1:
                count = max(1, int(count * _PASS_SECONDS / seconds))
                job = kernels.job(arenas[where], cell, batch, count, stream, x, y)
            jobs.append(job)
    return jobs


def _summary(readings: list[Any]) -> dict[str, Any]:
    def median(name: str) -> float | None:
        values = [getattr(r, name) for r in readings]
        known = [v for v in values if v is not None]
        return statistics.median(known) if known else None

    return {
        "seconds": median("seconds"),
        "joules": median("joules"),
        "low": median("low"),
        "high": median("high"),
        "pedigree": worst(r.pedigree for r in readings),
    }
