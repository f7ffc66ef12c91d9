"""The page: escaped, self-contained, complete, honest about what is unknown."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import sample

from joulesmith.errors import JoulesmithError
from joulesmith.report import figures, view
from joulesmith.report.result import Energy, FrontPoint, Result, TensorChoice

VOID = {"meta", "br", "link", "img", "hr", "input", "circle", "path", "rect", "line"}


class Reader(HTMLParser):
    """Visible text, tags with attributes, and whether tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split()).replace(" ,", ",")


def squeeze(text: str) -> str:
    return " ".join(figures.clean(text).split()).replace(" ,", ",")


@pytest.mark.parametrize("which", ["passed_page", "none_page"])
def test_nests_and_names(which: str, request: pytest.FixtureRequest) -> None:
    page: str = request.getfixturevalue(which)
    read = Reader(page)
    assert read.wrong == []
    assert read.open == []
    ids = [a["id"] for _, a in read.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {str(a["href"])[1:] for t, a in read.tags if t == "a"}
    assert targets <= set(ids)
    used = set(re.findall(r"url\(#([^)]+)\)", page))
    assert used <= set(ids)
    assert [t for t, _ in read.tags].count("h1") == 1
    for tag, attrs in read.tags:
        if tag == "svg":
            assert attrs.get("aria-label") or attrs.get("aria-hidden") == "true"
    assert sum(t == "caption" for t, _ in read.tags) == sum(t == "table" for t, _ in read.tags)


@pytest.mark.parametrize("which", ["passed_page", "none_page"])
def test_fetches_nothing(which: str, request: pytest.FixtureRequest) -> None:
    page: str = request.getfixturevalue(which)
    bare = page.replace("http://www.w3.org/2000/svg", "").replace(
        "http://www.w3.org/1999/xlink", ""
    )
    assert not re.search(r"https?://|//\w+\.\w+/|@import|@font-face", bare)
    read = Reader(page)
    for tag, attrs in read.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "img", "form", "base"}
        assert not [a for a in attrs if a.startswith("on")]
        assert "src" not in attrs
        for name in ("href", "xlink:href"):
            assert str(attrs.get(name, "#")).startswith("#")
    assert not re.search(r"url\((?!#)", page)
    assert "default-src 'none'" in page
    assert len(page.encode()) < 1_500_000


def test_hostile_names_are_text(none: Result, none_page: str) -> None:
    assert "<script" not in none_page.lower()
    assert "\x1b" not in none_page
    text = Reader(none_page).text
    for hostile in (none.model, none.verdict, none.origin, none.command, none.runs[0].note):
        assert squeeze(hostile) in text
    assert squeeze(none.tensors[0].tensor) in text


def test_everything_of_the_result_appears(passed: Result, passed_page: str) -> None:
    text = Reader(passed_page).text
    assert passed.verdict in text
    for run in passed.runs:
        assert run.name in text and run.note in text
        assert figures.joules(run.decode.joules) in text
        assert figures.interval(run.workload.low, run.workload.high) in text
        assert figures.size(run.file_bytes) in text
        if run.quality:
            assert f"{run.quality.kept:.4f}" in text and f"≥ {run.quality.kept_low:.4f}" in text
    for ratio in passed.ratios:
        row = f"{view.times(ratio.ratio)}× {view.times(ratio.low)} to {view.times(ratio.high)}"
        assert row in text
    for tensor in passed.tensors:
        assert tensor.tensor in text
    for cell in passed.table:
        assert f"{cell.rows:,} × {cell.columns:,}" in text
        assert figures.seconds(cell.decode_seconds) in text
    for point in passed.front:
        assert point.name in text
    for emission in passed.emissions:
        assert emission.grid in text and figures.small(emission.gco2e) in text
    for caveat in passed.caveats:
        assert caveat in text
    for name, seed in passed.seeds.items():
        assert f"{name} {seed}" in text
    assert passed.command in text
    assert passed.calibration in text and passed.evaluation in text
    assert passed.machine.cpu in text and passed.machine.power_source in text


def test_headline(passed: Result, passed_page: str) -> None:
    text = Reader(passed_page).text
    assert "1.24× fewer joules per token than smollm2-135m-q8_0.gguf, the file given" in text
    assert "95 % interval 1.22 to 1.27, 12 interleaved pairs" in text


def test_unknown_is_never_zero(none_page: str) -> None:
    text = Reader(none_page).text
    assert "No plan clears the floor of 0.99" in text
    assert "Ratio unknown" in text
    assert "unknown per token" not in text
    assert not re.search(r"(?<![\d.])0(\.0+)? [mµn]?J\b", text)
    assert "None" not in text and "nan" not in text.split()


@pytest.mark.parametrize(
    ("low", "mid", "high", "number", "words"),
    [
        (1.2, 1.25, 1.3, "1.25×", "fewer joules per token than"),
        (0.76, 0.8, 0.84, "1.25×", "more joules per token than"),
        (0.99, 1.005, 1.02, "1.005×", "no difference in joules per token shown against"),
    ],
)
def test_headline_says_no_more_than_its_interval(
    passed: Result, low: float, mid: float, high: float, number: str, words: str
) -> None:
    ratios = tuple(
        r.model_copy(update={"ratio": mid, "low": low, "high": high}) for r in passed.ratios
    )
    head = view.headline(passed.model_copy(update={"ratios": ratios}))
    assert (head.number, head.claim) == (number, words)
    ends = [float(x) for x in re.findall(r"\d\.\d+", head.interval)]
    assert ends == sorted(ends)


def test_survives_empty_and_not_finite(passed: Result) -> None:
    pytest.importorskip("vl_convert")
    from joulesmith.report.page import render_page

    nan = float("nan")
    blank = Energy(joules=nan, low=nan, high=nan, marginal=nan, pedigree="modelled", seconds=nan)
    update = {
        "runs": tuple(
            r.model_copy(update={"decode": blank, "prefill": blank, "workload": blank})
            for r in passed.runs[:2]
        ),
        "ratios": tuple(r.model_copy(update={"ratio": nan, "low": nan}) for r in passed.ratios[:2]),
        "front": (
            FrontPoint(
                name="x", kind="plan", joules_per_token=nan, kept=nan, kept_low=nan, measured=True
            ),
        ),
        "tensors": (),
        "table": (),
        "emissions": (),
        "predictions": (),
        "caveats": (),
        "timings": {"solve": nan},
        "headline_baseline": "a run that is not there",
    }
    text = Reader(render_page(passed.model_copy(update=update))).text
    assert "unknown" in text and "nan" not in text.replace("nan J", "nan").split()


def test_deep_model_stays_small(passed: Result) -> None:
    pytest.importorskip("vl_convert")
    from joulesmith.report.page import render_page

    tensors = tuple(
        TensorChoice(tensor=f"blk.{layer}.{role}.weight", layer=layer, role=role, type=kind, rows=8192, columns=8192, bits_per_weight=4.5, damage=1e-4 * (layer + 1), joules=0.01)
        for layer in range(80)
        for role, kind in zip(sample.SHAPES, ["Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_XS", "Q3_K", "Q2_K"], strict=True)
    )  # fmt: skip
    page = render_page(passed.model_copy(update={"tensors": tensors}))
    assert len(page.encode()) < 1_500_000
    assert html.escape("blk.79.ffn_down.weight") in page


def test_written_whole_or_not_at_all(
    passed: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import joulesmith.report.page as module

    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr(module, "render_page", lambda _: "new ü")
    monkeypatch.setattr(Path, "write_bytes", _cut_short(Path.write_bytes))
    with pytest.raises(JoulesmithError, match="disk full"):
        module.write_page(passed, path)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    monkeypatch.setattr(module, "render_page", lambda _: "new ü")
    module.write_page(passed, path)
    assert path.read_bytes() == "new ü".encode()


def _cut_short(write: object) -> object:
    """``write_bytes`` on a disk that fills up half way."""

    def cut(self: Path, data: bytes) -> int:
        write(self, data[: len(data) // 2])  # type: ignore[operator]
        raise OSError(28, "No space left on device", str(self))

    return cut


def test_missing_extra_is_one_line(passed: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    from joulesmith.report.page import render_page

    for package in ("jinja2", "altair"):
        with monkeypatch.context() as m:
            m.setitem(sys.modules, package, None)
            with pytest.raises(JoulesmithError, match=rf"{package}.*joulesmith\[optimize\]"):
                render_page(passed)


def test_reading_a_result_needs_no_charts() -> None:
    code = (
        "import sys; from joulesmith.report import load_result, write_json, render_terminal; "
        "print([m for m in ('altair', 'jinja2', 'vl_convert', 'torch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
