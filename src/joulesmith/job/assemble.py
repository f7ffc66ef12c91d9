"""Collect one run's figures into its `Result`. Measures nothing, decides nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from joulesmith._version import __version__
from joulesmith.energy import grid as find_grid
from joulesmith.energy import price as find_price
from joulesmith.gguf_file import type_bytes
from joulesmith.job import summary
from joulesmith.job.judge import FLOAT, bits_per_weight, stored_types
from joulesmith.job.machine import machine
from joulesmith.job.marks import Mark, Rival, given_types
from joulesmith.models import EMBEDDING, HEAD
from joulesmith.plan.search import Space, Trial, front, option_damage
from joulesmith.plan.space import totals
from joulesmith.report.result import Ratio, Result, Run, TableCell, TensorChoice

if TYPE_CHECKING:
    from joulesmith.engines.base import Engine
    from joulesmith.job.inputs import Inputs
    from joulesmith.job.settings import Settings
    from joulesmith.models import Model
    from joulesmith.plan.damage import Correction
    from joulesmith.plan.table import JouleTable
    from joulesmith.quality import Quality

PLAN = "joulesmith plan"
TORCH = "torch, bfloat16 eager"


@dataclass(frozen=True)
class Found:
    """All that a run found out.

    rounds: interleaved benches of the plan and its rivals. torch_rounds: of the plan and
    torch. rest: joules per token beside the matrices, untouched: those of the float file
    when the table was measured, by phase.
    """

    settings: Settings
    keep: float
    model: Model
    engine: Engine
    inputs: Inputs
    table: JouleTable
    rest: Mapping[str, float]
    untouched: Mapping[str, float]
    space: Space
    correction: Correction
    trials: Sequence[Trial]
    trial: Trial
    quality: Quality
    file: Path
    marks: Sequence[Mark]
    rivals: Sequence[Rival]
    rounds: Sequence[dict[str, Any]]
    torch_rounds: Sequence[dict[str, Any]]

    @property
    def passed(self) -> bool:
        """Whether the plan clears the floor on the final windows."""
        return self.quality.passes(self.keep)

    @property
    def export_name(self) -> str:
        """Name of the exported file."""
        return f"{self.model.name}-joulesmith.gguf"


def assemble(f: Found, timings: Mapping[str, float], peak: int | None) -> Result:
    """The `Result` of a run."""
    s, model = f.settings, f.model
    runs, ratios = _runs(f), _ratios(f)
    best = summary.best_baseline(runs)
    headline = next((r for r in ratios if r.baseline == best.name and r.phase == "workload"), None)
    status = "passed" if f.passed else "none"
    guess = _predict(f, f.trial.types)
    # What the machine's speed did between the table and the rounds, told by the float file.
    untouched = next((r for r in runs if r.name == f"{FLOAT} GGUF"), None)
    drift = {} if untouched is None else summary.drift(f.untouched, untouched)
    moved = drift.get("workload", 1.0)
    chosen = sum(f.space.joules[t][k] for t, k in f.trial.types.items())
    slope = summary.loss_per_damage([(t.damage, t.quality) for t in f.trials])
    curve = [
        (moved * (c.joules + guess["workload"] - chosen), math.exp(-slope * c.damage))
        for c in front(f.space, f.correction)
    ]
    references = [(m.name, moved * _predict(f, m.types)["workload"], m.quality) for m in f.marks]
    return Result(
        joulesmith=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=s.command(),
        seeds={"run": s.seed},
        model=model.name,
        architecture=model.architecture,
        parameters=model.parameters,
        origin=model.origin,
        engine=f.engine.version,
        machine=machine(f.engine.threads),
        keep=f.keep,
        workload_prefill=s.workload[0],
        workload_decode=s.workload[1],
        calibration=f"{f.inputs.calibration_text}, {f.inputs.calibration.size} tokens",
        evaluation=f"{f.inputs.evaluation_text}, {f.quality.tokens} tokens judged",
        status=status,  # type: ignore[arg-type]
        verdict=summary.verdict(runs[0], headline, f.keep, status),
        headline_baseline=best.name,
        runs=tuple(runs),
        ratios=tuple(ratios),
        front=tuple(summary.front_points(curve, references, runs)),
        tensors=tuple(_tensors(f)),
        table=tuple(TableCell(**c) for c in f.table.cells()),
        predictions=tuple(summary.predictions(guess, runs[0], drift)),
        emissions=tuple(summary.emissions(runs, find_grid(s.grid), find_price(s.grid))),
        caveats=_caveats(f),
        timings=dict(timings),
        peak_memory=peak,
    )


def _runs(f: Found) -> list[Run]:
    engine = f.engine.version
    keep = f.keep
    runs = [
        summary.make_run(
            PLAN,
            "plan",
            f.rounds,
            engine=engine,
            keep=keep,
            quality=f.quality,
            file=f.export_name if f.passed else None,
            file_bytes=f.file.stat().st_size,
            bits=bits_per_weight(f.model, f.trial.types),
        )
    ]
    for r in f.rivals:
        runs.append(
            summary.make_run(
                r.name,
                r.kind,
                f.rounds,
                engine=engine,
                keep=keep,
                quality=r.quality,
                file=r.path.name if r.kind == "given" else None,
                file_bytes=r.path.stat().st_size,
                bits=bits_per_weight(f.model, r.types),
                note=r.note,
            )
        )
    if f.torch_rounds:
        decoded = f.torch_rounds[0][TORCH]["decode"]["tokens"]
        runs.append(
            summary.make_run(
                TORCH,
                "torch",
                f.torch_rounds,
                engine="torch",
                keep=keep,
                quality=None,
                note=f"measured with {decoded} decoded tokens a request",
            )
        )
    return runs


def _ratios(f: Found) -> list[Ratio]:
    seed = f.settings.seed
    ratios = summary.make_ratios(f.rounds, PLAN, [r.name for r in f.rivals], seed)
    if f.torch_rounds:
        ratios += summary.make_ratios(f.torch_rounds, PLAN, [TORCH], seed)
    return ratios


def _predict(f: Found, types: Mapping[str, str]) -> dict[str, float]:
    matrices = f.model.matrices(split_head=HEAD in types)
    return totals(matrices, types, FLOAT, f.table.price, f.rest, f.settings.workload)


def _tensors(f: Found) -> list[TensorChoice]:
    out = []
    chosen = f.trial.types
    types = stored_types(f.model, chosen)
    for ref in f.model.matrices(split_head=HEAD in types):
        kind = types[ref.name]
        shared = ref.name == EMBEDDING and HEAD in chosen and HEAD not in types
        uses = (EMBEDDING, HEAD) if shared else (ref.name,)
        out.append(
            TensorChoice(
                tensor=ref.name,
                layer=ref.layer,
                role=ref.role,
                type=kind,
                rows=ref.shape[0],
                columns=ref.shape[1],
                bits_per_weight=8 * type_bytes(kind, ref.shape) / (ref.shape[0] * ref.shape[1]),
                damage=sum(option_damage(f.space, f.correction, u, chosen[u]) for u in uses),
                joules=sum(f.space.joules[u][chosen[u]] for u in uses),
            )
        )
    return out


def _caveats(f: Found) -> tuple[str, ...]:
    """What a reader must know before quoting a figure."""
    out = []
    if f.settings.model == "smollm2":
        out.append(
            "The weights are dequantized from Q4_1, the only packaging at hand of the "
            "published bfloat16 checkpoint. These weights lie on that grid by accident, so "
            "Q4_1 is left out of the plan and of the comparison, and the types like it (Q4_K, "
            "Q5_1, Q5_K: an offset for each few weights) out of the plan; Q4_K_M keeps the "
            "advantage. The given file's own figures are shown beside the others."
        )
    elif given_types(f.model):
        out.append(
            "The reference is the given file's own weights: what it lost when it was "
            "quantized is not seen here."
        )
    if isinstance(f.settings.keep, str):
        out.append(f"The floor is what a {f.settings.keep} file of this model keeps.")
    if f.settings.calib is None:
        out.append("Calibrated on the model's own samples, not on the user's text.")
    return tuple(out)
