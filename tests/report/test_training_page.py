"""The page of a training, and its line in the terminal."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from joulesmith.errors import JoulesmithError
from joulesmith.report.result import QualityFigures
from joulesmith.report.training_page import next_words, render_training_page, verdict
from joulesmith.report.training_result import (
    Scaling,
    TrainingResult,
    read_training,
    write_training,
)
from joulesmith.report.training_tables import render_training
from joulesmith.train.lesson_settings import LessonSettings


def quality(ppl: float) -> QualityFigures:
    return QualityFigures(
        kept=20 / ppl, kept_low=19 / ppl, perplexity=ppl, reference_perplexity=20, kl=0.1,
        top1=0.7, tokens=1000, text="a text",
    )  # fmt: skip


def result(**given: Any) -> TrainingResult:
    usual: dict[str, Any] = {
        "joulesmith": "0", "created": "2026-11-27T01:02:03Z", "kind": "recover", "command": "x",
        "model": "small <b>", "origin": "a folder", "teacher": "the large", "out": "out",
        "format": "transformers", "bytes": 100, "parameters": 1000, "teacher_parameters": 2000,
        "device": "CPU", "text": "t", "windows": 10, "windows_of": 20, "repeats": 1, "length": 8,
        "before": quality(40), "after": quality(25), "engine": None, "engine_quality": None,
        "recovered": 0.68, "steps": 30, "stopped": "all steps done", "tokens": 1680,
        "joules": 84.0, "low": 50.0, "high": 190.0, "pedigree": "modelled", "seconds": 9.0,
        "optimizer_bytes": 8000, "next_percent": 12.5, "curve": ((0.1, 3.7), (84.0, 3.2)),
        "losses": ((1, 4.0), (30, 3.0)), "sparsity": 0.8, "grid": "DE", "gco2e": 0.01,
        "price": "0.2 EUR/kWh", "currency": "EUR", "cost": 1e-5, "scaling": None,
        "settings": LessonSettings().model_dump(mode="json"), "notes": ("a note",),
    }  # fmt: skip
    return TrainingResult(**{**usual, **given})


def told(r: TrainingResult) -> str:
    out = io.StringIO()
    render_training(r, Console(file=out, width=200))
    return out.getvalue()


def test_the_page_tells_it() -> None:
    page = render_training_page(result())
    assert "68 % of the gap to the teacher closed for 84.0 J" in page
    assert "small &lt;b&gt;" in page and "<b>" not in page.replace("<b aria", "")
    assert page.count("<svg") == 4 and "50.0 to 190 J" in page and "12.5 J" in page
    assert "None" not in page and "<script" not in page
    for part in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + part.split("</svg>")[0] + "</svg>")


def test_unknown_joules_are_no_zero() -> None:
    r = result(
        joules=None, low=None, high=None, pedigree=None, gco2e=None, cost=None, next_percent=None,
        curve=((None, 3.7), (None, 3.2)),
    )  # fmt: skip
    page = render_training_page(r)
    assert "joules unknown" in page and "There are not two points" in page
    assert page.count("<svg") == 2 and " 0 J" not in page
    assert r.joules_per_token is None and "unknown" in told(r)


def test_what_it_took_beside_the_steps() -> None:
    r = result(beside={"text": 6.0, "judging": 10.0}, beside_pedigree="assumed")
    assert r.joules_in_all == 100.0
    page = render_training_page(r)
    assert "100 J" in page and "text 6.00 J, judging 10.0 J" in page and "assumed" in page
    assert "in all" in told(r) and "10 J judging" in told(r)
    assert result(beside={"text": None}).joules_in_all is None
    assert "In all" not in render_training_page(result())


def test_ranks_and_engines() -> None:
    s = Scaling(ranks=2, plan="DDP", speed_up=1.5, joules_ratio=None, communication=0.25)
    r = result(scaling=s, engine="llama.cpp 1", engine_quality=quality(26))
    page = render_training_page(r)
    assert "1.50×" in page and "joules ratio unknown" in page and "25.0 % of a step" in page
    line = told(r)
    assert "speed-up T1/Tn" in line and "llama.cpp 1" in line


def test_what_the_next_percent_costs() -> None:
    assert "no longer falls" in next_words(result(next_percent=math.inf))
    assert next_words(result(next_percent=None)) == "unknown"
    assert verdict(result(recovered=1.2)).startswith("Better than the teacher on this text")
    assert verdict(result(recovered=-0.1)).startswith("Further from the teacher than before")
    alone = result(teacher=None, before=None, recovered=None)
    assert verdict(alone) == "Perplexity 20 became 25 for 84.0 J"
    assert "before" in render_training_page(alone)


def test_it_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "training.json"
    write_training(result(next_percent=math.inf), path)
    assert read_training(path) == result(next_percent=math.inf)
    path.write_text('{"steps": 1}')
    with pytest.raises(JoulesmithError, match="not a joulesmith training"):
        read_training(path)
    with pytest.raises(JoulesmithError, match="cannot read"):
        read_training(tmp_path / "absent")
