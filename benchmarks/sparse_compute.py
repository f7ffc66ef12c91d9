"""Do zeros save time and joules on this CPU? Products by pruned matrices, on every path there is.

    python benchmarks/sparse_compute.py [--threads 1] [--rounds 5] [--name sparse_compute]

Each pass goes through different matrices of one shape (`WEIGHTS` weights in all), as decoding a
model does; all forms take turns within a round. "Dense" forms multiply by the same pruned
matrices and do not know it. Ratios are of the best dense form of the same round over the row, so
that above 1 a form is faster than anything that ignores zeros. OpenVINO's rows are checked to
have run the kernel that they are named for. Errors are of the outputs, against float64.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from joulesmith.atomic import atomic_path
from joulesmith.energy import EnergyMeter

SHAPES = ((576, 576), (1536, 576), (576, 1536), (49152, 576), (4096, 4096), (11008, 4096))
PATTERNS = ("50 %", "75 %", "90 %", "2:4", "16x16 blocks 75 %", "64-row columns 75 %")
BATCHES = (1, 64)
WEIGHTS = 12 << 20
TALL = 64
"""Rows that share their columns in the pattern "64-row columns"."""
_PASS_SECONDS = 0.03

Weights = list[torch.Tensor]
Pass = Callable[[torch.Tensor], Any]


def mask(pattern: str, rows: int, columns: int, rng: np.random.Generator) -> torch.Tensor:
    """Which weights stay, (rows, columns)."""
    if pattern == "2:4":
        rank = rng.random((rows, columns // 4, 4)).argsort(-1)
        kept = (rank < 2).reshape(rows, columns)
    elif pattern.startswith("16x16"):
        kept = (rng.random((rows // 16, columns // 16)) < 0.25).repeat(16, 0).repeat(16, 1)
    elif pattern.startswith("64-row"):
        rank = rng.random((rows // TALL, columns)).argsort(-1).argsort(-1)
        kept = (rank < columns // 4).repeat(TALL, 0)
    else:
        kept = rng.random((rows, columns)) >= float(pattern.split()[0]) / 100
    return torch.from_numpy(np.ascontiguousarray(kept))


def codes(w: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes and a scale a row."""
    step = w.abs().amax(1, keepdim=True) / 127 + 1e-12
    return (w / step).round().to(torch.int8).numpy(), step.numpy().astype(np.float32)


def torch_forms(weights: Weights, pattern: str) -> dict[str, Pass]:
    """Forms that torch and scipy run."""
    import scipy.sparse

    linear = torch.nn.functional.linear
    halves = [w.bfloat16() for w in weights]
    forms: dict[str, Pass] = {
        "dense: torch float32": lambda x: [linear(x, w) for w in weights],
        "dense: torch bfloat16": lambda x, h=halves: [linear(x.bfloat16(), w) for w in h],
    }
    four = _four_bits(weights)
    forms["dense: torch INT4-G64 kernel"] = lambda x: [s.product(x.bfloat16()) for s in four]
    rows = [scipy.sparse.csr_matrix(w.numpy()) for w in weights]
    csr = [
        torch.sparse_csr_tensor(
            torch.from_numpy(r.indptr),
            torch.from_numpy(r.indices),
            torch.from_numpy(r.data),
            r.shape,
        )
        for r in rows
    ]
    forms["torch CSR (MKL) float32"] = lambda x: [c @ x.T for c in csr]
    forms["scipy CSR float32"] = lambda x, r=rows: [m @ x.numpy().T for m in r]
    if pattern.startswith("16x16"):
        bsr = [w.to_sparse_bsr((16, 16)) for w in weights]
        forms["torch BSR 16x16 float32"] = lambda x: [b @ x.T for b in bsr]
    if pattern.startswith("64-row"):
        tall = [_tall(w) for w in weights]
        half = [(at, w.bfloat16()) for at, w in tall]

        def gathered(x: torch.Tensor, parts: Any) -> list[torch.Tensor]:
            out = []
            for at, w in parts:
                given = x.T[at].transpose(1, 2)  # (tiles, batch, kept)
                out.append(torch.bmm(given, w).transpose(0, 1).reshape(len(x), -1))
            return out

        forms["gather + torch.bmm float32"] = lambda x: gathered(x, tall)
        forms["gather + torch.bmm bfloat16"] = lambda x: gathered(x.bfloat16(), half)
    return forms


def _four_bits(weights: Weights) -> list[Any]:
    from joulesmith.compress.quantize.integers import IntGrid
    from joulesmith.engines.packed_store import from_bytes

    g = IntGrid(4, 64)
    return [from_bytes(g, rounded(g, w), w.shape[1], torch.bfloat16) for w in weights]


def rounded(g: Any, w: torch.Tensor) -> np.ndarray:
    """Packed rows by nearest rounding to the largest of each group, no search: only the time
    counts here."""
    step = w.view(len(w), -1, g.group).abs().amax(-1) / g.levels[-1]
    lattice = g.snap(step, None)
    level = w.view(len(w), -1, g.group) / lattice.step.clamp_min(1e-9)[:, :, None]
    level = level.round().clamp(g.levels[0], g.levels[-1]) - g.levels[0]
    return g.write(level.to(torch.uint8).view(w.shape), lattice)


def _tall(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of each tile of rows (tiles, kept), and their weights (tiles, kept, `TALL`)."""
    tiles = w.view(-1, TALL, w.shape[1])
    at = (tiles != 0).any(1).nonzero()[:, 1].view(len(tiles), -1)
    found = tiles.gather(2, at[:, None].expand(-1, TALL, -1))
    return at, found.transpose(1, 2).contiguous()


def tiles_form(weights: Weights) -> dict[str, Pass]:
    """Our packed tiles: INT4-G64 codes and coded places, decoded as they are multiplied."""
    from joulesmith.compress.quantize.integers import IntGrid
    from joulesmith.compress.sparse.tensor import pack_codes
    from joulesmith.engines.sparse_store import SparseStore

    g = IntGrid(4, 64)
    stores = [SparseStore(pack_codes(g, rounded(g, w), w.shape[1])) for w in weights]
    return {"packed tiles INT4-G64 (this package)": lambda x: [s.product(x) for s in stores]}


def native_forms(weights: Weights, pattern: str) -> dict[str, Pass]:
    """Our optional kernel: a bitmask and INT4-G64, INT8-G64 or bfloat16 values."""
    from joulesmith.compress.quantize.integers import IntGrid
    from joulesmith.compress.sparse.tensor import pack, pack_codes
    from joulesmith.engines.sparse_columns import NativeColumns
    from joulesmith.engines.sparse_native import NativeSparse, why_not

    if (why := why_not()) is not None:
        print(f"left out: {why}")
        return {}
    forms: dict[str, Pass] = {}
    for bits in (4, 8):
        g = IntGrid(bits, 64)
        stores = [
            NativeSparse(pack_codes(g, rounded(g, w), w.shape[1], "bitmask")) for w in weights
        ]
        forms[f"bitmask kernel {g.name} (this package)"] = lambda x, s=stores: [
            one.product(x) for one in s
        ]
    if pattern.startswith("64-row"):
        for bits in (4, 8):
            g = IntGrid(bits, weights[0].shape[1])
            tall = [
                NativeColumns(pack_codes(g, rounded(g, w), w.shape[1], f"blocks-{TALL}x1"))
                for w in weights
            ]
            forms[f"columns kernel INT{bits} (this package)"] = lambda x, s=tall: [
                one.product(x) for one in s
            ]
    halves = [NativeSparse(pack(w.bfloat16(), "bitmask")) for w in weights]
    forms["bitmask kernel BF16 (this package)"] = lambda x: [one.product(x) for one in halves]
    return forms


def openvino_forms(weights: Weights, threads: int) -> dict[str, Pass]:
    """int8 weights; int8 inputs as well; the same with the sparse kernel asked for."""
    import openvino as ov
    from openvino import opset13 as op

    quantized = [codes(w) for w in weights]

    def build(rounded: bool, rate: float | None, kernel: str) -> Pass | None:
        x = op.parameter([-1, weights[0].shape[1]], np.float32)
        given = x
        if rounded:
            low, high = (op.constant(np.float32(v)) for v in (-4.0, 3.96875))
            given = op.fake_quantize(x, low, high, low, high, 256)
        out = [
            op.matmul(given, op.multiply(op.convert(op.constant(q), "f32"), s), False, True)
            for q, s in quantized
        ]
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if rate is not None:
            settings["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] = rate
        compiled = ov.Core().compile_model(ov.Model(out, [x]), "CPU", settings)
        request = compiled.create_infer_request()
        request.infer([np.zeros((1, weights[0].shape[1]), np.float32)])
        ran = {
            o.get_rt_info()["primitiveType"].astype(str)
            for o in compiled.get_runtime_model().get_ordered_ops()
            if o.get_rt_info()["layerType"].astype(str) == "FullyConnected"
        }
        if (kernel == "sparse") != any("sparse" in r for r in ran):
            return None  # the engine did not take it

        def run(t: torch.Tensor) -> list[torch.Tensor]:
            found = request.infer([t.numpy()], share_inputs=True, share_outputs=True)
            return [torch.from_numpy(found[i]) for i in range(len(weights))]

        return run

    forms = {
        "dense: OpenVINO int8 weights": build(False, None, ""),
        "dense: OpenVINO int8 weights and inputs": build(True, None, ""),
        "OpenVINO int8 weights, sparse asked for": build(False, 0.4, "sparse"),
        "OpenVINO int8 weights and inputs, sparse": build(True, 0.4, "sparse"),
    }
    return {name: form for name, form in forms.items() if form is not None}


def measure(
    forms: dict[str, Pass], x: torch.Tensor, rounds: int, meter: EnergyMeter
) -> dict[str, list[tuple[float, float | None]]]:
    """Form -> (CPU seconds, joules) of one pass, each round; forms take turns.

    CPU seconds, as others may use the machine: with one thread they are what it takes alone.
    """
    loops = {}
    for name, run in forms.items():
        run(x)
        start = time.perf_counter()
        run(x)
        took = time.perf_counter() - start
        loops[name] = max(1, min(50, int(_PASS_SECONDS / max(took, 1e-6))))
    found: dict[str, list[tuple[float, float | None]]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, run in forms.items():
            start = time.process_time()
            with meter.window(name) as window:
                for _ in range(loops[name]):
                    run(x)
            seconds = (time.process_time() - start) / loops[name]
            found[name].append((seconds, window.reading.per(loops[name]).joules))
    return found


def error(run: Pass, x: torch.Tensor, weights: Weights) -> float:
    """Largest relative error (root mean square) of the outputs of the first matrices."""
    worst = 0.0
    for got, w in zip(run(x), weights[:2], strict=False):
        want = x.double() @ w.double().T
        have = torch.as_tensor(got).double()
        have = have if have.shape == want.shape else have.T.reshape(want.shape)
        worst = max(worst, float((have - want).norm() / want.norm()))
    return worst


def cell(
    shape: tuple[int, int], pattern: str, args: argparse.Namespace, meter: EnergyMeter
) -> list[str]:
    """Lines of the table for one shape and pattern."""
    rng, (rows, columns) = np.random.default_rng(0), shape
    weights = []
    for i in range(max(1, WEIGHTS // (rows * columns))):
        w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(i))
        weights.append(w * mask(pattern, rows, columns, rng))
    forms = torch_forms(weights, pattern)
    forms |= native_forms(weights, pattern)
    forms |= openvino_forms(weights, args.threads)
    if args.tiles:
        forms |= tiles_form(weights)
    lines = []
    for batch in BATCHES:
        x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(9)).clamp(-4, 3.9)
        found = measure(forms, x, args.rounds, meter)
        dense = [n for n in forms if n.startswith("dense")]
        best = min(dense, key=lambda n: statistics.median(s for s, _ in found[n]))
        for name, given in found.items():
            ratios = [b / s for (b, _), (s, _) in zip(found[best], given, strict=True)]
            joules = [j for _, j in given]
            mean = (
                statistics.median(j for j in joules if j is not None)
                if None not in joules
                else None
            )
            micro = 1e6 * statistics.median(s for s, _ in given) / len(weights)
            mark = " *" if name == best else ""
            lines.append(
                f"| {rows}x{columns} | {pattern} | {batch} | {name}{mark} | {micro:.0f} "
                f"| {'unknown' if mean is None else f'{1e3 * mean / len(weights):.3f}'} "
                f"| {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) "
                f"| {error(forms[name], x, weights):.1e} |"
            )
    return lines


def main() -> None:
    """Measure all, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", type=int, nargs="*", default=list(range(len(SHAPES))))
    parser.add_argument("--patterns", type=int, nargs="*", default=list(range(len(PATTERNS))))
    parser.add_argument("--tiles", action="store_true", help="our own packed tiles as well")
    parser.add_argument("--name", default="sparse_compute")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="Sparse")
    lines: list[str] = []
    with torch.inference_mode(), EnergyMeter() as meter:
        for i in args.shapes:
            for j in args.patterns:
                lines += cell(SHAPES[i], PATTERNS[j], args, meter)
                write(args, lines)
                gc.collect()


def write(args: argparse.Namespace, lines: list[str]) -> None:
    """The table so far."""
    head = [
        f"# Products by pruned matrices ({date.today()})",
        "",
        f"`python benchmarks/sparse_compute.py --threads {args.threads} --rounds {args.rounds}"
        f"{' --tiles' if args.tiles else ''} --shapes {' '.join(map(str, args.shapes))} "
        f"--patterns {' '.join(map(str, args.patterns))}`",
        "",
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, load "
        f"{os.getloadavg()[1]:.1f} on {os.cpu_count()} cores. CPU microseconds and millijoules "
        "(modelled from the time that cores are busy) of one product by one matrix; medians. "
        "Faster: best dense form (*) / row, median (least-most) of interleaved rounds. Error: of "
        "outputs, relative; int8 inputs cost some, four-bit weights more.",
        "",
        "| matrix | zeros | batch | form | us | mJ | faster | error |",
        "|---|---|--:|---|--:|--:|--:|--:|",
    ]
    path = Path(__file__).parent / "results" / f"{args.name}.md"
    with atomic_path(path) as temp:
        temp.write_text("\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main()
