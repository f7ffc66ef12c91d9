"""Single runs: which there are, run in a process of their own, judged, kept as JSON lines."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.quantizers import settings
from benchmarks.quantizers.subjects import Places, Subject, calibration, prepare


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    package: has ``peers`` and ``settings``. action: the timed function of a peer. lines: file
    name of the runs. alone: peers that need no interpreter of their own. count: facts of a peer's
    weights, from them, the original ones and the setting's name; raises `ValueError` where they
    are not what was asked for.
    """

    package: str = "benchmarks.quantizers"
    action: str = "quantize"
    lines: str = "runs.jsonl"
    alone: tuple[str, ...] = ("ours", "nearest")
    count: Callable[[dict[str, Any], dict[str, Any], str], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Planned:
    """A peer in one variant. seeded: whether calibration or chance has any effect."""

    peer: str
    variant: str
    bits: tuple[int, ...] = (2, 3, 4, 8)
    symmetric: tuple[bool, ...] = (True, False)
    seeded: bool = True
    subjects: tuple[str, ...] = ("stories260K", "shakespeare", "smollm2")

    @property
    def label(self) -> str:
        """ "llm_compressor:gptq"."""
        return f"{self.peer}:{self.variant}"

    def takes(self, name: str) -> bool:
        """Whether it can do the setting of that name."""
        s = settings.by_name(name)
        return s.bits in self.bits and s.symmetric in self.symmetric


PLAN = (
    Planned("nearest", "absmax", seeded=False),
    Planned("ours", "fast"),
    Planned("ours", "default"),
    Planned("ours", "thorough"),
    Planned("llm_compressor", "gptq"),
    Planned("llm_compressor", "gptq-damp0.1"),
    Planned("llm_compressor", "awq+gptq"),
    Planned("torch_ao", "hqq", seeded=False),
    Planned("nncf_weights", "awq+scale", bits=(4,)),
    Planned("nncf_weights", "int8", bits=(8,), seeded=False),
    Planned("model_optimizer", "awq_full", symmetric=(True,)),
    Planned("model_optimizer", "gptq", symmetric=(True,)),
    Planned("autoround", "200", subjects=("stories260K", "shakespeare")),
    Planned("autoround", "200-amp"),
    Planned("autoround", "best", subjects=("stories260K", "shakespeare")),
)


SHOWN = {"bits_per_weight": "bits", "sparsity": "zeros"}


@dataclass(frozen=True)
class Run:
    """One line to be."""

    subject: str
    peer: str
    variant: str
    setting: str
    seed: int
    windows: int

    @property
    def label(self) -> str:
        """For the eye."""
        return (
            f"{self.subject} {self.setting} {self.peer}:{self.variant} seed {self.seed} "
            f"({self.windows} windows)"
        )


def order(
    subject: str, plan: Sequence[Any], names: Sequence[str], seeds: Sequence[int], windows: int
) -> Iterator[list[Run]]:
    """All runs of a subject, a list for each peer and seed: seed by seed, so that a series
    that was broken off is a whole table."""
    for seed in seeds:
        for p in plan:
            if subject not in p.subjects or (not p.seeded and seed != seeds[0]):
                continue
            yield [Run(subject, p.peer, p.variant, n, seed, windows) for n in names if p.takes(n)]


class Runner:
    """Does runs that the comparison's file lacks. pythons: peer -> interpreter."""

    def __init__(
        self,
        work: Path,
        places: Places,
        pythons: dict[str, str],
        threads: int,
        timeout: float,
        note: str,
        retry: bool = False,
        comparison: Comparison | None = None,
    ) -> None:
        self.work, self.places, self.pythons = work, places, pythons
        self.threads, self.timeout, self.note = threads, timeout, note
        self.retry = retry
        self.comparison = comparison or Comparison()
        self.lines = work / self.comparison.lines
        self._subjects: dict[str, Subject] = {}
        self._judges: dict[str, Any] = {}

    def subject(self, name: str) -> Subject:
        """Prepared once."""
        if name not in self._subjects:
            self._subjects[name] = prepare(name, self.places, self.work)
        return self._subjects[name]

    def do(self, runs: list[Run], layers: int | None = None, *, fresh: bool = False) -> None:
        """Run and judge what is not done; a failure is a line too, so that it is told.

        The runs share a process, which spares small models most of the time; fresh: each has
        a process of its own, so that its time and memory can be told.
        """
        if fresh and len(runs) > 1:
            for run in runs:
                self.do([run], layers, fresh=True)
            return
        how = {"layers": layers, "threads": self.threads, "fresh": fresh}
        keys = [asdict(r) | how for r in runs]
        lines = [x for x in read_lines(self.lines) if "error" not in x or not self.retry]
        keys = [k for k in keys if not any(k.items() <= line.items() for line in lines)]
        if not keys or (keys[0]["peer"] not in (*self.comparison.alone, *self.pythons)):
            return
        subject = self.subject(keys[0]["subject"])
        folder = subject.folder if layers is None else self._short(subject, layers)
        place = self.work / f"run-{os.getpid()}"
        shutil.rmtree(place, ignore_errors=True)
        what = {"package": self.comparison.package, "action": self.comparison.action}
        tasks = []
        for i, key in enumerate(keys):
            seed, count = key["seed"], key["windows"]
            tokens = calibration(subject, self.places, seed, count, self.work)
            own = (place / str(i)).resolve()
            own.mkdir(parents=True)
            np.save(own / "tokens.npy", tokens)
            here = {"folder": str(folder.resolve()), "place": str(own)}
            tasks.append(key | what | here | {"tokens": str(own / "tokens.npy")})
        (place / "tasks.json").write_text(json.dumps(tasks))
        why = self._call(keys[0]["peer"], place)
        for i, key in enumerate(keys):
            line = key | {"when": time.strftime("%Y-%m-%d %H:%M"), "note": self.note}
            result = place / str(i) / "result.json"
            line |= json.loads(result.read_text()) if result.exists() else {"error": why}
            if "error" not in line and layers is None:
                weights = place / str(i) / "weights.safetensors"
                line |= self._judge(subject, weights, key["setting"])
            with self.lines.open("a") as f:
                f.write(json.dumps(line) + "\n")
            told = line.get("error") or (
                f"KL {line.get('kl', float('nan')):.4f}, "
                + "".join(f"{line[k]:.3f} {word}, " for k, word in SHOWN.items() if k in line)
                + f"{line['seconds']:.0f} s, check {line['forward_check']}"
            )
            print(f"{Run(**{f.name: key[f.name] for f in fields(Run)}).label}: {told}", flush=True)
        shutil.rmtree(place, ignore_errors=True)

    def _call(self, peer: str, place: Path) -> str:
        """Run the worker; what to say of tasks that it left undone."""
        python = self.pythons.get(peer, sys.executable)
        command = [python, "-m", "benchmarks.quantizers.worker", str(place / "tasks.json")]
        path = self.work / f"{peer}-{os.getpid()}.log"
        with path.open("w") as log:
            try:
                code = subprocess.run(
                    command, stdout=log, stderr=log, check=False, timeout=self.timeout
                ).returncode
            except subprocess.TimeoutExpired:
                return f"not done after {self.timeout:.0f} s"
        last = [t for t in path.read_text().splitlines() if t.strip()]
        return f"exit {code}: {(last or ['no output'])[-1][:200]}"

    def _judge(self, subject: Subject, weights: Path, setting: str) -> dict[str, Any]:
        from benchmarks.quantizers.peers.common import linears, load_llama
        from safetensors.torch import load_file

        from joulesmith.engines.torch_engine import TorchSession
        from joulesmith.errors import JoulesmithError
        from joulesmith.quality import judge, write_reference

        if subject.name not in self._judges:
            model = load_llama(subject.folder)
            path = self.work / "models" / f"{subject.name}-reference.npy"
            reference = write_reference(
                TorchSession(model), subject.evaluation, path, subject.evaluated_on
            )
            original = {k: v.clone() for k, v in model.state_dict().items()}
            self._judges = {subject.name: (model, original, reference)}
        model, original, reference = self._judges[subject.name]
        state = load_file(weights)
        missing = set(linears(model)) - {k.removesuffix(".weight") for k in state}
        if missing:
            return {"error": f"weights lack {sorted(missing)[0]}"}
        facts: dict[str, Any] = {}
        if self.comparison.count is not None:
            try:
                facts = self.comparison.count(state, original, setting)
            except ValueError as e:
                return {"error": str(e)}
        model.load_state_dict(original | state)
        try:
            q = judge(TorchSession(model).score(reference.windows, reference.path), reference)
        except (OverflowError, JoulesmithError) as e:
            return facts | {"error": f"no finite perplexity: {e}"}
        return facts | {
            "kl": q.kl,
            "perplexity": q.perplexity,
            "reference_perplexity": q.reference_perplexity,
            "kept": q.kept,
            "top1": q.top1,
            "origin": subject.origin,
            "evaluated_on": subject.evaluated_on,
            "calibrated_on": subject.calibrated_on,
        }

    def _short(self, subject: Subject, layers: int) -> Path:
        """The first ``layers`` layers only: for how cost grows, not for quality."""
        from benchmarks.quantizers.peers.common import load_llama

        folder = self.work / "models" / f"{subject.name}-{layers}"
        if not (folder / "config.json").exists():
            model = load_llama(subject.folder)
            model.model.layers = model.model.layers[:layers]
            model.config.num_hidden_layers = layers
            if getattr(model.config, "layer_types", None):
                model.config.layer_types = model.config.layer_types[:layers]
            for file in subject.folder.glob("tokenizer*"):
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, folder / file.name)
            model.save_pretrained(folder)
        return folder


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines; a half-written last one is left out."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text().splitlines():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, least, most."""
    return float(np.median(values)), min(values), max(values)
