"""One type for all matrices, judged and written: `joulesmith quantize`.

    model + text -> reference -> rounded matrices -> judged -> folder

No joules are measured and nothing is searched; `run` does both.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from joulesmith.errors import JoulesmithError
from joulesmith.job.inputs import gather
from joulesmith.progress import Progress
from joulesmith.quality import Quality, judge, write_reference
from joulesmith.workspace import Workspace

if TYPE_CHECKING:
    from joulesmith.architectures import TensorRef
    from joulesmith.compress.quantize.integers import IntGrid
    from joulesmith.models import Model

STAGES = {"load": 5, "text": 40, "reference": 20, "round": 90, "judge": 25, "write": 3}
_UNTOUCHED = "F16"


@dataclass(frozen=True)
class Quantized:
    """What came out.

    folder: of the model. bytes: of its weights. bits_per_weight: of the matrices that
    were quantized, scales and zeros counted. damage: layer name -> predicted KL, nats a
    token. origin: of the weights that it is compared with.
    """

    folder: str
    type: str
    bytes: int
    bits_per_weight: float
    quality: Quality
    damage: dict[str, float]
    origin: str


def quantize(
    model: str,
    kind: str,
    out: Path,
    *,
    calib: str | None = None,
    evaluation: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Quantized:
    """Round every matrix of the blocks to ``kind`` ("INT4-G128") and write a folder.

    The folder is compressed-tensors, which vLLM and `transformers` load; the working
    files lie beside it in ``out.work`` until it is complete, and a run that was
    interrupted goes on there. Raises `JoulesmithError` for a type that engines cannot
    load, an ``out`` that exists, or text that is missing.
    """
    from joulesmith.export.compressed_tensors import loadable
    from joulesmith.models import load

    g = loadable(kind)
    if g is None:
        raise JoulesmithError(
            f"--type {kind}: give integers of 4 or 8 bits by group, such as INT4-G128, "
            "INT4-G64-ZP or INT8-G128"
        )
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
    }  # fmt: skip
    with show.stage("load"):
        loaded = load(model)
        inside = [r for r in loaded.matrices() if r.layer is not None]
        for ref in inside:
            g.row_bytes(ref.shape[1])  # told before any work is done
    whole = out.resolve()  # "." has no name
    beside = whole.with_name(whole.name + ".work")
    with Workspace(beside, arguments) as workspace:
        found = _run(loaded, inside, g, out, workspace, calib, evaluation, seed, show)
    shutil.rmtree(beside, ignore_errors=True)
    return found


def _run(
    model: Model,
    inside: Sequence[TensorRef],
    g: IntGrid,
    out: Path,
    workspace: Workspace,
    calib: str | None,
    evaluation: str | None,
    seed: int,
    show: Progress,
) -> Quantized:
    from joulesmith.engines.torch_engine import TorchSession
    from joulesmith.export.compressed_tensors import write_compressed
    from joulesmith.models import set_gguf_weight
    from joulesmith.plan import candidates

    with show.stage("text") as tick:
        inputs = gather(model, calib, evaluation, workspace.work, seed, 1.0, tick)
    with show.stage("reference") as tick, TorchSession(model.module) as session:
        reference = write_reference(
            session, inputs.final, workspace.work / "final.npy", inputs.evaluation_text, tick
        )

    def types(ref: TensorRef) -> list[str]:
        return [_UNTOUCHED if ref.layer is None else g.name]

    with show.stage("round") as tick:
        store = candidates.make(
            model, inputs.calibration, types, workspace.work / "packed", seed=seed, progress=tick
        )
    with show.stage("judge") as tick:
        packed = {r.name: (g.name, store.packed(r.name, g.name)) for r in inside}
        for ref in inside:
            back = torch.from_numpy(g.unpack(packed[ref.name][1], ref.shape[1]))
            set_gguf_weight(model, ref.name, back)
        with TorchSession(model.module) as session:
            scores = session.score(inputs.final, reference.path, tick)
        quality = judge(scores, reference)
    with show.stage("write"):
        size = write_compressed(model, packed, out)
    return Quantized(
        folder=str(out),
        type=g.name,
        bytes=size,
        bits_per_weight=g.bits_per_weight,
        quality=quality,
        damage={r.name: store.damage[r.name][g.name] for r in inside},
        origin=model.origin,
    )
