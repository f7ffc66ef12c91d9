"""Commands that only look: into a model file, and at a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from joulesmith.cli.common import app, console, interruptible, print_json, show


@app.command()
def inspect(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE_OR_FOLDER",
            help=".gguf, .safetensors, a Hugging Face folder, .onnx, OpenVINO .xml, llama2.c.",
        ),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    map_: Annotated[
        bool, typer.Option("--map", help="Bits per weight of every matrix, layers by roles.")
    ] = False,
    joules: Annotated[
        bool,
        typer.Option(
            "--joules",
            help="Predict joules per decoded token: measures matrices like these for up to a "
            "minute, once.",
        ),
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a model file holds: architecture, types, bits per weight, bytes, joules.

    Only headers are read; nothing in the file is run or unpacked.
    """
    from joulesmith.inspection import inspect_model

    found = inspect_model(file)
    if joules:
        from dataclasses import replace

        from joulesmith.job.cost import decode_cost
        from joulesmith.progress import Progress

        progress = Progress({"measure": 1})
        with interruptible("nothing was written"), progress.stage("measure") as tick:
            found = replace(found, cost=decode_cost(found, tick))
    if json_:
        print_json(found)
    else:
        from joulesmith.report.model_tables import render_inspection

        render_inspection(found, console(), every_tensor=tensors, heat_map=map_)


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a finished run, or a trained .gguf.")
    ],
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show a finished run again, and write its page anew."""
    from joulesmith.report.files import PAGE_NAME, load_result
    from joulesmith.report.training_result import TRAINING

    place = folder / TRAINING if folder.is_dir() else folder
    if place.suffix.lower() == ".gguf":
        place = place.with_suffix(f".{TRAINING}")
    if place.name.endswith(TRAINING) and (place.is_file() or place != folder / TRAINING):
        _training(place, json_)
        return
    result = load_result(folder)
    if json_:
        print(result.model_dump_json(indent=1))
        return
    from joulesmith.report import write_page

    page = (folder if folder.is_dir() else folder.parent) / PAGE_NAME
    write_page(result, page)
    show(result)
    print(f"Report: {page}")


def _training(path: Path, json_: bool) -> None:
    from joulesmith.report.training_page import write_training_page
    from joulesmith.report.training_result import TRAINING, TRAINING_PAGE, read_training
    from joulesmith.report.training_tables import render_training

    found = read_training(path)
    if json_:
        print(found.model_dump_json(indent=1))
        return
    page = path.with_name(path.name.removesuffix(TRAINING) + TRAINING_PAGE)
    write_training_page(found, page)
    render_training(found, console())
    print(f"Report: {page}")
