"""Single multiplications: right results in the engine's own layout, and sane costs."""

from __future__ import annotations

import ctypes as C
import math
from collections.abc import Iterator

import numpy as np
import pytest

from joulesmith.engines.llama_abi import GGML_TYPES, open_library
from joulesmith.engines.llama_matmul import Kernels
from joulesmith.engines.llamacpp import LlamaCpp
from joulesmith.engines.matmul import MatmulCell
from joulesmith.errors import EngineError


@pytest.fixture(scope="module")
def kernels() -> Iterator[Kernels]:
    opened = Kernels(open_library(), threads=1)
    yield opened
    opened.close()


def array(address: int, shape: tuple[int, ...]) -> np.ndarray:
    raw = (C.c_float * math.prod(shape)).from_address(address)
    return np.frombuffer(raw, np.float32).reshape(shape)


@pytest.mark.parametrize("name", ["NVFP4", "Q1_0", "TQ1_0", "IQ3_S", "Q3_K"])
def test_the_engine_multiplies_by_what_our_packers_write(kernels: Kernels, name: str) -> None:
    from joulesmith.compress.quantize.grids import grid

    rng = np.random.default_rng(1)
    w = (0.3 * rng.standard_normal((48, 512))).astype(np.float32)
    x = rng.standard_normal((3, 512), np.float32)
    data = grid(name).pack(w)
    want = x.astype(np.float64) @ grid(name).unpack(data, 512).astype(np.float64).T
    assert np.abs(product(kernels, name, data, x) - want).max() < 0.03 * want.std()


@pytest.mark.parametrize("name", ["Q4_0", "IQ4_NL", "Q8_0", "Q4_K", "BF16", "MXFP4"])
@pytest.mark.parametrize("batch", [1, 5])
def test_product_is_that_of_the_dequantized_matrix(kernels: Kernels, name: str, batch: int) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows, columns = 48, 512
    rng = np.random.default_rng(0)
    data = kernels.quantize(GGML_TYPES[name], rng.standard_normal((rows, columns), np.float32))
    x = rng.standard_normal((batch, columns), np.float32)
    w = dequantize(data.reshape(rows, -1), GGMLQuantizationType[name]).reshape(rows, columns)
    want = x.astype(np.float64) @ w.astype(np.float64).T
    # the kernels round x to 8 bits a block: below 1 % of the result's spread
    got = product(kernels, name, data.reshape(rows, -1), x)
    assert np.abs(got - want).max() < 0.03 * want.std()


def product(kernels: Kernels, name: str, data: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x (batch, columns) by packed rows, as the engine does it."""
    c, kind = kernels._c, GGML_TYPES[name]
    rows, (batch, columns) = len(data), x.shape
    context = kernels.context(3, 2)
    graph = c.ggml_new_graph_custom(context, 2, False)
    weight = c.ggml_new_tensor_2d(context, kind, columns, rows)
    source = c.ggml_new_tensor_2d(context, GGML_TYPES["F32"], columns, batch)
    out = c.ggml_mul_mat(context, weight, source)
    where = kernels.buffer_type(kind, rows, columns)
    kernels.place(*kernels.allocate(where, data.nbytes + 4096), weight)
    x_at, y_at = kernels.plain(4 * columns * batch), kernels.plain(4 * rows * batch)
    kernels.place(*x_at, source)
    kernels.place(*y_at, out)
    c.ggml_backend_tensor_set(weight, data.ctypes.data, 0, data.nbytes)
    array(x_at[1], x.shape)[:] = x
    c.ggml_build_forward_expand(graph, out)
    kernels.compute(graph)
    return array(y_at[1], (batch, rows)).copy()


def test_weights_lie_where_the_engine_would_put_them(kernels: Kernels) -> None:
    def place(name: str, rows: int) -> str:
        where = kernels.buffer_type(GGML_TYPES[name], rows, 512)
        return kernels._c.ggml_backend_buft_name(where).decode()

    assert place("F32", 64) == "CPU"
    if len(kernels._buffer_types) > 1 and place("Q4_0", 64) != "CPU":
        assert place("Q4_0", 64 + 1) == "CPU"  # rows that no interleaving divides


def test_filled_memory_multiplies_to_sane_numbers(kernels: Kernels) -> None:
    rng = np.random.default_rng(1)
    for name in ("Q4_0", "Q6_K", "Q5_0", "IQ2_XXS"):
        kind, rows, columns = GGML_TYPES[name], 64, 768
        where = kernels.buffer_type(kind, rows, columns)
        arena = kernels.arena(where, 1 << 20)
        kernels.fill(arena, kind, 1 << 20)
        x, y = kernels.plain(4 * columns), kernels.plain(4 * rows)
        array(x[1], (columns,))[:] = rng.standard_normal(columns)
        job = kernels.job(arena, (rows, columns, kind), 1, 20, 1 << 20, x, y)
        kernels.compute(job.graph)
        spread = array(y[1], (rows,)).std()
        assert 0.5 * math.sqrt(columns) < spread < 2 * math.sqrt(columns)


def test_table_of_costs(engine: LlamaCpp) -> None:
    cells = [MatmulCell(64, 256, t) for t in ("Q4_0", "Q8_0", "F16")] + [MatmulCell(24, 96, "Q8_0")]
    shares: list[float] = []
    costs = engine.matmul_table(
        cells, batches=(1, 8), stream_weights=1 << 18, repeats=3, threads=1, progress=shares.append
    )
    assert [(c.cell, c.batch) for c in costs] == [(c, b) for c in cells for b in (1, 8)]
    for cost in costs:
        assert math.isfinite(cost.seconds) and 1e-8 < cost.seconds < 1
        if cost.joules is not None:
            assert cost.low is not None and cost.high is not None
            assert 0 <= cost.low <= cost.joules <= cost.high < 1000
            assert cost.pedigree in ("measured", "modelled", "assumed")
    assert shares[-1] == 1.0
    assert engine.matmul_table([]) == []


@pytest.mark.parametrize(
    "cell", [MatmulCell(8, 100, "Q4_0"), MatmulCell(8, 64, "Q9_9"), MatmulCell(0, 64, "F32")]
)
def test_cells_that_cannot_be(engine: LlamaCpp, cell: MatmulCell) -> None:
    with pytest.raises(EngineError, match="has no"):
        engine.matmul_table([cell], repeats=1, stream_weights=1 << 16)
