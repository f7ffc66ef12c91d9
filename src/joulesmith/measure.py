"""Measure one model as it is: joules and tokens per second, prefill and decode apart."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from joulesmith.engines import get_engine
from joulesmith.engines.compare import PHASES, Cost, Phase, cost, rounds
from joulesmith.errors import JoulesmithError
from joulesmith.models import resolve
from joulesmith.progress import Tick, silent


@dataclass(frozen=True)
class Measurement:
    """Medians over ``repeat`` requests of (prefill, decode) tokens.

    costs: phase -> joules per token with interval and pedigree, seconds per token.
    spread: phase -> smallest and largest seconds per token. peak_rss in bytes.
    """

    model: str
    engine: str
    file_bytes: int
    workload: tuple[int, int]
    repeat: int
    costs: dict[Phase, Cost]
    spread: dict[Phase, tuple[float, float]]
    peak_rss: int | None
    note: str


def measure_model(
    model: str,
    *,
    workload: tuple[int, int] = (64, 256),
    repeat: int = 5,
    engine: str = "llama.cpp",
    engine_lib: str | None = None,
    progress: Tick = silent,
) -> Measurement:
    """Run ``model`` on ``engine`` and meter it.

    model: a ``.gguf`` as it is; a compressed-tensors folder as it is, in torch with packed
    weights whatever ``engine`` says (llama.cpp does not read it); another folder, a hub id or
    "smollm2" as a bfloat16 GGUF made for the purpose. Raises `JoulesmithError` for anything
    that cannot be run.
    """
    if min(workload) < 1 or repeat < 1:
        raise JoulesmithError("workload and repeat must be at least 1")
    source = resolve(model)
    packed = source.kind == "folder" and _is_packed(source.path)
    if engine == "torch" and not packed:
        raise JoulesmithError(
            f"the torch engine runs packed folders, and {model} is none: use --engine llama.cpp"
        )
    runner = get_engine("torch" if packed else engine, library=engine_lib)
    with tempfile.TemporaryDirectory(prefix="joulesmith-") as folder:
        note = ""
        path = source.path
        if packed:
            note = "packed weights, run in torch: llama.cpp does not read this folder"
        elif source.kind != "gguf" or model == "smollm2":
            from joulesmith.export.gguf import write_float_gguf
            from joulesmith.models import load

            path = Path(folder) / "model.gguf"
            write_float_gguf(load(model), path)
            note = f"as a bfloat16 GGUF made from {source.origin}"
        else:
            from joulesmith.gguf_file import read_gguf

            read_gguf(path)
        with runner.load(path, context=sum(workload)) as session:
            found = rounds(
                {source.name: lambda i: session.bench(*workload, seed=i)},
                repeat,
                progress=progress,
            )
        files = path.glob("*.safetensors") if packed else [path]
        size = sum(file.stat().st_size for file in files)
    return Measurement(
        model=source.name,
        engine=runner.version,
        file_bytes=size,
        workload=workload,
        repeat=repeat,
        costs={phase: cost(found, source.name, phase) for phase in PHASES},
        spread={phase: _spread(found, source.name, phase) for phase in PHASES},
        peak_rss=found[-1][source.name]["peak_rss"],
        note=note,
    )


def _is_packed(folder: Path) -> bool:
    from joulesmith.vocab_folder import read_json

    config = read_json(folder / "config.json").get("quantization_config")
    return isinstance(config, dict) and config.get("quant_method") == "compressed-tensors"


def _spread(found: list[dict[str, Any]], name: str, phase: Phase) -> tuple[float, float]:
    each = [cost([row], name, phase).seconds for row in found]
    return min(each), max(each)
