"""A search for a shape that is interrupted goes on where it stopped, to the very same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from joulesmith import models
from joulesmith.compress.prune import choose, drop
from joulesmith.compress.prune.structured import Shrink, Shrunk
from joulesmith.errors import JoulesmithError
from tiny import write_tiny

WINDOWS = np.random.default_rng(0).integers(0, 400, (10, 32)).astype(np.int32)
STEP = Shrink(parameters=0.8, multiple=8, trials=4)


class StopError(Exception):
    pass


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tried") / "tiny", steps=12)


Result = tuple[Shrunk, dict[str, torch.Tensor]]


def shrunk(folder: Path, step: Shrink = STEP, windows: Any = WINDOWS, **more: Any) -> Result:
    model = models.load(folder)
    return step.shrink(model, windows, **more), model.module.state_dict()


def same(a: Result, b: Result) -> bool:
    return a[0] == b[0] and all(torch.equal(t, b[1][n]) for n, t in a[1].items())


@pytest.fixture(scope="module")
def whole(tiny: Path) -> Result:
    found = shrunk(tiny)
    assert len(found[0].trials) == 4
    return found


def test_interrupted_after_every_part(
    tiny: Path, whole: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, draft = [], choose.Chooser._draft
    ordered, by_damage = [], drop.by_damage

    def drafted(self: choose.Chooser, shape: Any) -> float:
        tried.append(shape)
        return draft(self, shape)

    monkeypatch.setattr(choose.Chooser, "_draft", drafted)
    monkeypatch.setattr(drop, "by_damage", lambda *a: ordered.append(1) or by_damage(*a))
    shares: list[float] = []
    for stop in (0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.95, None):
        shares.clear()

        def progress(share: float, stop: float | None = stop) -> None:
            shares.append(share)
            if stop is not None and share >= stop - 1e-9:
                raise StopError

        if stop is not None:
            with pytest.raises(StopError):
                shrunk(tiny, keep=tmp_path, progress=progress)
        else:
            assert same(shrunk(tiny, keep=tmp_path, progress=progress), whole)
    assert len(tried) == len(set(tried)) == 4 and len(ordered) == 1
    assert shares == sorted(shares) == pytest.approx([0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.7, 0.95])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["order.json", "shapes.json"]


@pytest.mark.parametrize("name", ["order", "shapes"])
def test_a_damaged_file_is_not_kept(tiny: Path, whole: Result, tmp_path: Path, name: str) -> None:
    shrunk(tiny, keep=tmp_path)
    path = tmp_path / f"{name}.json"
    text = path.read_text()
    path.write_text(text.replace("0.", "1.", 1))  # a damage that nobody measured
    assert same(shrunk(tiny, keep=tmp_path), whole)
    path.write_text(text[: len(text) // 2])
    assert same(shrunk(tiny, keep=tmp_path), whole)
    assert path.read_text() == text, "kept again"


@pytest.mark.parametrize(
    "other",
    [
        {"step": Shrink(parameters=0.75, multiple=8, trials=4)},
        {"step": Shrink(parameters=0.8, multiple=8, trials=4, by="block-influence")},
        {"windows": WINDOWS[1:]},
        {"layers": 1},
    ],
)
def test_what_is_of_another_job_is_not_used(
    tiny: Path, whole: Result, tmp_path: Path, other: dict[str, Any]
) -> None:
    other = dict(other)
    shrunk(tiny, keep=tmp_path / "kept")
    if other.pop("layers", None):
        model = models.load(tiny)
        with torch.no_grad():
            model.module.model.layers[0].mlp.up_proj.weight.mul_(-1)
        models.save(model, tmp_path / "model")
        tiny = tmp_path / "model"
    found = shrunk(tiny, keep=tmp_path / "kept", **other)
    assert same(found, shrunk(tiny, **other)) and found[0] != whole[0]


def test_a_full_disk(
    tiny: Path, whole: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.load(tiny)
    before = {n: t.clone() for n, t in model.module.state_dict().items()}
    with monkeypatch.context() as patch:
        write, calls = Path.write_text, []

        def full(path: Path, text: str) -> int:
            calls.append(path)
            if len(calls) > 2:
                raise OSError(28, "No space left on device", str(path))
            return write(path, text)

        patch.setattr(Path, "write_text", full)
        with pytest.raises(JoulesmithError, match="disk full") as e:
            STEP.apply(model, WINDOWS, keep=tmp_path)
    assert "\n" not in str(e.value)
    after = model.module.state_dict()
    assert all(torch.equal(t, after[n]) for n, t in before.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["order.json", "shapes.json"]
    assert same(shrunk(tiny, keep=tmp_path), whole)
