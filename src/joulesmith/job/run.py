"""The main job: a model in, a cheaper model out, or "none". Orders the rooms' work.

model + text -> reference -> joule table -> candidates -> plan -> file -> judged and
measured on the engine -> report. Every stage's outcome is kept in the run's folder,
so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from joulesmith._version import __version__
from joulesmith.compress.quantize.step import Quantize
from joulesmith.compress.recipe import Recipe
from joulesmith.engines import get_engine
from joulesmith.engines.compare import rounds
from joulesmith.errors import FloorNotMetError, JoulesmithError
from joulesmith.export.mixtures import MARKS
from joulesmith.job import marks
from joulesmith.job.assemble import PLAN, TORCH, Found, assemble
from joulesmith.job.inputs import Inputs, digest_of, gather
from joulesmith.job.judge import FLOAT, Judge, score_file, write_choice
from joulesmith.job.machine import PeakMemory
from joulesmith.job.settings import Settings, check
from joulesmith.memory import release_memory, return_large_blocks
from joulesmith.plan import candidates as candidate_store
from joulesmith.plan.search import Space, Trial, bolder, correct, safer, search
from joulesmith.plan.space import (
    fast_types,
    make_space,
    price_rest,
    stream_weights,
    token_joules,
    totals,
    workload_joules,
    worthwhile,
)
from joulesmith.progress import Progress, Tick
from joulesmith.quality import Quality, Reference, first_windows, write_reference
from joulesmith.report.files import PAGE_NAME, RESULT_NAME, load_result, write_json
from joulesmith.report.result import Result
from joulesmith.workspace import Workspace, fingerprint

if TYPE_CHECKING:
    from joulesmith.engines.base import Bench, Engine, Session
    from joulesmith.models import Model
    from joulesmith.plan.candidates import Candidates
    from joulesmith.plan.damage import Correction
    from joulesmith.plan.table import JouleTable

ALWAYS = ("Q4_K_M", "Q8_0")
"""Mixtures that are measured whatever the floor: what everybody downloads."""

ATTEMPTS = 4
"""Plans that may be judged on the final windows."""

# Seconds each stage takes for the default model on two cores: only the proportions
# count, for the time left.
EXPECTED = {
    "load": 6,
    "text": 40,
    "reference": 42,
    "joule table": 28,
    "round": 140,
    "measure damage": 125,
    "search": 60,
    "judge": 120,
    "measure torch": 10,
    "measure joules": 120,
    "report": 5,
}


def optimize(
    model: str,
    *,
    keep: float | str = 0.99,
    progress: Progress | None = None,
    **settings: Any,
) -> Result:
    """Find, write and measure the cheapest model that keeps ``keep`` of the quality.

    settings: the other fields of `Settings`. Returns the `Result`, which is also in
    ``<out>/result.json``, with the model, ``recipe.yaml`` and ``report.html`` beside it.

    Raises `FloorNotMetError` when no plan clears the floor (the result is written all
    the same, and says how near the nearest came); `JoulesmithError` for bad input.
    """
    return run(Settings(model=model, keep=keep, **settings), progress or Progress({}))


def run(settings: Settings, progress: Progress) -> Result:
    """One run of the main job; see `optimize`."""
    check(settings)
    folder = settings.folder()
    with Workspace(folder, settings.identity()) as workspace:
        if (folder / RESULT_NAME).exists():
            return _told(load_result(folder))
        return _told(_Job(settings, workspace, progress).run())


def _told(result: Result) -> Result:
    if result.status == "none":
        raise FloorNotMetError(result.verdict)
    return result


class _Job:
    """One run, stage by stage."""

    def __init__(self, settings: Settings, workspace: Workspace, progress: Progress) -> None:
        self.s = settings
        self.ws = workspace
        self.progress = progress
        for name, cost in EXPECTED.items():
            progress.expected.setdefault(name, cost)
        if settings.engine == "torch":
            raise JoulesmithError("plans are GGUF files, which the torch engine does not run")
        self.engine: Engine = get_engine(settings.engine, library=settings.engine_lib)
        # A shorter budget buys less text and fewer trials, never a lower floor.
        usual = sum(EXPECTED.values())
        budget = settings.time_budget
        self.share = 1.0 if budget is None else min(1.0, max(0.2, budget / usual))
        self.keep = 1.0 if isinstance(settings.keep, str) else float(settings.keep)
        self.pairs = settings.pairs if self.share == 1.0 else max(3, round(7 * self.share))

    def run(self) -> Result:
        """All stages; returns the stored result."""
        return_large_blocks()
        with PeakMemory() as memory:
            result = self._run(memory)
        with self.progress.stage("report"):
            folder = self.ws.folder
            from joulesmith.report import write_page

            if self.done.passed:
                self._export()
            write_page(result, folder / PAGE_NAME)
            write_json(result, folder / RESULT_NAME)  # last: it marks the run as done
        self.ws.clean()
        return result

    def _export(self) -> None:
        """Move the judged file out of the working folder, with the recipe that makes it."""
        found, folder = self.done, self.ws.folder
        steps = (Quantize(types=dict(found.trial.types), seed=self.s.seed),)
        calibration = {
            "calib": self.s.calib,
            "text": found.inputs.calibration_text,
            "windows": list(found.inputs.calibration.shape),
            "seed": self.s.seed,
        } | digest_of(self.s.calib)
        Recipe(steps, self.s.model, calibration).save(folder / "recipe.yaml")
        found.file.replace(folder / found.export_name)

    def _run(self, memory: PeakMemory) -> Result:
        stage = self.progress.stage
        with stage("load"):
            from joulesmith.models import load

            model = load(self.s.model)
        given = marks.given_types(model)
        accident = self.s.model == "smollm2"
        with stage("text") as tick:
            inputs = gather(
                model, self.s.calib, self.s.eval, self.ws.work, self.s.seed, self.share, tick
            )
        release_memory()
        with stage("reference") as tick:
            seen, final = self._references(model, inputs, tick)
        release_memory()
        with stage("joule table") as tick:
            table, beside, types = self._price(model, given, accident, tick)
        with stage("round") as tick:
            store = candidate_store.make(
                model,
                inputs.calibration,
                types,
                self.ws.work / "packed",
                seed=self.s.seed,
                progress=tick,
            )
            if given and not accident:
                marks.keep_given(model, store)
        release_memory()
        space = make_space(
            model.matrices(split_head=True),
            store.damage,
            store.activation,
            table.price,
            self.s.workload,
            FLOAT,
        )
        judge = Judge(model, self.engine, store, seen, self.ws, "search")
        peer = marks.Peer(model, store, self.s.engine_lib)
        with stage("measure damage") as tick:
            # Rough answers do here: half of the windows, and a quarter.
            half, quarter = (first_windows(seen, max(4, len(inputs.search) // n)) for n in (2, 4))
            found_marks = marks.uniform_marks(
                peer, MARKS, self.engine, half, self.ws, self._near, lambda x: tick(x * 0.4)
            )
            fast = fast_types(space)
            rough = Judge(model, self.engine, store, quarter, self.ws, "correct")
            correction = correct(space, rough, fast, lambda x: tick(0.4 + 0.6 * x))
        with stage("search") as tick:
            if isinstance(self.s.keep, str):
                self.keep = self._final_kept(peer, found_marks, final)
            trials = search(
                space,
                correction,
                judge,
                self.keep,
                final_tokens=final.nll.size,
                rounds=max(3, round(6 * self.share)),
                progress=tick,
            )
        with stage("judge") as tick:
            trial, quality, path = self._judge(
                model, store, space, correction, trials, final, lambda x: tick(x * 0.5)
            )
            shown = self._shown(model, table, beside["rest"], found_marks)
            rivals = marks.write_rivals(
                peer,
                shown,
                given,
                self.engine,
                final,
                self.ws,
                given_is_baseline=bool(given) and not accident,
                progress=lambda x: tick(0.5 + 0.5 * x),
            )
        with stage("measure torch") as tick:
            import torch

            model.module.to(torch.bfloat16)  # float32 is not needed any more
            release_memory()
            found_torch = self._measure_torch(model, path, tick)
        model.module = None  # neither are the weights: what follows runs the files
        release_memory()
        with stage("measure joules") as tick:
            paths = {PLAN: path, **{r.name: r.path for r in rivals}}
            found = self._measure(paths, tick)
        self.done = Found(
            self.s,
            self.keep,
            model,
            self.engine,
            inputs,
            table,
            beside["rest"],
            beside["untouched"],
            space,
            correction,
            trials,
            trial,
            quality,
            path,
            found_marks,
            rivals,
            found,
            found_torch,
        )
        return assemble(self.done, self.progress.done, memory.peak)

    def _shown(
        self,
        model: Model,
        table: JouleTable,
        rest: Mapping[str, float],
        found: list[marks.Mark],
    ) -> list[marks.Mark]:
        """The mixtures to measure: the one that everybody downloads, the one that names the
        floor, and the cheapest two that may clear it on the final windows."""

        def joules(mark: marks.Mark) -> float:
            return totals(model.matrices(), mark.types, FLOAT, table.price, rest, self.s.workload)[
                "workload"
            ]

        near = sorted((m for m in found if self._near(m)), key=joules)
        chosen = {m.name for m in near[:2]} | {*ALWAYS, self.s.keep}
        return [m for m in found if m.name in chosen]

    def _near(self, mark: marks.Mark) -> bool:
        """Whether a mixture may clear the floor on the final windows, or is shown anyway."""
        loss = -math.log(mark.quality.kept)
        return mark.name in (*ALWAYS, self.s.keep) or loss <= 1.3 * -math.log(self.keep) + 0.002

    def _final_kept(self, peer: marks.Peer, found: list[marks.Mark], final: Reference) -> float:
        """What the mixture that names the floor keeps on the final windows.

        The floor is the same number for search and judgement: what a mixture keeps differs
        from split to split by more than plans differ.
        """
        mark = next(m for m in found if m.name == self.s.keep)
        return _as_floor(marks.judge_mark(peer, mark.types, self.engine, final, self.ws).kept)

    def _references(self, model: Model, inputs: Inputs, tick: Tick) -> tuple[Reference, Reference]:
        """The float model's probabilities on the search and the final windows."""
        from joulesmith.engines.torch_engine import TorchSession

        session = TorchSession(model.module)
        n, m = len(inputs.search), len(inputs.final)
        text = inputs.evaluation_text
        seen = write_reference(
            session,
            inputs.search,
            self.ws.work / "search.npy",
            text,
            lambda x: tick(x * n / (n + m)),
        )
        final = write_reference(
            session,
            inputs.final,
            self.ws.work / "final.npy",
            text,
            lambda x: tick((n + x * m) / (n + m)),
        )
        return seen, final

    def _price(
        self, model: Model, given: Mapping[str, str], accident: bool, tick: Tick
    ) -> tuple[JouleTable, dict[str, dict[str, float]], list[str]]:
        """The joule table, what a token costs beside it and untouched, the types worth trying."""
        from joulesmith.compress.quantize import kquants, legacy
        from joulesmith.compress.quantize.grids import grid
        from joulesmith.compress.quantize.rounding import coarseness
        from joulesmith.plan.table import JouleTable

        shapes = sorted({(r.shape[0], r.shape[1]) for r in model.matrices()})
        # Not the codebook and ternary types: at three bits and less they miss any floor worth
        # setting where the K-types' kernels, which look nothing up, are cheaper at four.
        known = types = [*legacy.GRIDS, "MXFP4", *kquants.GRIDS]
        source = marks.main_type(given, model) if accident else None
        if source is not None:
            # Weights that come from a grid fit it, and its like, by accident: these are
            # left out. Steps with an offset for each few weights are one like another.
            affine = grid(source).affine
            types = [t for t in known if t != source and not (affine and grid(t).affine)]
        table = JouleTable.measure(
            self.engine,
            shapes,
            [*known, FLOAT],  # reference points are priced too
            self.s.workload[0],
            lambda x: tick(0.8 * x),
            stream_weights=stream_weights(model.parameters),
        )

        def cost(rows: int, columns: int, kind: str) -> float | None:
            if not grid(kind).fits(columns):
                return None
            return workload_joules(*table.price(rows, columns, kind), self.s.workload)

        noise = {t: coarseness(grid(t)) for t in types}
        chosen = worthwhile(types, shapes, cost, noise)

        def runs_of(path: Path) -> list[Bench]:
            # The whole request: attention costs more the longer the context.
            prefill, decode = self.s.workload
            with self.engine.load(path, context=prefill + decode) as session:
                return [session.bench(prefill, decode, seed=i) for i in range(3)]

        def measure_rest() -> dict[str, dict[str, float]]:
            probe, kinds = marks.write_probe(model, self.ws, self.s.engine_lib)
            found = price_rest(model.matrices(), kinds, FLOAT, table.price, runs_of(probe))
            untouched = token_joules(runs_of(marks.write_float(model, self.ws)), self.s.workload)
            return {"rest": found, "untouched": untouched}

        stored = self.ws.once("beside", measure_rest)
        tick(1.0)
        return table, stored, chosen

    def _judge(
        self,
        model: Model,
        store: Candidates,
        space: Space,
        correction: Correction,
        trials: list[Trial],
        final: Reference,
        tick: Tick,
    ) -> tuple[Trial, Quality, Path]:
        """The cheapest plan whose bound clears the floor on the final windows, or the nearest miss.

        After a miss comes a safer plan. After a pass with much room to spare comes a bolder
        one, once. Judging many plans on the same windows would favour lucky ones, so there
        are at most `ATTEMPTS`.
        """
        path = self.ws.work / "plan.gguf"
        mark = {"version": __version__, "command": self.s.command()}
        misses: list[tuple[Trial, Quality]] = []
        passed: list[tuple[Trial, Quality]] = []
        trial = trials[0]
        for attempt in range(ATTEMPTS):
            key = f"final-plan-{fingerprint(trial.types)}"
            stored = self.ws.get(key)
            write_choice(model, store.packed, trial.types, path, mark)
            quality = Quality(**stored) if stored else score_file(self.engine, path, final)
            self.ws.put(key, quality.to_dict())
            tick((attempt + 1) / ATTEMPTS)
            if quality.passes(self.keep):
                passed.append((trial, quality))
                follow = None if misses or len(passed) > 1 else bolder
            else:
                misses.append((trial, quality))
                follow = None if passed else safer
            choice = follow and follow(space, correction, trial, quality, self.keep)
            if choice is None:
                break
            trial = Trial(choice.types, choice.joules, choice.damage, quality)
        last = trial
        if passed:
            trial, quality = min(passed, key=lambda p: p[0].joules)
        else:
            trial, quality = max(misses, key=lambda m: m[1].kept_low)
        if trial is not last:
            write_choice(model, store.packed, trial.types, path, mark)
        return trial, quality, path

    def _measure(self, paths: Mapping[str, Path], tick: Tick) -> list[dict[str, Any]]:
        """Interleaved rounds of the workload over all files."""
        prefill, decode = self.s.workload

        def runner(path: Path) -> Callable[[int], Bench]:
            # Loaded anew each time: one model is in memory, however many are compared.
            def run(i: int) -> Bench:
                with self.engine.load(path, context=prefill + decode) as session:
                    return session.bench(prefill, decode, seed=i)

            return run

        return rounds(
            {name: runner(path) for name, path in paths.items()},
            self.pairs,
            self.ws.get("rounds") or (),
            lambda found: self.ws.put("rounds", found),
            tick,
        )

    def _measure_torch(self, model: Model, path: Path, tick: Tick) -> list[dict[str, Any]]:
        """The plan against the same model in torch (bfloat16, eager), with a short answer."""
        from joulesmith.engines.torch_engine import TorchSession

        if self.s.torch_pairs < 1:
            return []
        prefill, decode = self.s.workload[0], min(64, self.s.workload[1])
        torch_session = TorchSession(model.module)
        with self.engine.load(path, context=prefill + decode) as session:
            return rounds(
                {
                    PLAN: _bench(session, prefill, decode),
                    TORCH: _bench(torch_session, prefill, decode),
                },
                self.s.torch_pairs,
                self.ws.get("rounds-torch") or (),
                lambda found: self.ws.put("rounds-torch", found),
                tick,
            )


def _bench(session: Session, prefill: int, decode: int) -> Callable[[int], Bench]:
    return lambda i: session.bench(prefill, decode, seed=i)


def _as_floor(kept: float) -> float:
    """What a file keeps as a floor for others: rounded up to four digits, at most 1."""
    return min(1.0, math.ceil(kept * 1e4) / 1e4)
