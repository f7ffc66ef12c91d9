"""Commands that make models: `optimize`, `compress` and `quantize`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from joulesmith.cli.common import (
    AsJson,
    Calib,
    EngineLib,
    EngineName,
    Eval,
    Model,
    Workload,
    app,
    console,
    interruptible,
    parse_duration,
    parse_keep,
    parse_workload,
    print_json,
    show,
)
from joulesmith.errors import JoulesmithError

if TYPE_CHECKING:
    from joulesmith.job.quantize import Made


@app.command()
def optimize(
    model: Model,
    keep: Annotated[
        str,
        typer.Option(
            help="Least quality to keep: a share (perplexity ratio), or a type such as Q4_K_M: "
            "what that keeps."
        ),
    ] = "0.99",
    engine: EngineName = "llama.cpp",
    workload: Workload = "64:256",
    calib: Calib = None,
    eval_: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--eval",
            help="Text file (or hf:DATASET) to judge on. Default: English that Python ships.",
        ),
    ] = None,
    grid: Annotated[
        str, typer.Option(help="Country or region of the electricity grid, e.g. DE.")
    ] = "WORLD",
    time_budget: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="About how long it may take, e.g. 10m or 600s: fewer trials, same floor."
        ),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of the run. Default: one under joulesmith-out/."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling and of splits.")] = 0,
    pairs: Annotated[int, typer.Option(help="Interleaved rounds of measuring.")] = 7,
    engine_lib: EngineLib = None,
) -> None:
    """Find the cheapest model above the floor, write it, measure it, report it.

    The same command again goes on where it stopped, or says that it is done. Exit code 3:
    no plan keeps the quality that was asked for.
    """
    from joulesmith.job.run import run
    from joulesmith.job.settings import Settings
    from joulesmith.progress import Progress
    from joulesmith.report.files import PAGE_NAME, RESULT_NAME, load_result

    settings = Settings(
        model=model,
        keep=parse_keep(keep),
        engine=engine,
        workload=parse_workload(workload),
        calib=calib,
        eval=eval_,
        grid=grid,
        time_budget=None if time_budget is None else parse_duration(time_budget),
        out=out,
        seed=seed,
        pairs=pairs,
        engine_lib=engine_lib,
    )
    folder = settings.folder()
    done = (folder / RESULT_NAME).exists()
    try:
        with interruptible("the same command goes on where it stopped"):
            run(settings, Progress({}))
    finally:
        if (folder / RESULT_NAME).exists():
            show(load_result(folder))
            print(f"Report: {folder / PAGE_NAME}")
            if done:
                print("This run was done before; nothing was computed again.")


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write; for a GGUF, file FILE.gguf.")],
    type_: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--type",
            help="GGUF: Q4_K, Q5_0, IQ4_NL ... Other formats: INT4-G128, INT4-G64-ZP (with "
            "zeros), INT8-G128 ... With 8-bit inputs too: W8A8, W8A8-STATIC, FP8. "
            "Default: INT4-G64, in a GGUF Q4_K.",
        ),
    ] = None,
    format_: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--format",
            help="compressed-tensors, gguf, onnx or openvino. Default: gguf where --out ends so, "
            "else compressed-tensors.",
        ),
    ] = None,
    recipe: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE.yaml", help="Apply a recipe: types by tensor, and steps before them."
        ),
    ] = None,
    embedding: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="TYPE",
            help="In a GGUF, the type of embedding and head. Default: Q6_K or more. Other formats "
            "keep them in F16.",
        ),
    ] = None,
    calib: Calib = None,
    eval_: Eval = None,
    effort: Annotated[
        str,
        typer.Option(
            help="nearest; fast: error feedback (GPTQ); default: rounding learned block by block "
            "and scales tuned as well; thorough: four times as long."
        ),
    ] = "default",
    rotate: Annotated[
        bool,
        typer.Option("--rotate", help="Rotate the residual stream first; unties a tied head."),
    ] = False,
    map_: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--map", help="HTML file to write: the damage of every matrix, as a map."),
    ] = None,
    kv_cache: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Judge with keys and values on 8 or 4 bits as well."),
    ] = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Seed of sampling and of splits. Default: the recipe's, else 0."),
    ] = None,
    json_: AsJson = False,
) -> None:
    """Quantize a model for llama.cpp, vLLM, transformers, ONNX Runtime or OpenVINO; say what
    is kept.

    Every matrix of the decoder blocks gets the one type, or what a recipe says. What is kept is
    judged with inputs rounded, where the type does that, and a GGUF in llama.cpp as well. The
    recipe is written with the model: --recipe makes the same again. The same command again goes
    on where it stopped.
    """
    from joulesmith.job.quantize import quantize as run
    from joulesmith.progress import Progress

    _check_map(map_)
    if format_ is None:
        format_ = "gguf" if out.suffix.lower() == ".gguf" else "compressed-tensors"
    with interruptible("the same command goes on where it stopped"):
        found = run(
            model,
            type_,
            out,
            recipe=recipe,
            calib=calib,
            evaluation=eval_,
            seed=seed,
            kv_cache=kv_cache,
            effort=effort,
            rotate=rotate,
            embedding=embedding,
            form=format_,
            progress=Progress({}),
        )
    _tell(found, json_, map_, f"{found.type} of {model}")


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write; for a GGUF, file FILE.gguf.")],
    prune: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="SHARE|COUNT|N:M",
            help="Set weights to zero: 0.5 is half of those in the blocks, 90M as many as leave 90 "
            "million in the model, 2:4 two of every four.",
        ),
    ] = None,
    shrink: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="SHARE|COUNT|PARTS",
            help="A smaller dense model: 0.8 of its parameters, 90M of them, joules=0.8 of a "
            "decoded token's on this machine, or parts by name: "
            "layers=24,neurons=0.8,heads=0.75,width=512.",
        ),
    ] = None,
    type_: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--type", help="Quantize afterwards, as  joulesmith quantize  does."),
    ] = None,
    format_: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--format",
            help="transformers, gguf, sparse (zeros left out), compressed-tensors, onnx or "
            "openvino. Default: gguf where --out ends so; sparse with --prune, compressed-tensors "
            "with --type, else transformers.",
        ),
    ] = None,
    method: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Of --prune: admm (default), sparsegpt; or by a score alone: wanda, magnitude, "
            "taylor, fisher, movement, update."
        ),
    ] = None,
    pattern: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of --prune: unstructured (default), row, or block:4x4."),
    ] = None,
    allocation: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Of --prune, how layers share the zeros: damage (least predicted loss; default), "
            "threshold (one score for all) or uniform."
        ),
    ] = None,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Of --prune: least squares for what a score leaves."),
    ] = False,
    before: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="MODEL", help="Of --method movement and update: the model before training."
        ),
    ] = None,
    layers: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="PATTERN", help='Of --prune: only these, such as "*.mlp.*". May be repeated.'
        ),
    ] = None,
    calib: Calib = None,
    eval_: Eval = None,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Print per layer what went and why."),
    ] = False,
    map_: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--map", help="HTML file to write: the same as a heat map."),
    ] = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Seed of sampling, of drawn labels and of splits. Default: 0."),
    ] = None,
    json_: AsJson = False,
) -> None:
    """Take weights, neurons, heads and layers out of a model; say what is kept.

    --shrink gives a smaller dense model, which engines run faster. --prune makes zeros: the
    file is smaller, and no engine here runs it faster. What is left is fitted to make up for
    what went; nothing is trained. The recipe is written with the model. The same command again
    goes on where it stopped: at the block that was being pruned, the shape being tried.
    """
    from joulesmith.job.compress import compress as run
    from joulesmith.progress import Progress

    _check_map(map_)
    given = {
        "method": method, "pattern": pattern, "allocation": allocation, "repair": repair or None,
        "before": before, "layers": None if not layers else tuple(layers),
    }  # fmt: skip
    with interruptible("the same command goes on where it stopped"):
        found = run(
            model,
            out,
            prune=prune,
            shrink=shrink,
            kind=type_,
            form=format_,
            settings={k: v for k, v in given.items() if v is not None},
            calib=calib,
            evaluation=eval_,
            seed=seed,
            progress=Progress({}),
        )
    _tell(found, json_, map_, model, explain=explain)


def _check_map(path: Path | None) -> None:
    if path is not None and not path.parent.is_dir():
        raise JoulesmithError(f"no such folder for --map: {path.parent}")
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise JoulesmithError(f"cannot write --map {path}: give the name of an HTML file")


def _tell(
    found: Made, json_: bool, path: Path | None, title: str, *, explain: bool = False
) -> None:
    if json_:
        print_json(found)
    else:
        from joulesmith.report.model_tables import render_made, render_removed

        render_made(found, console())
        if explain:
            render_removed(found, console())
    if path is None:
        return
    from joulesmith.report import damage_of, heat_map_page
    from joulesmith.report.heat_map import removed_of

    damage = {n: d for n, d in found.damage.items() if n in found.types}
    if found.pruned or found.shrunk is not None:
        heat_map_page(removed_of(found, title=title), path)
    elif damage:
        heat_map_page(damage_of(damage, found.types, title=title), path)
    else:
        print("joulesmith: no --map: this recipe predicts no damage", file=sys.stderr)
