"""What one `optimize` run found, as it is stored in ``result.json``.

Written by `optimize`, read by the page, the terminal table and by anyone's
scripts. Knows how to be read and written, not how figures were got.
Every energy is in joules, every time in seconds, every size in bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from joulesmith.errors import JoulesmithError

SCHEMA = 1
PedigreeName = Literal["measured", "modelled", "assumed"]


class _Shape(BaseModel):
    # Without "strings" a NaN is saved as null and the file cannot be read back.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Energy(_Shape):
    """Joules per token, with a 90 % interval. ``None`` is unknown, never 0."""

    joules: float | None
    low: float | None
    high: float | None
    marginal: float | None
    pedigree: PedigreeName | None
    seconds: float
    """Seconds per token (median)."""


class QualityFigures(_Shape):
    """Kept quality on text that nothing was fitted on."""

    kept: float
    """ppl(reference) / ppl(this)."""
    kept_low: float
    """Lower 95 % confidence bound of ``kept``."""
    perplexity: float
    reference_perplexity: float
    kl: float
    """Mean KL(reference || this), nats per token."""
    top1: float
    """Share of tokens whose most likely next token is the reference's."""
    tokens: int
    text: str


class Run(_Shape):
    """One model file (or the torch model) on one engine."""

    name: str
    kind: Literal["plan", "baseline", "given", "uniform", "torch", "peer"]
    engine: str
    file: str | None
    file_bytes: int | None
    bits_per_weight: float | None
    prefill: Energy
    decode: Energy
    workload: Energy
    """Joules of one whole request of the workload, divided by its tokens (prefill + decode)."""
    peak_rss: int | None
    quality: QualityFigures | None
    passes: bool | None
    """Whether the lower bound clears the floor; ``None`` when not judged."""
    note: str = ""


class Ratio(_Shape):
    """How many times fewer joules the plan takes than ``baseline``; from interleaved pairs."""

    baseline: str
    phase: Literal["prefill", "decode", "workload"]
    ratio: float
    """Median over pairs of joules(baseline) / joules(plan); above 1 is a saving."""
    low: float
    high: float
    """Interval of the median, 95 %, by bootstrap over pairs."""
    pairs: int
    spread: tuple[float, float]
    """Smallest and largest single pair."""


class FrontPoint(_Shape):
    """Quality against joules: one point of the front or one uniform type."""

    name: str
    kind: Literal["front", "uniform", "plan", "baseline", "given"]
    joules_per_token: float
    kept: float
    kept_low: float | None
    measured: bool
    """True when run on the engine, False when predicted from the joule table."""
    kl: float | None = None


class TensorChoice(_Shape):
    """One tensor of the plan."""

    tensor: str
    layer: int | None
    role: str
    """attn_q, attn_k, attn_v, attn_output, ffn_gate, ffn_up, ffn_down, token_embd, output ..."""
    type: str
    rows: int
    columns: int
    bits_per_weight: float
    damage: float
    """Predicted KL, nats per token, that this choice costs."""
    joules: float
    """Predicted joules per decoded token of this tensor."""


class TableCell(_Shape):
    """The joule table: one multiplication by a (rows, columns) tensor of a type, on the engine."""

    rows: int
    columns: int
    type: str
    decode_joules: float
    """Joules for one token."""
    prefill_joules: float
    """Joules per token in a batch."""
    decode_seconds: float
    prefill_seconds: float
    pedigree: PedigreeName | None


class Prediction(_Shape):
    """The plan's prediction against what was then measured, in joules per token."""

    phase: Literal["prefill", "decode", "workload"]
    predicted: float
    measured: float


class Emission(_Shape):
    """Grid carbon and money of a million tokens of the workload."""

    name: str
    grid: str
    gco2e_per_kwh: float
    gco2e: float | None
    price_per_kwh: float
    currency: str
    cost: float | None
    source: str


class Machine(_Shape):
    cpu: str
    cores: int
    threads: int
    memory_bytes: int
    gpus: tuple[str, ...]
    system: str
    power_source: str
    """How joules were got here, in a sentence."""
    idle_watts: float | None
    max_watts: float | None


class Result(_Shape):
    """Everything of one run of the main job."""

    schema_version: int = SCHEMA
    joulesmith: str
    created: str
    """UTC, ISO 8601."""
    command: str
    seeds: dict[str, int]
    model: str
    architecture: str
    parameters: int
    origin: str
    """Where the weights come from, caveats included ("dequantized from Q4_1 ...")."""
    engine: str
    machine: Machine
    keep: float
    workload_prefill: int
    workload_decode: int
    calibration: str
    evaluation: str
    status: Literal["passed", "none"]
    """"none": no plan clears the floor; the plan run is then the nearest miss."""
    verdict: str
    headline_baseline: str
    runs: tuple[Run, ...]
    ratios: tuple[Ratio, ...]
    front: tuple[FrontPoint, ...]
    tensors: tuple[TensorChoice, ...]
    table: tuple[TableCell, ...]
    predictions: tuple[Prediction, ...]
    emissions: tuple[Emission, ...]
    caveats: tuple[str, ...]
    timings: dict[str, float]
    """Seconds spent by stage."""
    peak_memory: int | None
    """Peak resident bytes of the whole run, children included."""

    def run(self, kind: str) -> Run | None:
        """The first run of a kind, or None."""
        return next((r for r in self.runs if r.kind == kind), None)


def read_result(path: Path) -> Result:
    """Read ``result.json``. Raises `JoulesmithError` with one line when it is not one."""
    try:
        return Result.model_validate_json(path.read_bytes())
    except OSError as e:
        raise JoulesmithError(f"cannot read {path}: {e.strerror or e}") from e
    except ValidationError as e:
        first: dict[str, Any] = dict(e.errors()[0])
        where = ".".join(str(p) for p in first["loc"]) or "the file"
        raise JoulesmithError(f"not a joulesmith result: {path}: {where}: {first['msg']}") from e
