"""`joulesmith train`, `distill` and `recover`: a model trained, judged, written, its joules told.

    models + text -> reference -> judged -> trained -> judged -> file or folder -> judged there

What the three differ in is who teaches, where the student is from, and what is usual.
"""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from joulesmith._version import __version__
from joulesmith.atomic import atomic_folder
from joulesmith.errors import JoulesmithError
from joulesmith.export import forms
from joulesmith.job import apply, lesson_text, student
from joulesmith.job.compress import shrink_parts, shrink_step
from joulesmith.job.quantize import in_llama
from joulesmith.job.training_task import Task, check, check_form, frozen_zeros, identity
from joulesmith.progress import Progress
from joulesmith.quality import Quality, judge, write_reference
from joulesmith.ranks import alone, rank, wait
from joulesmith.report.result import QualityFigures
from joulesmith.report.training_result import (
    TRAINING,
    TRAINING_PAGE,
    Scaling,
    TrainingResult,
    in_all,
    write_training,
)
from joulesmith.workspace import Workspace

if TYPE_CHECKING:
    from joulesmith.energy.meter import EnergyMeter
    from joulesmith.models import Model
    from joulesmith.train.beside import Beside
    from joulesmith.train.group import Ranks
    from joulesmith.train.lesson import Taught
    from joulesmith.train.rank_energy import NoMeter

__all__ = ["Task", "one_of_each", "places", "recovered", "run", "thinned"]

T = TypeVar("T")

STAGES = {"load": 5.0, "text": 20.0, "reference": 20.0, "train": 200.0, "judge": 20.0, "write": 3.0}
POINTS = 400
"""Most points of the training loss in a result."""


def run(task: Task, progress: Progress | None = None) -> TrainingResult | None:
    """Do it. Working files lie in ``out.work`` until it is complete, and an interrupted run goes on
    there. Under torchrun all ranks call this; all but the first are silent and return None.

    Raises `JoulesmithError` in one line for whatever the user can mend.
    """
    from joulesmith.train.group import ranks

    show = progress or Progress({})
    with ranks(task.device) as me:
        if not me.first:
            show = Progress({}, stream=io.StringIO())
        check(task, me.device)
        return _run(task, me, show)


def _run(task: Task, me: Ranks, show: Progress) -> TrainingResult | None:
    for name, cost in STAGES.items():
        show.expected.setdefault(name, cost)
    whole = task.out.resolve()
    beside = whole.with_name(whole.name + ".work")
    with ExitStack() as stack:
        workspace = Workspace(beside, identity(task))
        if me.first:
            stack.enter_context(workspace)
        wait()
        if not workspace.work.is_dir():
            raise JoulesmithError(
                f"rank {me.rank} does not see {beside}, which the first one made: give --out on a "
                "file system that all machines see"
            )
        result = _Run(task, me, workspace, whole, show).go()
    if me.first:
        shutil.rmtree(beside, ignore_errors=True)
    return result


class _Judge:
    """Quality on the last windows against whom the model learns from, or was before."""

    def __init__(self, windows: lesson_text.Windows, folder: Path, device: str) -> None:
        self.windows, self.folder, self.device = windows, folder, device
        self.reference: Any = None

    def refer(self, model: Model, show: Progress) -> None:
        """Take its predictions as the reference."""
        from joulesmith.engines.torch_engine import TorchSession

        with show.stage("reference") as tick, TorchSession(model.module, self.device) as session:
            path = self.folder / "final.npy"
            self.reference = write_reference(
                session, self.windows.final, path, self.windows.judged, tick
            )

    def __call__(self, model: Model, tick: Any) -> Quality:
        from joulesmith.engines.torch_engine import TorchSession

        with TorchSession(model.module, self.device) as session:
            scores = session.score(self.windows.final, self.reference.path, tick)
        return judge(scores, self.reference)


def in_turn(make: Callable[[], T]) -> T:
    """The first rank, which writes files, and then the others, who read them."""
    from joulesmith.train.group import meet

    if rank() == 0:
        with alone():
            found = make()
        meet()
        return found
    meet()
    with alone():
        return make()


@dataclass
class _Run:
    task: Task
    me: Ranks
    workspace: Workspace
    out: Path
    show: Progress
    notes: list[str] = field(default_factory=list)

    def go(self) -> TrainingResult | None:
        from joulesmith.energy.meter import EnergyMeter
        from joulesmith.train.beside import Beside
        from joulesmith.train.modes import fits
        from joulesmith.train.rank_energy import NoMeter

        # one meter a machine: some cannot be read twice
        with EnergyMeter() if not self.me.local_rank else nullcontext(NoMeter()) as meter, fits():
            return self._metered(meter, Beside(meter, self.workspace.work / "beside.json"))

    def _metered(self, meter: EnergyMeter | NoMeter, beside: Beside) -> TrainingResult | None:
        from joulesmith.train.group import meet
        from joulesmith.train.lesson import teach
        from joulesmith.train.parallel import check_split

        task, show, work, device = self.task, self.show, self.workspace.work, self.me.device
        with show.stage("load"):
            model, teacher = in_turn(self._models)
        check_form(task, model)
        for m in (model, teacher):
            most = task.length if m is None else int(m.module.config.max_position_embeddings)
            if task.length > most:
                raise JoulesmithError(
                    f"--length {task.length} is beyond the {most} tokens of the model's context: "
                    "give fewer"
                )
        self.notes += frozen_zeros(task, model)
        if task.shrink is None:
            check_split(model.module, task.lesson.parallel.tensor)
        learner = teacher if teacher is not None else model
        with beside.of("text"), show.stage("text") as tick:
            windows = in_turn(
                lambda: lesson_text.gather(
                    learner, device, task.text, task.evaluation, work,
                    length=task.length, most=task.most, samples=task.samples, seed=task.seed,
                    progress=tick,
                )
            )  # fmt: skip
        if task.shrink is not None:
            with beside.of("shrinking"):
                in_turn(lambda: self._shrink(model, windows))
        judge = _Judge(windows, work, str(device))
        before = None
        if self.me.first:
            with beside.of("judging", together=False):
                judge.refer(learner, show)
                if teacher is not None:
                    show.expected.setdefault("before", 20)
                    with show.stage("before") as tick:
                        found = self.workspace.once("before", lambda: judge(model, tick).to_dict())
                        before = Quality(**found)
        meet()
        for m in (model, teacher):
            if m is not None:
                m.module.to(device)
        taught = teach(
            model, windows.train, windows.held, task.lesson,
            teacher=teacher, limits=task.limits, known=windows.final, folder=work,
            meter=meter, points=work / "points.jsonl", show=show, beside=beside.of,
        )  # fmt: skip
        if not self.me.first:
            return None
        if teacher is not None:
            teacher.module.to("cpu")
        return self._written(model, teacher, windows, taught, judge, before, beside)

    def _written(
        self,
        model: Model,
        teacher: Model | None,
        windows: lesson_text.Windows,
        taught: Taught,
        judge: _Judge,
        before: Quality | None,
        beside: Beside,
    ) -> TrainingResult:
        """Judged as it will be stored, then stored, and in llama.cpp judged there too."""
        from joulesmith.train.recover import to_gguf

        task, show, work = self.task, self.show, self.workspace.work
        packed = to_gguf(model, taught.packed)
        model.module.to("cpu")
        apply.as_stored(model, packed, vectors=task.format != forms.GGUF)
        with beside.of("judging", together=False), show.stage("judge") as tick:
            after = judge(model, tick)
        model.module.to("cpu")
        staged = work / ("staged.gguf" if task.format == forms.GGUF else "staged")
        shutil.rmtree(staged, ignore_errors=True)  # of a run that was killed here
        with show.stage("write"):
            size = forms.write(task.format, model, packed, staged, None)
        found: dict[str, Any] = {}
        if task.format == forms.GGUF:
            with beside.of("judging", together=False):
                engine, quality = in_llama(staged, None, judge.reference, show)
            found = {"engine": engine, "engine_quality": _figures(quality)}
        result = self._result(model, teacher, windows, taught, before, after, size, beside)
        result = result.model_copy(update=found)
        self._publish(staged, result)
        return result

    def _models(self) -> tuple[Model, Model | None]:
        """Student and teacher."""
        from joulesmith import models

        task = self.task
        given = models.load(task.model)
        if task.kind == "train":
            if task.student is not None:
                raise JoulesmithError("--student is of  joulesmith distill")
            if task.shape or task.config or task.scratch:
                return self._fresh(given), None
            return given, None
        if task.kind == "recover":
            assert task.teacher is not None
            return given, models.load(task.teacher)
        if task.student is not None:
            return models.load(task.student), given
        if task.shrink is not None:
            return models.load(task.model), given
        return self._fresh(given), given

    def _fresh(self, base: Model) -> Model:
        task = self.task
        if task.config is not None:
            config = student.read_config(task.config)
        else:
            parts = {} if task.shape is None else student.shape_of(task.shape)
            config = student.shaped(base.module.config, parts)
        made = student.fresh(base, config, self.workspace.work / "fresh" / self.out.stem, task.seed)
        made.origin = f"fresh weights, seed {task.seed}, with the tokenizer of {base.name}"
        return made

    def _shrink(self, model: Model, windows: lesson_text.Windows) -> None:
        """Cut once: other ranks and a resumed run read what was written, to the bit."""
        from joulesmith import models
        from joulesmith.compress.prune.shrink import read_back

        task, work = self.task, self.workspace.work
        assert task.shrink is not None
        folder, told = work / "shrunk", "notes.json"
        if not folder.is_dir():
            step = shrink_step(shrink_parts(task.shrink), task.seed)
            self.show.expected.setdefault("shrink", 100)
            with self.show.stage("shrink") as tick:
                record = step.apply(model, windows.train[:64], tick, work / "shrink")
            with atomic_folder(folder, needed=4 * model.parameters + (1 << 24)) as part:
                models.write_weights(model.module, part)
                (part / told).write_text(json.dumps(record.notes))
        self.notes += json.loads((folder / told).read_text())
        read_back(model, folder)

    def _result(
        self,
        model: Model,
        teacher: Model | None,
        windows: lesson_text.Windows,
        taught: Taught,
        before: Quality | None,
        after: Quality,
        size: int,
        beside: Beside,
    ) -> TrainingResult:
        from joulesmith.energy.carbon import cost, emission
        from joulesmith.energy.carbon import price as find_price
        from joulesmith.energy.totals import plus
        from joulesmith.train.budget import next_percent

        task, t = self.task, taught.trained
        known = [(j, x) for j, x in t.curve if j is not None]
        try:
            price = find_price(task.grid)
        except JoulesmithError:
            price = None
        notes = [*self.notes, *one_of_each(t.notes), *beside.notes]
        others = dict(beside.joules)
        others["judging"] = plus(others.get("judging", 0.0), t.aside)
        whole = in_all(t.joules, others)
        if after.windows < 16:
            notes.append(f"judged on {after.windows} windows only: intervals are wide")
        return TrainingResult(
            joulesmith=__version__,
            created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            kind=task.kind,
            command=task.command,
            model=model.name,
            origin=model.origin,
            teacher=None if teacher is None else teacher.origin,
            out=str(task.out),
            format=task.format,
            bytes=size,
            parameters=model.parameters,
            teacher_parameters=None if teacher is None else teacher.parameters,
            device=_device_words(self.me),
            text=windows.text,
            windows=taught.windows,
            windows_of=taught.of,
            repeats=taught.repeats,
            length=task.length,
            before=_figures(before),
            after=_told(after),
            engine=None,
            engine_quality=None,
            recovered=None if before is None else recovered(before, after),
            steps=t.steps,
            stopped=t.stopped,
            tokens=t.tokens,
            joules=t.joules,
            low=t.low,
            high=t.high,
            pedigree=t.pedigree,  # type: ignore[arg-type]
            seconds=t.seconds,
            optimizer_bytes=t.optimizer_bytes,
            next_percent=next_percent(known),
            curve=t.curve,
            losses=thinned(t.losses),
            sparsity=taught.sparsity,
            grid=task.grid,
            beside=others,
            beside_pedigree=beside.pedigree,
            gco2e=None if whole is None else emission(whole, task.grid),
            price=None if price is None else f"{price.price_per_kwh:g} {price.currency}/kWh",
            currency=None if price is None else price.currency,
            cost=None if whole is None or price is None else cost(whole, price),
            scaling=_scaling(t.scaling),
            settings=task.lesson.model_copy(update={"train": taught.settings}).model_dump(
                mode="json"
            ),
            notes=tuple(dict.fromkeys(notes)),
        )

    def _publish(self, staged: Path, result: TrainingResult) -> None:
        """The model, and the result and its page beside or in it; the model is moved last."""
        from joulesmith.report.training_page import write_training_page

        json_path, page = places(self.out, self.task.format)
        if self.task.format != forms.GGUF:
            json_path, page = staged / json_path.name, staged / page.name
        write_training(result, json_path)
        write_training_page(result, page)
        staged.replace(self.out)


def places(out: Path, form: str) -> tuple[Path, Path]:
    """Where the result and its page are."""
    if form != forms.GGUF:
        return out / TRAINING, out / TRAINING_PAGE
    return out.with_suffix(f".{TRAINING}"), out.with_suffix(f".{TRAINING_PAGE}")


def recovered(before: Quality, after: Quality) -> float | None:
    """Share of the gap to the reference in nats a token; None where there was none."""
    gap = math.log(before.perplexity / before.reference_perplexity)
    if gap <= 0:
        return None
    return 1 - math.log(after.perplexity / after.reference_perplexity) / gap


def thinned(losses: Sequence[float], most: int = POINTS) -> tuple[tuple[int, float], ...]:
    """(step, mean loss of the stretch that ends there), at most so many."""
    width = max(1, math.ceil(len(losses) / most))
    return tuple(
        (min(i + width, len(losses)), sum(losses[i : i + width]) / len(losses[i : i + width]))
        for i in range(0, len(losses), width)
    )


def one_of_each(notes: Sequence[str]) -> list[str]:
    """Notes that differ in a percentage alone become one, with the largest."""
    found: dict[str, tuple[float, str]] = {}
    for note in notes:
        match = re.search(r"(\d+(?:\.\d+)?)%", note)
        share = float(match[1]) if match else 0.0
        key = re.sub(r"\d+(?:\.\d+)?%", "%", note)
        if key in found and match:
            largest = max(share, found[key][0])
            found[key] = largest, key.replace("%", f"up to {largest:g}%", 1)
        else:
            found.setdefault(key, (share, note))
    return [text for _, text in found.values()]


def _figures(q: Quality | None) -> QualityFigures | None:
    return None if q is None else _told(q)


def _told(q: Quality) -> QualityFigures:
    return QualityFigures(
        kept=q.kept, kept_low=q.kept_low, perplexity=q.perplexity,
        reference_perplexity=q.reference_perplexity, kl=q.kl, top1=q.top1, tokens=q.tokens,
        text=q.text,
    )  # fmt: skip


def _scaling(found: Any) -> Scaling | None:
    if found is None:
        return None
    return Scaling(
        ranks=found.ranks, plan=found.plan, speed_up=found.speed_up,
        joules_ratio=found.joules_ratio, communication=found.communication, note=found.note,
    )  # fmt: skip


def _device_words(me: Ranks) -> str:
    import torch

    each = "" if me.world == 1 else f"{me.world} ranks of "
    if me.device.type == "cuda":
        return f"{each}{torch.cuda.get_device_name(me.device)}"
    threads = torch.get_num_threads()
    return f"{each}CPU, {threads} thread{'s' * (threads != 1)}"
