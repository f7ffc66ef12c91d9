"""The arguments of one run of the main job, and what makes two runs the same."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from joulesmith._version import __version__
from joulesmith.errors import JoulesmithError
from joulesmith.export.mixtures import MARKS
from joulesmith.quality import check_floor
from joulesmith.workspace import file_identity, fingerprint


@dataclass(frozen=True)
class Settings:
    """The arguments of one run.

    keep: the floor, least ppl(reference) / ppl(plan) at 95 % confidence; or the name of a
    llama.cpp mixture ("Q4_K_M"): what a file of that mixture keeps. workload: tokens
    (prefill, decode) of the request that is made cheap. calib/eval: text files, or
    None for the model's own samples and the English text that Python ships.
    time_budget: seconds; shortens calibration, search and measuring. out: the run's
    folder; None makes one under ``joulesmith-out``.
    """

    model: str
    keep: float | str = 0.99
    engine: str = "llama.cpp"
    workload: tuple[int, int] = (64, 256)
    calib: str | None = None
    eval: str | None = None
    grid: str = "WORLD"
    time_budget: float | None = None
    out: Path | None = None
    seed: int = 0
    pairs: int = 7
    torch_pairs: int = 3
    engine_lib: str | None = None

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run."""
        plain = {
            "version": __version__,
            "model": self.model,
            "keep": self.keep,
            "engine": self.engine,
            "workload": list(self.workload),
            "calib": file_identity(self.calib),
            "eval": file_identity(self.eval),
            "grid": self.grid,
            "time_budget": self.time_budget,
            "seed": self.seed,
            "pairs": self.pairs,
            "torch_pairs": self.torch_pairs,
            "engine_lib": self.engine_lib,
        }
        if Path(self.model).expanduser().exists():
            plain["model_file"] = file_identity(self.model)
        return plain

    def folder(self) -> Path:
        """The run's folder: ``out``, or one named by the model and the arguments."""
        if self.out is not None:
            return self.out
        name = Path(self.model).name.replace("/", "-") or "model"
        return Path("joulesmith-out") / f"{name}-{fingerprint(self.identity())[:8]}"

    def command(self) -> str:
        """The command that repeats this run."""
        parts = ["joulesmith", "optimize", self.model, "--keep", _plain(self.keep)]
        for flag, value, usual in (
            ("--engine", self.engine, "llama.cpp"),
            ("--workload", f"{self.workload[0]}:{self.workload[1]}", "64:256"),
            ("--calib", self.calib, None),
            ("--eval", self.eval, None),
            ("--grid", self.grid, "WORLD"),
            ("--time-budget", f"{self.time_budget:g}s" if self.time_budget else None, None),
            ("--seed", str(self.seed), "0"),
            ("--pairs", str(self.pairs), "7"),
            ("--engine-lib", self.engine_lib, None),
        ):
            if value != usual and value is not None:
                parts += [flag, value]
        return " ".join(shlex.quote(p) for p in parts)


def check(s: Settings) -> None:
    """Refuse arguments that cannot work, before any work is done. Raises `JoulesmithError`."""
    if isinstance(s.keep, str):
        if s.keep not in MARKS:
            raise JoulesmithError(
                f"--keep is a share such as 0.99 or one of {', '.join(MARKS)}, got {s.keep!r}"
            )
    else:
        check_floor(s.keep)
    if min(s.workload) < 1 or sum(s.workload) > 1 << 20:
        raise JoulesmithError(
            f"--workload needs at least 1 token each, as prefill:decode, got "
            f"{s.workload[0]}:{s.workload[1]}"
        )
    if s.pairs < 3:
        raise JoulesmithError(f"--pairs must be at least 3 for an interval, got {s.pairs}")
    if s.time_budget is not None and s.time_budget < 60:
        raise JoulesmithError(f"--time-budget must be at least 60s, got {s.time_budget:g}s")
    from joulesmith.energy import grid

    grid(s.grid)
    check_texts(s.calib, s.eval)


def check_texts(calib: str | None, evaluation: str | None) -> None:
    """Raises `JoulesmithError` where a text file is missing."""
    for option, path in (("--calib", calib), ("--eval", evaluation)):
        if path is not None and not path.startswith("hf:") and not Path(path).is_file():
            raise JoulesmithError(f"no such text file: {option} {path}: give a file that is there")


def _plain(keep: float | str) -> str:
    return keep if isinstance(keep, str) else f"{keep:g}"
