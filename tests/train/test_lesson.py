"""A lesson's parts: limits turned into steps, windows chosen, settings that do not go together."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from joulesmith.compress.step import find
from joulesmith.energy.reading import Reading
from joulesmith.errors import JoulesmithError
from joulesmith.progress import Progress
from joulesmith.train import lesson
from joulesmith.train.data_settings import DataSettings
from joulesmith.train.distil import Distil
from joulesmith.train.lesson import Limits, affordable, chosen, counted, trial
from joulesmith.train.lesson_settings import LessonSettings
from joulesmith.train.recover_settings import DistilSettings
from joulesmith.train.settings import TrainSettings
from small_modules import language

WINDOWS = np.random.default_rng(0).integers(0, 50, (40, 16)).astype(np.int32)
HARD = DistilSettings(hard=1, soft=0)


class Meter:
    """Each window takes 6 J; or nobody knows."""

    def __init__(self, joules: float | None = 6.0) -> None:
        self.joules = joules

    def window(self, name: str) -> Any:
        joules = self.joules

        class Window:
            reading = Reading(joules, 1.0)

            def __enter__(self) -> Window:
                return self

            def __exit__(self, *exc: object) -> None: ...

        return Window()


def settings(**given: Any) -> LessonSettings:
    train = TrainSettings(steps=5, batch=4, micro=4)
    return LessonSettings(train=train, distil=HARD, **given)


def counted_by(limits: Limits, folder: Path | None = None, meter: Any = None) -> TrainSettings:
    module = language("llama")
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    found = counted(
        settings(), limits, module, WINDOWS, Distil(HARD), lesson._Kept(folder), meter or Meter(),
        None,
    )  # fmt: skip
    assert all(bool((before[n] == p).all()) for n, p in module.named_parameters()), "moved"
    assert all(p.grad is None for p in module.parameters())
    return found


def test_steps_of_limits(tmp_path: Path) -> None:
    assert counted_by(Limits()).steps == 5
    assert counted_by(Limits(epochs=2.5)).steps == 25
    # 6 J for three steps
    found = counted_by(Limits(joules=50), tmp_path)
    assert (found.steps, found.budget_joules) == (25, 50)
    # the number is kept: another trial would give another
    assert counted_by(Limits(joules=50), tmp_path, Meter(60)).steps == 25
    timed = counted_by(Limits(seconds=100))
    assert timed.budget_seconds == 100 and timed.steps > 1
    with pytest.raises(JoulesmithError, match="unknown on this machine"):
        counted_by(Limits(joules=50), meter=Meter(None))
    with pytest.raises(JoulesmithError, match="before the first step"):
        counted_by(Limits(joules=1))


def test_the_tighter_limit_counts() -> None:
    assert affordable(Limits(seconds=10, joules=100), 1.0, 50.0) == 2
    assert affordable(Limits(seconds=10, joules=100), 4.0, 5.0) == 2
    assert affordable(Limits(seconds=10), 4.0, None) == 2


@pytest.mark.parametrize("mode", ["full", "lora", "norms", "quantized"])
def test_a_trial_moves_nothing(mode: str) -> None:
    module = language("llama")
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    how: Any = {"mode": mode, "types": "INT4-G8"}
    seconds, joules = trial(settings(how=how), module, WINDOWS, Distil(HARD), Meter(), None)
    assert seconds > 0 and joules == 2.0
    after = dict(module.named_parameters())
    assert after.keys() == before.keys()
    assert all(bool((before[n] == p).all()) for n, p in after.items())


def test_a_trial_without_a_meter_has_its_own() -> None:
    seconds, _ = trial(settings(), language("llama"), WINDOWS, Distil(HARD), None, None)
    assert seconds > 0


def choose(s: DataSettings, judged: Any = None, teacher: Any = None) -> tuple[list[int], int]:
    judged = WINDOWS[:0] if judged is None else judged
    at, repeats = chosen(
        WINDOWS, judged, s, language("llama"), teacher, lesson._Kept(None),
        Progress({}, stream=open("/dev/null", "w")),  # noqa: SIM115
    )  # fmt: skip
    return at.tolist(), repeats


def test_windows_are_chosen() -> None:
    assert choose(DataSettings()) == (list(range(40)), 0)
    at, repeats = choose(DataSettings(repeats=0.5), WINDOWS[3:5])
    assert repeats == 2 and 3 not in at and 4 not in at and len(at) == 38
    losses = lesson.scores(language("llama"), WINDOWS)
    at, _ = choose(DataSettings(share=0.25, keep="high"))
    assert sorted(at) == sorted(np.argsort(losses, kind="stable")[-10:].tolist())

    class Teacher:
        module = language("llama", seed=1)

    best = lesson.scores(Teacher.module, WINDOWS)
    at, _ = choose(DataSettings(share=0.25, by="learnable", keep="high"), None, Teacher())
    assert sorted(at) == sorted(np.argsort(losses - best, kind="stable")[-10:].tolist())
    with pytest.raises(JoulesmithError, match="told by a teacher"):
        choose(DataSettings(share=0.25, by="learnable"))
    with pytest.raises(JoulesmithError, match="all 40 windows repeat"):
        choose(DataSettings(repeats=0.0), WINDOWS)


def test_settings_that_do_not_go_together() -> None:
    sparse: Any = {"method": "static", "sparsity": 0.5}
    for bad, told in (
        ({"sparse": sparse, "how": {"mode": "lora"}}, "every weight"),
        ({"cache": 8, "distil": {"hard": 1, "soft": 0}}, "give soft a weight"),
        ({"cache": 8, "train": {"steps": 1, "start_length": 4}}, "whole windows"),
        ({"data": {"by": "loss"}}, "give a share"),
        ({"compiled": True, "distil": {"on_policy": 0.5}}, "one length"),
        ({"train": {"steps": 9, "joules_per_percent": 1}}, "give points or every"),
    ):
        with pytest.raises(ValidationError, match=told):
            LessonSettings(**bad)
    with pytest.raises(ValidationError, match="distill or recover"):
        find("train")(lesson={"distil": {"soft": 1}}, epochs=1)
    with pytest.raises(ValidationError, match="teacher"):
        find("distill")()
    with pytest.raises(ValidationError, match="give epochs, or"):
        find("train")(lesson={"distil": {"hard": 2}})


def test_what_several_ranks_cannot_do() -> None:
    split, shards = {"tensor": 2}, {"data": "shard"}
    train = {"steps": 1, "batch": 8}
    for bad, told in (
        ({"parallel": {"tensor": 3}}, "4 ranks cannot be split by tensor 3"),
        ({"train": {"steps": 1, "batch": 6}}, "a batch of 6 windows on 4 ranks"),
        ({"parallel": shards, "sparse": {"method": "static", "sparsity": 0.5}}, "sparse training"),
        ({"parallel": split, "train": {**train, "optimizer": "adafactor"}}, "adafactor"),
        ({"parallel": shards, "compiled": True}, 'blocks does not go with data "shard"'),
        ({"parallel": split, "distil": {"attention": 1}}, "attention does not go with tensor 2"),
        ({"parallel": split, "how": {"mode": "lora"}}, "mode lora does not go with tensor 2"),
        ({"parallel": {**split, **shards}, "train": {**train, "optimizer": "muon"}}, "and shards"),
    ):
        made = LessonSettings.model_validate({"train": train, **bad})
        with pytest.raises(JoulesmithError, match=told):
            made.check_ranks(4)
        if "parallel" not in bad or bad["parallel"] == shards:
            made.check_ranks(1)
    for good in (
        {"parallel": split},
        {"parallel": shards, "distil": {"attention": 1}},
        {"parallel": {"tensor": 4, "data": "shard"}, "train": {**train, "optimizer": "muon"}},
        {"sparse": {"method": "static", "sparsity": 0.5}},
    ):
        LessonSettings.model_validate({"train": train, **good}).check_ranks(4)


def test_a_step_of_the_text_says_how_it_trains() -> None:
    """And needs not say that no teacher does."""
    made: Any = find("train")(lesson={"train": {"steps": 7}})
    assert made.lesson.train.steps == 7 and made.lesson.distil == HARD
    made = find("train")(lesson={"distil": {"hard": 2}}, epochs=1)
    assert (made.lesson.distil.hard, made.lesson.distil.soft) == (2, 0)
    made = find("train")(lesson={"train": {"rate": 1e-3}}, epochs=1)
    assert made.lesson.train.rate == 1e-3


def test_attention_is_matched_within_a_time(tmp_path: Path) -> None:
    student, teacher = (SimpleNamespace(module=language("llama", seed=i), tokenizer=None)
                        for i in (0, 1))  # fmt: skip
    for more in ({}, {"sparse": {"method": "static", "sparsity": 0.5}}):
        s = LessonSettings(
            train=TrainSettings(steps=1, batch=4, micro=4),
            distil=DistilSettings(hard=0, soft=0, attention=1), **more,
        )  # fmt: skip
        monkey = pytest.MonkeyPatch()
        with monkey.context() as m:
            m.setattr(lesson, "check_tokenizers", lambda *_: None)
            student.tokenizer = SimpleNamespace(eos=None)
            found = lesson.teach(
                student, WINDOWS, WINDOWS[:4], s, teacher=teacher,  # type: ignore[arg-type]
                limits=Limits(joules=30.0), meter=Meter(), folder=tmp_path / str(len(more)),
                show=Progress({}, stream=io.StringIO()),
            )  # fmt: skip
        assert found.trained.steps > 0
        assert student.module.config._attn_implementation == "sdpa"


def test_a_batch_that_ranks_cannot_share_is_told_before_a_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def timed(*_: Any) -> Any:
        raise AssertionError("steps were timed")

    monkeypatch.setattr(lesson, "world", lambda: 3)
    monkeypatch.setattr(lesson, "counted", timed)
    student: Any = SimpleNamespace(module=language("llama"), tokenizer=SimpleNamespace(eos=None))
    with pytest.raises(JoulesmithError, match="a batch of 4 windows on 3 ranks"):
        lesson.teach(student, WINDOWS, WINDOWS[:4], settings(), limits=Limits(seconds=9.0))


def test_native_precision() -> None:
    assert lesson.native_precision() in ("float32", "bfloat16")
    assert lesson.native_precision("cpu") in ("float32", "bfloat16")
    torch.zeros(2, dtype=getattr(torch, lesson.native_precision()))
