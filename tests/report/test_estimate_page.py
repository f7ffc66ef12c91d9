"""Pages of estimates: complete, self-contained, escaped, drawn."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from joulesmith.energy.carbon import grid, price
from joulesmith.errors import MissingExtraError
from joulesmith.estimate.asked import answer_compare, answer_serve
from joulesmith.estimate.asked_training import answer_train
from joulesmith.estimate.devices import find
from joulesmith.estimate.model.plain import of_numbers
from joulesmith.estimate.serving.setup import Setup, Traffic
from joulesmith.report import estimate_charts, estimate_page

SHAPE = replace(of_numbers(8e9), name="eight <b>")
H100, B200 = find("H100"), find("B200")


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    served = answer_serve(
        SHAPE, Setup(H100, weights="bf16"), Traffic(1, 500, 300), latency_s=0.03,
        prefill=Setup(B200), requests_per_day=1e6, grid=grid("DE"), price=price("DE"),
        battery_wh=50, pue=1.2,
    )  # fmt: skip
    setups = [Setup(H100), Setup(B200), Setup(find("EPYC 9654"))]
    compared = answer_compare(SHAPE, setups, Traffic(1, 500, 300), requests_per_day=9,
                              grid=grid("DE"))  # fmt: skip
    trained = answer_train(SHAPE, 1e12, H100, 64)
    return {
        "serve": estimate_page.serve_page(served),
        "compare": estimate_page.compare_page(compared),
        "train": estimate_page.train_page(trained),
    }


@pytest.mark.parametrize(("name", "charts"), [("serve", 3), ("compare", 2), ("train", 3)])
def test_pages_stand_alone(pages: dict[str, str], name: str, charts: int) -> None:
    page = pages[name]
    assert page.count("<svg") == 2 * charts  # for wide and for narrow screens
    for part in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + part.split("</svg>")[0] + "</svg>")
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert (
        "<script" not in page
        and "None" not in page
        and "nan" not in re.sub(r"<[^>]+>", "", page).split()
    )
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert "eight &lt;b&gt;" in page and "eight <b>" not in page
    assert "modelled" in page and "assumed: layers" in page
    for basis in ("fitted", "published", "assumed"):
        assert f'<td class="l">{basis}</td>' in page


def test_what_they_tell(pages: dict[str, str]) -> None:
    serve = pages["serve"]
    for words in (
        "within 30 ms a step", "90 %: ", "memory full", "30 ms a step", "Where the joules go",
        "the building (PUE)", "Under the roof", "by the data sheet", "Prompts on B200",
        "H100 SXM 80GB alone", "kgCO2e a day", "A battery charge",
    ):  # fmt: skip
        assert words in serve, words
    compare = pages["compare"]
    assert "EPYC 9654: no:" in compare and "Of the first" in compare
    train = pages["train"]
    for words in ("Hours", "Utilisation", "What being faster costs", "speed-up over the fewest"):
        assert words in train, words


def test_one_batch_has_no_curve() -> None:
    setup, traffic = Setup(H100, weights="bf16"), Traffic(1, 50_000, 1000)
    one = answer_serve(of_numbers(3.1e10), setup, traffic)
    assert one.most == 1 and len(one.curve) == 1
    assert estimate_charts.batch_curve(one, 300, 200, "n") is None
    assert estimate_page.serve_page(one).count("<svg") == 4


def test_what_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = answer_serve(SHAPE, Setup(H100), Traffic(8), batch=8)
    for package in ("jinja2", "altair"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(MissingExtraError, match=rf"{package} is not installed: run  pip"):
                estimate_page.serve_page(found)
