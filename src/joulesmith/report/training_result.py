"""What one training found, as it is stored in ``training.json``. Knows how to be read and written,
not how figures were got. Energies are in joules, times in seconds, losses in nats a token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from joulesmith.atomic import atomic_path
from joulesmith.energy.reading import worst
from joulesmith.energy.totals import plus
from joulesmith.errors import JoulesmithError
from joulesmith.report.result import PedigreeName, QualityFigures, _Shape

TRAINING = "training.json"
TRAINING_PAGE = "training.html"
Kind = Literal["train", "distill", "recover"]


class Scaling(_Shape):
    """Several ranks against one, of the same steps. None is unknown, with why in ``note``."""

    ranks: int
    plan: str
    """How the ranks share the work, in words."""
    speed_up: float | None
    """T1 / Tn."""
    joules_ratio: float | None
    """Jn / J1."""
    communication: float | None
    """Share of the time of a step."""
    note: str = ""


class TrainingResult(_Shape):
    """Everything of one `joulesmith train`, `distill` or `recover`."""

    training_version: int = 1
    joulesmith: str
    created: str
    """UTC, ISO 8601."""
    kind: Kind
    command: str
    model: str
    origin: str
    """Where the weights come from, caveats included."""
    teacher: str | None
    out: str
    format: str
    bytes: int
    parameters: int
    teacher_parameters: int | None
    device: str
    text: str
    windows: int
    windows_of: int
    repeats: int
    """Windows left out because they repeat others."""
    length: int
    """Tokens of a window."""
    before: QualityFigures | None
    """Of the student against the teacher before training; None without a teacher."""
    after: QualityFigures
    """Of what was written, in torch; against the teacher, or the model before training."""
    engine: str | None
    engine_quality: QualityFigures | None
    recovered: float | None
    """Share of the gap to the teacher, in nats a token of held-out text, that training closed."""
    steps: int
    stopped: str
    tokens: int
    joules: float | None
    low: float | None
    high: float | None
    pedigree: PedigreeName | None
    seconds: float
    optimizer_bytes: int
    next_percent: float | None
    """Joules that one more percent of perplexity would cost; infinity where the loss no longer
    falls, None where that is unknown."""
    curve: tuple[tuple[float | None, float], ...]
    """(joules so far, held-out loss) at each evaluation."""
    losses: tuple[tuple[int, float], ...]
    """(step, training loss), means over stretches of a long run."""
    sparsity: float | None
    beside: dict[str, float | None] = Field(default_factory=dict)
    """Joules of what it took beside the steps, by what for; None unknown."""
    beside_pedigree: PedigreeName | None = None
    grid: str
    gco2e: float | None
    """Of all joules, like ``cost``."""
    price: str | None
    currency: str | None
    cost: float | None
    scaling: Scaling | None
    settings: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def joules_per_token(self) -> float | None:
        """Of text that was trained on."""
        return None if self.joules is None or not self.tokens else self.joules / self.tokens

    @property
    def joules_in_all(self) -> float | None:
        """Of the steps and of all beside them."""
        return in_all(self.joules, self.beside)

    @property
    def pedigree_in_all(self) -> PedigreeName | None:
        """Of `joules_in_all`: the least sure of its parts."""
        return worst((self.pedigree, self.beside_pedigree))

    @property
    def joules_per_parameter(self) -> float | None:
        """Of the trained model."""
        return None if self.joules is None else self.joules / self.parameters


def in_all(joules: float | None, beside: Mapping[str, float | None]) -> float | None:
    """Of the steps and of all beside them; None where a part is unknown."""
    total = joules
    for some in beside.values():
        total = plus(total, some)
    return total


def write_training(result: TrainingResult, path: Path) -> None:
    """Whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(result.model_dump_json(indent=1).encode() + b"\n")


def read_training(path: Path) -> TrainingResult:
    """Raises `JoulesmithError` with one line where it is none."""
    try:
        return TrainingResult.model_validate_json(path.read_bytes())
    except OSError as e:
        raise JoulesmithError(f"cannot read {path}: {e.strerror or e}") from e
    except ValidationError as e:
        first: dict[str, Any] = dict(e.errors()[0])
        where = ".".join(str(p) for p in first["loc"]) or "the file"
        raise JoulesmithError(f"not a joulesmith training: {path}: {where}: {first['msg']}") from e
