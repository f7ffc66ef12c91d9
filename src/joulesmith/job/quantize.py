"""A model quantized, judged and written in a format of choice: `joulesmith quantize`.

    model + text -> reference -> recipe applied -> judged -> file or folder -> judged there

The recipe comes from the options or from a file, and is written with the model. Types that
round inputs too (`SCHEMES`) smooth each block before it is rounded where they are integers,
and are judged with rounded inputs. No joules are measured and nothing is searched; `run` does
both.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from joulesmith.compress.quantize.activations import InputQuantizer, Scheme, quantized_inputs
from joulesmith.compress.quantize.choice import check_type
from joulesmith.compress.quantize.input_types import (
    SCHEMES,
    bounded_inputs,
    module_of,
    words,
)
from joulesmith.compress.recipe import Recipe, read_recipe
from joulesmith.engines import get_engine
from joulesmith.errors import JoulesmithError
from joulesmith.export import forms
from joulesmith.job import apply, recipes
from joulesmith.job.inputs import CALIBRATION, LENGTH, Inputs, digest_of, gather
from joulesmith.job.refine import EFFORTS
from joulesmith.job.settings import check_texts
from joulesmith.memory import return_large_blocks
from joulesmith.progress import Progress, Tick
from joulesmith.quality import Quality, Reference, judge, write_reference
from joulesmith.workspace import Workspace, file_identity

if TYPE_CHECKING:
    from joulesmith.architectures import TensorRef
    from joulesmith.compress.prune.structured import Shrunk
    from joulesmith.compress.prune.walk import Pruned
    from joulesmith.compress.quantize.smooth_step import Smoothed
    from joulesmith.models import Model
    from joulesmith.plan.candidates import Candidates

STAGES = {"load": 5, "text": 40, "reference": 20, "round": 90, "judge": 25, "write": 3}
_RANGES, _CACHE, _ENGINE = 15, 25, 20  # costs of the stages that not every run has
RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Cache:
    """bits: of a stored key or value, scales counted. quality: with weights, inputs and cache
    quantized. scheme: in words."""

    bits: float
    quality: Quality
    scheme: str


@dataclass(frozen=True)
class Made:
    """What came out.

    folder: of the model, or its file. bytes: of its weights. bits_per_weight: of the matrices
    inside blocks as they are stored, scales and places counted. quality: of the weights in
    torch, inputs rounded where the type does that. damage: layer name -> predicted KL, nats a
    token. origin: of the weights that it is compared with. inputs: what rounds the inputs of
    the quantized layers, in words, None where nothing does. by_token: layers
    of a static type that kept a scale by token. smoothing: sets of factors folded.
    cache: what a quantized key-value cache costs on top, None where it was not asked for.
    format, effort: as asked for; damage is that of rounding, before codes are learned or
    scales tuned. types: GGUF name -> type of each quantized matrix. notes: what the recipe's
    steps had to tell. recipe: the file that makes the same again. adapter: LoRA beside the
    model that it was judged with, None where there is none. engine: what ran the
    written file, and engine_quality its quality there; None where it was not run. pruned,
    shrunk: what went, layer by layer and part by part. parameters: before and after, zeros
    counted as any other.
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
    types: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    recipe: str = ""
    adapter: str | None = None
    engine: str | None = None
    engine_quality: Quality | None = None
    pruned: tuple[Pruned, ...] = ()
    shrunk: Shrunk | None = None
    parameters: tuple[int, int] = (0, 0)


def quantize(
    model: str,
    kind: str | None,
    out: Path,
    *,
    recipe: Path | None = None,
    calib: str | None = None,
    evaluation: str | None = None,
    seed: int | None = None,
    kv_cache: int | None = None,
    effort: str = "default",
    rotate: bool = False,
    embedding: str | None = None,
    form: str = "compressed-tensors",
    progress: Progress | None = None,
) -> Made:
    """Quantize ``model`` and write it to ``out``: a new folder, or for GGUF a new file.

    kind: the type of all matrices in blocks ("INT4-G128", "W8A8", "Q4_K"), None for the
    format's default; or ``recipe``, a file that says it all: then kind, effort, rotate,
    embedding and kv_cache are not taken, and calib and seed default to the recipe's.
    form: one of `forms.FORMATS`. effort: one of `refine.EFFORTS`. rotate: rotate the residual
    stream first (`rotate`). embedding: type of embedding and head, see `recipes.recipe_of`.
    kv_cache: bits of a key-value cache to judge as well, 8 or 4; a cache is the engine's to
    make, and nothing of it is written.

    The working files lie beside it in ``out.work`` until it is complete, and a run that was
    interrupted goes on there. Raises `JoulesmithError` for types that the format cannot hold,
    an ``out`` that exists, or text that is missing.
    """
    from joulesmith.compress.quantize.kv_cache import DEFAULTS

    forms.ready(form)
    if effort not in EFFORTS:
        raise JoulesmithError(f"--effort {effort}: give one of {', '.join(EFFORTS)}")
    if kv_cache is not None and kv_cache not in DEFAULTS:
        raise JoulesmithError(f"--kv-cache {kv_cache}: give 8 or 4 bits")
    given, share = None if recipe is None else read_recipe(recipe), 1.0
    if given is not None:
        if (kind, effort, rotate, embedding, kv_cache) != (None, "default", False, None, None):
            raise JoulesmithError(
                "--recipe says it all: leave out --type, --effort, --rotate, --embedding and "
                "--kv-cache"
            )
        calib, seed, share = recipes.calibration_of(given, calib, seed)
    kind = recipes.DEFAULT.get(form, "INT4-G64") if kind is None else kind
    for name in (kind, embedding):
        if name is not None and name not in SCHEMES:
            check_type(name)  # told before the model is loaded
    number = 0 if seed is None else seed

    def recipe_for(loaded: Model) -> Recipe:
        if given is not None:
            return given
        return recipes.recipe_of(
            loaded, form, kind, effort=effort, rotate=rotate, kv_cache=kv_cache,
            embedding=embedding, seed=number,
        )  # fmt: skip

    found = run_recipe(
        model, out, form, recipe_for,
        calib=calib, evaluation=evaluation, seed=number, share=share, progress=progress,
    )  # fmt: skip
    return replace(found, type="recipe" if given is not None else kind, effort=effort)


def run_recipe(
    model: str,
    out: Path,
    form: str,
    recipe_for: Callable[[Model], Recipe],
    *,
    calib: str | None,
    evaluation: str | None,
    seed: int,
    share: float = 1.0,
    progress: Progress | None = None,
) -> Made:
    """Apply the recipe that ``recipe_for`` gives for the loaded model, judge, write to ``out``.

    share: of the usual calibration windows. The other arguments, files and errors as `quantize`.
    """
    from joulesmith.models import load

    forms.ready(form)
    if form == forms.GGUF:
        get_engine("llama.cpp")
    check_texts(calib, evaluation)
    check_out(out, form)
    return_large_blocks()
    show = progress or Progress({})
    for name, cost in STAGES.items():
        show.expected.setdefault(name, cost)
    with show.stage("load"):
        loaded = load(model)
    steps = recipe_for(loaded)
    if not steps.steps:
        raise JoulesmithError("the recipe has no steps: give it one, such as quantize")
    first, rest = recipes.parted(steps)
    recipes.check_shrink(first, loaded)
    # A model that is made smaller first is fitted when its shapes are known.
    fitted = None if first.steps else recipes.fit(rest, loaded, form)
    windows = [round(CALIBRATION * share), LENGTH]
    told = {"calib": calib, "seed": seed, "windows": windows} | digest_of(calib)
    steps = replace(steps, model=loaded.name, calibration=told)
    arguments: dict[str, Any] = {
        "model": model, "recipe": steps.to_plain(), "eval": file_identity(evaluation),
        "calib": file_identity(calib), "seed": seed, "model_file": file_identity(model),
        "format": form,
    }  # fmt: skip
    whole = out.resolve()  # "." has no name
    beside = whole.with_name(whole.name + ".work")
    with Workspace(beside, arguments) as workspace:
        with show.stage("text") as tick:
            inputs = gather(loaded, calib, evaluation, workspace.work, seed, share, tick)
        found = _run(loaded, steps, first, rest, fitted, form, inputs, whole, workspace, show)
    shutil.rmtree(beside, ignore_errors=True)
    return replace(found, folder=str(out))


def check_out(out: Path, form: str) -> None:
    """Raises `JoulesmithError` for a place that is taken, or no name for the format."""
    if form == forms.GGUF:
        if out.suffix.lower() != ".gguf":
            raise JoulesmithError(f"--out {out}: a GGUF is a file: give a name such as {out}.gguf")
        if out.exists():
            raise JoulesmithError(f"{out} exists: choose a new file for --out")
        running = out.with_name(out.name + ".work").exists()  # killed as it moved them
        for file in (beside_of(out), out.with_suffix(forms.ADAPTER_SUFFIX)):
            if file.exists() and not running:
                raise JoulesmithError(f"{file} exists: choose another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise JoulesmithError(f"{out} exists: choose a new folder for --out")
    elif out.suffix.lower() == ".gguf":
        raise JoulesmithError(f"--out {out}: {form} is a folder: give another name")


def beside_of(out: Path) -> Path:
    """Where the recipe of a GGUF lies."""
    return out.with_suffix(f".{RECIPE}")


def _run(
    model: Model,
    recipe: Recipe,
    first: Recipe,
    rest: Recipe,
    fitted: recipes.Fitted | None,
    form: str,
    inputs: Inputs,
    out: Path,
    workspace: Workspace,
    show: Progress,
) -> Made:
    from joulesmith.engines.torch_engine import TorchSession

    whole = model.parameters

    with show.stage("reference") as tick, TorchSession(model.module) as session:
        reference = write_reference(
            session, inputs.final, workspace.work / "final.npy", inputs.evaluation_text, tick
        )
    begun = apply.apply(model, first, recipes.Fitted(), inputs, workspace, show)
    if fitted is None:
        fitted = recipes.fit(rest, model, form)
    done = apply.apply(model, rest, fitted, inputs, workspace, show, begun)
    apply.as_stored(model, done.packed, vectors=form != forms.GGUF)
    cached: Cache | None = None
    with ExitStack() as stack:
        stack.enter_context(quantized_inputs(model.module, done.inputs))

        def judged(tick: Tick) -> Quality:
            with TorchSession(model.module) as session:
                return judge(session.score(inputs.final, reference.path, tick), reference)

        with show.stage("judge") as tick:
            quality = judged(tick)
        if done.cache is not None:
            from joulesmith.compress.quantize.kv_layers import PackedCache, packed_cache

            bits = PackedCache(model.module.config, done.cache).bits_per_value
            show.expected.setdefault("cache", _CACHE)
            with show.stage("cache") as tick, packed_cache(model.module, done.cache):
                cached = Cache(bits, judged(tick), str(done.cache))
    blocks = [r for r in model.matrices() if r.layer is not None]
    inside = [r for r in blocks if r.name in done.packed]
    staged = workspace.work / ("staged.gguf" if form == forms.GGUF else "staged")
    shutil.rmtree(staged, ignore_errors=True)  # of a run that was killed here
    with show.stage("write"):
        by_name = {r.name: done.inputs[module_of(r)] for r in inside} if done.inputs else None
        size = forms.write(form, model, done.packed, staged, by_name)
        adapter = None
        if done.factors:
            adapter = forms.write_adapter(form, model, done.factors, staged)
    sparse_bits = _sparse_bits(staged) if form == forms.SPARSE else None
    engine, engine_quality = None, None
    if form == forms.GGUF:
        engine, engine_quality = in_llama(staged, adapter, reference, show)
    told, adapter = _publish(recipe, staged, adapter, out, form)
    types = {n: k for n, (k, _) in done.packed.items()}
    stored = [(r.shape[0] * r.shape[1], types.get(r.name, forms.UNTOUCHED)) for r in blocks]
    counted = stored if not inside else [(r.shape[0] * r.shape[1], types[r.name]) for r in inside]
    spent = sum(n * forms.bits_per_weight(form, k) for n, k in counted)
    bits = spent / sum(n for n, _ in counted) if sparse_bits is None else sparse_bits
    static = any(not q.scheme.dynamic for q in done.inputs.values())
    by_token = tuple(r.name for r in inside if static and done.inputs[module_of(r)].scheme.dynamic)
    scheme = fitted.scheme
    return Made(
        folder=str(out),
        type="",
        bytes=size,
        bits_per_weight=bits,
        quality=quality,
        damage=done.damage,
        origin=model.origin,
        inputs=None if scheme is None else words(scheme, len(by_token)),
        by_token=by_token,
        smoothing=done.smoothing,
        cache=cached,
        format=form,
        types=types,
        notes=tuple(done.notes),
        recipe=str(told),
        adapter=None if adapter is None else str(adapter),
        engine=engine,
        engine_quality=engine_quality,
        pruned=done.pruned,
        shrunk=done.shrunk,
        parameters=(whole, model.parameters),
    )


def _sparse_bits(folder: Path) -> float:
    """Bits per weight of the blocks' matrices as they lie there, places of zeros counted."""
    from joulesmith.formats.packed import place
    from joulesmith.inspection import inspect_model

    stored = inspect_model(folder).tensors
    inside = [t for t in stored if len(t.shape) > 1 and place(t.name)[0] is not None]
    return 8 * sum(t.bytes for t in inside) / sum(math.prod(t.shape) for t in inside)


def in_llama(
    path: Path, adapter: Path | None, reference: Reference, show: Progress
) -> tuple[str, Quality]:
    """What the written file keeps where it will run."""
    from joulesmith.job.judge import score_file

    engine = get_engine("llama.cpp")
    show.expected.setdefault("engine", _ENGINE)
    with show.stage("engine"):
        return engine.version, score_file(engine, path, reference, adapter)


def _publish(
    recipe: Recipe, staged: Path, adapter: Path | None, out: Path, form: str
) -> tuple[Path, Path | None]:
    """Move what was written and judged to its place, with the recipe that makes it.

    Returns where the recipe and the adapter are; the model is moved last.
    """
    if form != forms.GGUF:
        recipe.save(staged / RECIPE)
        staged.replace(out)
        return out / RECIPE, None if adapter is None else out / adapter.name
    recipe.save(beside_of(out))
    if adapter is not None:
        adapter = adapter.replace(out.with_suffix(forms.ADAPTER_SUFFIX))
    staged.replace(out)
    return beside_of(out), adapter


def round_rows(
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


def input_quantizers(
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
