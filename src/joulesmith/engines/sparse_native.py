"""Products by pruned matrices in time that falls with their zeros: a C kernel, where it can be.

Optional: it wants an x86-64 processor with AVX-512 VBMI2 and a C compiler, which builds
``sparse_kernel.c`` once into the user's cache. Without either, `SparseStore` decodes tiles.
Weights lie as a bitmask and the stored values: nibbles for symmetric grids of 2 to 4 bits,
bytes for other grids, two bytes for floats. Knows no models.
"""

from __future__ import annotations

import ctypes as C
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from joulesmith.atomic import atomic_path
from joulesmith.compress.sparse.layouts import spans
from joulesmith.compress.sparse.tensor import SparseTensor, check, read_levels, read_tile
from joulesmith.engines.packed_store import Store
from joulesmith.errors import EngineError, JoulesmithError

_SOURCE = Path(__file__).with_name("sparse_kernel.c")
_NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512_vbmi2", "avx512_vnni", "f16c", "fma")
_SETS = ("avx512f", "avx512bw", "avx512dq", "avx512vbmi2", "avx512vnni", "f16c", "fma", "popcnt")
_FLAGS = ("-O3", *(f"-m{name}" for name in _SETS), "-shared", "-fPIC")
FEW = 8
"""Up to so many rows of activations the kernel multiplies; beyond, it decodes for torch."""
BLOCK = 64
_SHARED = 1 << 19
"""Weights from which on a product is worth more than one thread."""


class _Matrix(C.Structure):
    _fields_ = [
        *((n, C.c_void_p) for n in ("masks", "values", "starts", "steps", "group_of", "levels")),
        ("blocks", C.c_int64),
        ("groups", C.c_int64),
        ("kind", C.c_int32),
    ]


def why_not() -> str | None:
    """Why the kernel cannot run here, in words; None where it can."""
    try:
        kernel()
    except EngineError as e:
        return str(e)
    return None


@functools.cache
def kernel() -> C.CDLL:
    """The kernel, built where it is not yet.

    Raises `EngineError` for another processor or system, no compiler, or a failed build.
    """
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").is_file():
        raise EngineError("the sparse kernel is for x86-64 under Linux")
    flags = Path("/proc/cpuinfo").read_text("utf-8").split("flags", 1)[-1].split("\n", 1)[0].split()
    if missing := [f for f in _NEEDED if f not in flags]:
        raise EngineError(f"the sparse kernel needs {missing[0]}, which this processor has not")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise EngineError("the sparse kernel is built by a C compiler: none is installed")
    word = hashlib.sha256(_SOURCE.read_bytes() + " ".join((compiler, *_FLAGS)).encode()).hexdigest()
    base = os.environ.get("XDG_CACHE_HOME")
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    path = root / "joulesmith" / f"sparse-{word[:16]}.so"
    try:
        if not path.is_file():
            with atomic_path(path) as temp:
                subprocess.run(
                    [compiler, *_FLAGS, "-o", str(temp), str(_SOURCE)],
                    check=True,
                    capture_output=True,
                    timeout=120,
                )
        library = C.CDLL(str(path))
    except (OSError, subprocess.SubprocessError, JoulesmithError) as e:
        raise EngineError(f"the sparse kernel cannot be built: {str(e).splitlines()[0]}") from e
    pointer = C.c_void_p
    library.joulesmith_sparse.argtypes = [
        pointer, C.c_int64, C.c_int64, C.c_int32, pointer, pointer, C.c_int64, pointer,
    ]  # fmt: skip
    library.joulesmith_sparse16.argtypes = [
        pointer, C.c_int64, C.c_int64, C.c_int32, pointer, pointer, pointer, C.c_int64, pointer,
    ]  # fmt: skip
    library.joulesmith_columns.argtypes = [
        pointer, pointer, C.c_int64, C.c_int64, C.c_int64, C.c_int32, pointer, C.c_int64, pointer,
        C.c_int64, pointer, C.c_int32,
    ]  # fmt: skip
    library.joulesmith_inputs.argtypes = [pointer, C.c_int64, pointer, pointer]
    for name in ("sparse", "sparse16", "inputs", "columns"):
        getattr(library, f"joulesmith_{name}").restype = None
    return library


def takes(packed: SparseTensor) -> bool:
    """Whether the kernel holds such weights: not float32, and no 8 bits with zeros."""
    if packed.grid is None:
        return packed.kind in ("F16", "BF16")
    return packed.grid.group % 16 == 0 and (packed.grid.symmetric or packed.grid.bits < 8)


class NativeSparse(Store):
    """A `SparseTensor` as the kernel wants it: 1 bit a weight and the values.

    exact: multiply in float32 always. Else codes in groups that 64 divides are multiplied by
    inputs rounded to 16 bits, with a scale for each 64 of them: 2^-16 of the largest, far less
    than bfloat16 rounds, and faster.
    Raises `EngineError` where the kernel cannot run, `JoulesmithError` for weights that it
    does not hold (`takes`) and for a packed matrix that cannot be.
    """

    def __init__(self, packed: SparseTensor, *, exact: bool = False) -> None:
        super().__init__(f"bitmask {packed.kind}", packed.rows, packed.columns)
        check(packed)
        self._library = kernel()
        if not takes(packed):
            raise JoulesmithError(f"the sparse kernel does not hold {packed.kind} weights")
        grid = packed.grid
        self._blocks = -(-self._width(packed) // BLOCK)
        self._nibbles = grid is not None and grid.symmetric and grid.bits <= 4
        masks, values, sizes = [], [], []
        for tile in range(len(spans(packed.rows, packed.columns))):
            m, v, n = self._tile(packed, tile)
            masks.append(m)
            values.append(v)
            sizes.append(n)
        each = np.concatenate([*sizes, np.empty(0, np.int64)])
        starts = np.cumsum(each, dtype=np.int64) - each
        steps = np.zeros((1, 1), np.float16) if packed.steps is None else packed.steps
        group = packed.columns if grid is None else grid.group
        columns = np.arange(4 * self._blocks) * 16
        group_of = np.minimum(columns // group, steps.shape[1] - 1).astype(np.int32)
        # one read of the kernel goes up to 64 bytes beyond
        values.append(np.zeros(64, np.uint8))
        self._arrays = {
            "masks": np.concatenate([*masks, np.empty(0, np.uint8)]),
            "values": np.concatenate(values),
            "starts": starts,
            "steps": np.ascontiguousarray(steps).view(np.int16),
            "group_of": group_of,
            "levels": np.array([*range(8), *range(-8, 0)], np.int8),
        }
        for name, array in self._arrays.items():
            self.register_buffer(name, torch.from_numpy(array))
        kind = {"F16": 16, "BF16": 17}.get(packed.kind, 4 if self._nibbles else 8)
        self._groups = steps.shape[1]
        self._rounds = grid is not None and grid.group % BLOCK == 0 and not exact
        self._matrix = _Matrix(
            *(a.ctypes.data for a in self._arrays.values()), self._blocks, self._groups, kind
        )

    def _width(self, packed: SparseTensor) -> int:
        """Columns that the kernel sees."""
        return packed.columns

    def _narrow(self, level: NDArray[np.int16]) -> NDArray[np.int16]:
        """A tile of rows as the kernel sees it."""
        return level

    def _tile(
        self, packed: SparseTensor, tile: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64]]:
        """(masks, values, bytes of values in each row) of one tile of rows."""
        if packed.grid is None:
            level = read_tile(packed, tile).view(torch.int16).numpy()
        else:
            level = read_levels(packed, tile)
        level = self._narrow(level)
        rows, pad = len(level), self._blocks * BLOCK - level.shape[1]
        mask = np.pad(level != 0, ((0, 0), (0, pad)))
        packed_mask = np.packbits(mask, axis=1, bitorder="little").reshape(-1)
        given = level[level != 0]
        count = mask.reshape(rows, self._blocks, BLOCK).sum(2, dtype=np.int64)
        if not self._nibbles:
            raw = given.view(np.uint8) if packed.grid is None else given.astype(np.int8)
            size = 2 if packed.grid is None else 1
            return packed_mask, raw.view(np.uint8), count.sum(1) * size
        # each block's nibbles are filled up to a byte
        places = np.arange(len(given)) + np.repeat(
            np.cumsum(count.reshape(-1) & 1) - (count.reshape(-1) & 1), count.reshape(-1)
        )
        room = np.zeros(int((count + (count & 1)).sum()), np.uint8)
        room[places] = given & 15
        both: NDArray[np.uint8] = (room[::2] | (room[1::2] << 4)).astype(np.uint8)
        return packed_mask, both, ((count + 1) // 2).sum(1)

    def _apply(self, fn: object, recurse: bool = True) -> NativeSparse:
        """Packed bytes stay on the CPU as they are, whatever the model is moved to."""
        return self

    def _run(self, start: int, stop: int, count: int, x: int, out: int, scales: int = 0) -> None:
        at = C.addressof(self._matrix)
        if scales:
            room = np.empty(4 * self._blocks, np.float32).ctypes
            self._library.joulesmith_sparse16(
                at, start, stop, count, x, scales, out, self.rows, room.data
            )
            return
        steps = np.empty(self._groups, np.float32)
        self._library.joulesmith_sparse(
            at, start, stop, count, x, out, self.rows, steps.ctypes.data
        )

    def decode(self, at: slice | Tensor) -> Tensor:
        """The weights of these rows, (n, columns) float32."""
        wide = self._blocks * BLOCK
        if isinstance(at, slice):
            out = torch.empty(at.stop - at.start, wide)
            self._run(at.start, at.stop, 0, 0, out.data_ptr())
        else:
            out = torch.empty(len(at), wide)
            for i, row in enumerate(at.tolist()):
                self._run(row, row + 1, 0, 0, out.data_ptr() + 4 * wide * i)
        return out[:, : self.columns]

    def product(self, x: Tensor) -> Tensor:
        """x (n, columns) -> ``x @ weight.T`` (n, rows), in x's dtype and place."""
        if len(x) > FEW or not len(x):
            return super().product(x.cpu()).to(x.device)
        wide = self._blocks * BLOCK
        given = x.to("cpu", torch.float32)
        given = torch.nn.functional.pad(given, (0, wide - self.columns)).contiguous()
        out = torch.empty(len(x), self.rows)
        size = 4 * wide
        if self._rounds:
            size = 2 * wide
            whole = torch.empty(len(x), wide, dtype=torch.int16)
            scales = torch.empty(len(x), self._blocks)
            self._library.joulesmith_inputs(
                given.data_ptr(), len(x) * self._blocks, whole.data_ptr(), scales.data_ptr()
            )
            given = whole
        parts = self._parts()
        for first in range(0, len(x), 4):
            count = min(4, len(x) - first)
            a, b = given.data_ptr() + size * first, out.data_ptr() + 4 * self.rows * first
            s = scales.data_ptr() + 4 * self._blocks * first if self._rounds else 0
            share(self._run, parts, count, a, b, s)
        return out.to(x.device, x.dtype)

    def _parts(self, items: int | None = None) -> list[tuple[int, int]]:
        """Rows (or other items) of each thread."""
        threads = torch.get_num_threads() if self.rows * self.columns >= _SHARED else 1
        n = self.rows if items is None else items
        return [(i * n // threads, (i + 1) * n // threads) for i in range(threads)]


def share(run: Callable[..., None], parts: list[tuple[int, int]], *rest: int) -> None:
    """``run(start, stop, *rest)`` of all parts, each in a thread."""
    if len(parts) == 1:
        run(*parts[0], *rest)
        return
    for job in [_pool(len(parts)).submit(run, *at, *rest) for at in parts]:
        job.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)
