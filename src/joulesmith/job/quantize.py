"""One type for all matrices, judged and written: `joulesmith quantize`.

    model + text -> reference -> rounded matrices -> refined -> (ranges) -> judged -> folder

Types that round inputs too (`SCHEMES`) smooth each block before it is rounded where they are
integers, and are judged with rounded inputs. No joules are measured and nothing is searched;
`run` does both.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from joulesmith.compress.quantize.activations import InputQuantizer, Scheme, quantized_inputs
from joulesmith.compress.quantize.input_types import (
    bounded_inputs,
    module_of,
    row_type,
    words,
)
from joulesmith.compress.quantize.integers import IntGrid
from joulesmith.errors import JoulesmithError
from joulesmith.job.inputs import Inputs, gather
from joulesmith.job.refine import EFFORTS, Packed, refine
from joulesmith.progress import Progress, Tick
from joulesmith.quality import Quality, judge, write_reference
from joulesmith.workspace import Workspace

if TYPE_CHECKING:
    from joulesmith.architectures import TensorRef
    from joulesmith.compress.quantize.kv_cache import KVScheme
    from joulesmith.compress.quantize.smooth_step import Smoothed
    from joulesmith.models import Model
    from joulesmith.plan.candidates import Candidates

STAGES = {"load": 5, "text": 40, "reference": 20, "round": 90, "judge": 25, "write": 3}
_RANGES, _CACHE = 15, 25  # costs of the stages that not every type has
_UNTOUCHED = "F16"
FORMATS = ("compressed-tensors", "onnx", "openvino")


@dataclass(frozen=True)
class Cache:
    """bits: of a stored key or value, scales counted. quality: with weights, inputs and cache
    quantized. scheme: in words."""

    bits: float
    quality: Quality
    scheme: str


@dataclass(frozen=True)
class Quantized:
    """What came out.

    folder: of the model. bytes: of its weights. bits_per_weight: of the matrices that
    were quantized, scales and zeros counted. damage: layer name -> predicted KL, nats a
    token. origin: of the weights that it is compared with. inputs: what rounds the inputs of
    the quantized layers, in words, None where nothing does. by_token: layers
    of a static type that kept a scale by token. smoothing: sets of factors folded.
    cache: what a quantized key-value cache costs on top, None where it was not asked for.
    format, effort: as asked for; damage is that of rounding, before codes are learned or
    scales tuned.
    """

    folder: str
    type: str
    bytes: int
    bits_per_weight: float
    quality: Quality
    damage: dict[str, float]
    origin: str
    inputs: str | None = None
    by_token: tuple[str, ...] = ()
    smoothing: int = 0
    cache: Cache | None = None
    format: str = "compressed-tensors"
    effort: str = "default"


def quantize(
    model: str,
    kind: str,
    out: Path,
    *,
    calib: str | None = None,
    evaluation: str | None = None,
    seed: int = 0,
    kv_cache: int | None = None,
    effort: str = "default",
    rotate: bool = False,
    form: str = "compressed-tensors",
    progress: Progress | None = None,
) -> Quantized:
    """Round every matrix of the blocks to ``kind`` ("INT4-G128", "W8A8") and write a folder.

    form: "compressed-tensors", which vLLM and `transformers` load, "onnx" or "openvino". effort:
    one of `refine.EFFORTS`. rotate: rotate the residual stream first (`rotate`). The working
    files lie beside it in ``out.work`` until it is complete, and a run that was
    interrupted goes on there. kv_cache: bits of a key-value cache to judge as well, 8 or 4;
    a cache is the engine's to make, and nothing of it is in the folder. Raises
    `JoulesmithError` for a type that engines cannot load, an ``out`` that exists, or text
    that is missing.
    """
    from joulesmith.compress.quantize.input_types import SCHEMES
    from joulesmith.compress.quantize.kv_cache import DEFAULTS
    from joulesmith.models import load

    if form not in FORMATS:
        raise JoulesmithError(f"--format {form}: give one of {', '.join(FORMATS)}")
    if effort not in EFFORTS:
        raise JoulesmithError(f"--effort {effort}: give one of {', '.join(EFFORTS)}")
    scheme = SCHEMES.get(kind)
    if scheme is not None and form != "compressed-tensors":
        raise JoulesmithError(f"--type {kind} is written as compressed-tensors only, not {form}")
    if scheme is not None and (rotate or effort != "default"):
        raise JoulesmithError(f"--type {kind} takes no --rotate and no --effort: leave them out")
    g = None if scheme is not None else _loadable(kind, form)
    if scheme is None and not isinstance(g, IntGrid):
        raise JoulesmithError(
            f"--type {kind}: give integers of 4 or 8 bits by group, such as INT4-G128, "
            f"INT4-G64-ZP or INT8-G128, or {', '.join(SCHEMES)}"
        )
    if kv_cache is not None and kv_cache not in DEFAULTS:
        raise JoulesmithError(f"--kv-cache {kv_cache}: give 8 or 4 bits")
    for path in (calib, evaluation):
        if path is not None and not path.startswith("hf:") and not Path(path).is_file():
            raise JoulesmithError(f"no such text file: {path}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise JoulesmithError(f"{out} exists: choose a new folder for --out")
    show = progress or Progress({})
    for name, cost in STAGES.items():
        show.expected.setdefault(name, cost)
    arguments: dict[str, Any] = {
        "model": model, "type": kind, "calib": calib, "eval": evaluation, "seed": seed,
        "effort": effort, "rotate": rotate,
    }  # fmt: skip
    with show.stage("load"):
        loaded = load(model)
        inside = [r for r in loaded.matrices() if r.layer is not None]
        if g is not None:
            for ref in inside:
                g.row_bytes(ref.shape[1])  # told before any work is done
        if kv_cache is not None:
            from joulesmith.compress.quantize.kv_layers import PackedCache

            PackedCache(loaded.module.config, DEFAULTS[kv_cache])
    whole = out.resolve()  # "." has no name
    beside = whole.with_name(whole.name + ".work")
    cache = None if kv_cache is None else DEFAULTS[kv_cache]
    plan = _Plan(kind, scheme, cache, seed, effort, rotate, form)
    with Workspace(beside, arguments) as workspace:
        with show.stage("text") as tick:
            inputs = gather(loaded, calib, evaluation, workspace.work, seed, 1.0, tick)
        found = _run(loaded, inside, plan, inputs, out, workspace, show)
    shutil.rmtree(beside, ignore_errors=True)
    return found


@dataclass(frozen=True)
class _Plan:
    """What was asked for."""

    kind: str
    scheme: Scheme | None
    cache: KVScheme | None
    seed: int
    effort: str
    rotate: bool
    form: str

    def type_of(self, ref: TensorRef) -> str:
        """The grid of a matrix inside a block."""
        return self.kind if self.scheme is None else row_type(self.scheme, ref.shape[1])


def _run(
    model: Model,
    inside: Sequence[TensorRef],
    plan: _Plan,
    inputs: Inputs,
    out: Path,
    workspace: Workspace,
    show: Progress,
) -> Quantized:
    from joulesmith.compress.quantize.grids import grid
    from joulesmith.engines.torch_engine import TorchSession
    from joulesmith.plan import candidates

    with show.stage("reference") as tick, TorchSession(model.module) as session:
        reference = write_reference(
            session, inputs.final, workspace.work / "final.npy", inputs.evaluation_text, tick
        )
    if plan.rotate:
        from joulesmith.compress.quantize.rotate import rotate_residual

        rotate_residual(model, plan.seed)
    with show.stage("round") as tick:
        if plan.scheme is None:
            store = candidates.make(
                model,
                inputs.calibration,
                lambda ref: [_UNTOUCHED if ref.layer is None else plan.kind],
                workspace.work / "packed",
                effort="nearest" if plan.effort == "nearest" else "default",
                seed=plan.seed,
                progress=tick,
            )
            smoothed: dict[int, Smoothed] = {}
        else:
            store, smoothed = _round_rows(model, plan.scheme, inputs, workspace, plan.seed, tick)
    kinds = {r.name: plan.type_of(r) for r in inside}
    packed = {r.name: (kinds[r.name], store.packed(r.name, kinds[r.name])) for r in inside}
    effort = "nearest" if plan.scheme is not None else plan.effort
    packed = refine(model, packed, inputs.calibration, effort, workspace.work, plan.seed, show)
    rounded = _inputs(model, inside, plan.scheme, smoothed, inputs, show)
    cached: Cache | None = None
    with ExitStack() as stack:
        stack.enter_context(quantized_inputs(model.module, rounded))

        def judged(tick: Tick) -> Quality:
            with TorchSession(model.module) as session:
                return judge(session.score(inputs.final, reference.path, tick), reference)

        with show.stage("judge") as tick:
            quality = judged(tick)
        if plan.cache is not None:
            from joulesmith.compress.quantize.kv_layers import PackedCache, packed_cache

            bits = PackedCache(model.module.config, plan.cache).bits_per_value
            show.expected.setdefault("cache", _CACHE)
            with show.stage("cache") as tick, packed_cache(model.module, plan.cache):
                cached = Cache(bits, judged(tick), str(plan.cache))
    with show.stage("write"):
        by_name = {r.name: rounded[module_of(r)] for r in inside} if rounded else None
        size = _write(model, packed, out, plan.form, by_name)
    weights = sum(r.shape[0] * r.shape[1] for r in inside)
    stored = sum(grid(kinds[r.name]).bits_per_weight * r.shape[0] * r.shape[1] for r in inside)
    static = plan.scheme is not None and not plan.scheme.dynamic
    by_token = tuple(r.name for r in inside if static and rounded[module_of(r)].scheme.dynamic)
    return Quantized(
        folder=str(out),
        type=plan.kind,
        bytes=size,
        bits_per_weight=stored / weights,
        quality=quality,
        damage={r.name: store.damage[r.name][kinds[r.name]] for r in inside},
        origin=model.origin,
        inputs=None if plan.scheme is None else words(plan.scheme, len(by_token)),
        by_token=by_token,
        smoothing=sum(len(s.scales) for s in smoothed.values()),
        cache=cached,
        format=plan.form,
        effort=plan.effort,
    )


def _loadable(kind: str, form: str) -> Any:
    """The grid of that name where the format's engines run it, else None."""
    if form == "compressed-tensors":
        from joulesmith.export import compressed_tensors

        return compressed_tensors.loadable(kind)
    from joulesmith.export import onnx, openvino

    # What is not installed is told before any work is done.
    onnx.packages()
    if form == "openvino":
        openvino.package()
    return onnx.loadable(kind)


def _write(
    model: Model,
    packed: Packed,
    out: Path,
    form: str,
    inputs: Mapping[str, InputQuantizer] | None,
) -> int:
    """Write the folder in its format; returns the bytes of the weights."""
    if form == "onnx":
        from joulesmith.export.onnx import export_onnx

        return export_onnx(model, packed, out)
    if form == "openvino":
        from joulesmith.export.openvino import export_openvino

        return export_openvino(model, packed, out)
    from joulesmith.export.compressed_tensors import write_compressed

    return write_compressed(model, packed, out, inputs=inputs)


def _round_rows(
    model: Model, scheme: Scheme, inputs: Inputs, workspace: Workspace, seed: int, tick: Tick
) -> tuple[Candidates, dict[int, Smoothed]]:
    """Smooth and round, going on where an interrupted run stopped.

    What smoothing did to a block is kept before its matrices are, so that a block that is
    done is folded with the same factors again.
    """
    from joulesmith.compress.quantize.row_walk import walk_rows
    from joulesmith.compress.quantize.smooth_step import read_smoothed, write_smoothed
    from joulesmith.plan.candidates import Candidates

    folder = workspace.work / "packed"
    folder.mkdir(parents=True, exist_ok=True)
    store = Candidates(folder)
    done: dict[int, Smoothed] = {}

    def known(index: int) -> Smoothed | None:
        found = read_smoothed(folder / f"smooth-{index}.npz")
        if found is not None:
            done[index] = found
        return found

    def keep(index: int, found: Smoothed) -> None:
        write_smoothed(found, folder / f"smooth-{index}.npz")
        done[index] = found

    walk_rows(
        model,
        inputs.calibration,
        scheme,
        store.keep,
        smooth=scheme.kind == "int8",
        keep=keep,
        known=known,
        skip=store.has,
        seed=seed,
        scratch=folder,
        progress=tick,
    )
    return store, done


def _inputs(
    model: Model,
    inside: Sequence[TensorRef],
    scheme: Scheme | None,
    smoothed: Mapping[int, Smoothed],
    inputs: Inputs,
    show: Progress,
) -> dict[str, InputQuantizer]:
    """Module name -> what rounds its inputs; empty for types that leave them alone."""
    from joulesmith.compress.quantize.smooth_step import predicted_excess

    if scheme is None:
        return {}
    if scheme.dynamic:
        return dict.fromkeys(map(module_of, inside), InputQuantizer(scheme))
    show.expected.setdefault("ranges", _RANGES)
    with show.stage("ranges") as tick:
        excess = predicted_excess(smoothed)
        return bounded_inputs(model, inputs.calibration, scheme, excess, progress=tick)
