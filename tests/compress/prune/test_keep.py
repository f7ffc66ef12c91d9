"""A pruning that is interrupted goes on where it stopped, to the very same weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from joulesmith import models
from joulesmith.compress.prune import admm, walk
from joulesmith.compress.prune.step import Prune
from joulesmith.compress.prune.walk import Pruned, prune_module
from joulesmith.errors import JoulesmithError
from small_modules import Branches, language, mlp, tokens
from tiny import write_tiny

IDS = tokens(16, 12).int().numpy()
LAYERS = 3


class StopError(Exception):
    pass


def state(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, b[n]) for n, t in a.items())


def stop_at(tick: int) -> Callable[[float], None]:
    """Progress that fails when it is told something for that time."""
    told: list[float] = []

    def progress(share: float) -> None:
        told.append(share)
        if len(told) == tick:
            raise StopError

    return progress


def never(*args: object, **settings: object) -> Any:
    raise AssertionError("done before")


def llama() -> nn.Module:
    return language("llama", layers=LAYERS)


def made(kind: str) -> tuple[nn.Module, Any]:
    if kind == "mlp":
        return mlp(), list(torch.randn(3, 40, 12, generator=torch.Generator().manual_seed(0)))
    if kind == "branches":  # one block
        return Branches(), list(torch.ones(2, 20, 8))
    return language(kind, layers=LAYERS), IDS


SETTINGS: list[dict[str, Any]] = [
    {}, {"method": "sparsegpt"}, {"method": "wanda"}, {"method": "wanda", "allocation": "threshold"},
    {"method": "magnitude", "repair": True}, {"method": "fisher", "repair": True, "labels": "drawn"},
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "settings"),
    [*(("llama", s) for s in SETTINGS), *((k, {}) for k in ("bert", "gpt2", "mixtral", "mlp"))],
)
def test_interrupted_after_every_part(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Stopped by its first tick after each part that it keeps, it makes no other weights."""
    whole, data = made(kind)
    wanted = prune_module(whole, data, sparsity=0.5, **settings)
    module, _ = made(kind)
    before, kept = state(module), []
    for _ in range(20):
        had = len(list(tmp_path.iterdir()))
        shares: list[float] = []

        def progress(share: float, had: int = had, shares: list[float] = shares) -> None:
            shares.append(share)
            if len(list(tmp_path.iterdir())) > had:
                raise StopError

        try:
            found = prune_module(
                module, data, sparsity=0.5, keep=tmp_path, progress=progress, **settings
            )
            break
        except StopError:
            assert same(state(module), before)
            kept.append(len(list(tmp_path.iterdir())))
    assert kept == list(range(1, len(kept) + 1)) and len(kept) >= LAYERS
    assert found == wanted and same(state(module), state(whole))
    assert shares == sorted(shares) and shares[0] == 0.35 and shares[-1] == 1
    assert not list(tmp_path.glob("*.part"))


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """Two of three blocks are done."""
    with pytest.raises(StopError):
        prune_module(
            llama(), IDS, sparsity=0.5, keep=tmp_path,
            progress=lambda x: None if x < 0.7 else stop_at(1)(x),
        )  # fmt: skip
    names = ["block-0.safetensors", "block-1.safetensors", "survey.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    return tmp_path


@pytest.fixture(scope="module")
def whole() -> tuple[list[Pruned], dict[str, Tensor]]:
    module = llama()
    return prune_module(module, IDS, sparsity=0.5), state(module)


def test_nothing_is_computed_twice(
    interrupted: Path,
    whole: tuple[list[Pruned], dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    solved, prune = [], admm.prune
    monkeypatch.setattr(walk, "survey", never)
    monkeypatch.setattr(admm, "prune", lambda *a, **s: solved.append(1) or prune(*a, **s))
    module, shares = llama(), list[float]()
    assert (
        prune_module(module, IDS, sparsity=0.5, keep=interrupted, progress=shares.append)
        == (whole[0])
    )
    assert same(state(module), whole[1]) and len(solved) == 7, "layers of the last block"
    assert shares == pytest.approx([0.35] + [0.35 + 0.65 * i / LAYERS for i in (1, 2, 3)])
    module = llama()
    monkeypatch.setattr(admm, "prune", never)
    assert prune_module(module, IDS, sparsity=0.5, keep=interrupted) == whole[0]
    assert same(state(module), whole[1])


@pytest.mark.parametrize("name", ["survey", "block-0", "block-1"])
@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "folder"])
def test_a_damaged_file_is_not_kept(
    interrupted: Path, whole: tuple[list[Pruned], dict[str, Tensor]], name: str, damage: str
) -> None:
    path = interrupted / f"{name}.safetensors"
    raw = path.read_bytes()
    changed = raw[:-5] + bytes([raw[-5] ^ 4]) + raw[-4:]
    path.write_bytes({"cut": raw[:-9], "changed": changed}.get(damage, b""))
    module = llama()
    if damage == "folder":
        path.unlink()
        path.mkdir()
        before = state(module)
        with pytest.raises(JoulesmithError, match="not a regular file"):
            prune_module(module, IDS, sparsity=0.5, keep=interrupted)
        assert same(state(module), before)
        return
    assert prune_module(module, IDS, sparsity=0.5, keep=interrupted) == whole[0]
    assert same(state(module), whole[1])
    assert path.read_bytes() == raw, "kept again"


@pytest.mark.parametrize(
    "change",
    [
        {"sparsity": 0.6}, {"seed": 1}, {"method": "sparsegpt"}, {"allocation": "uniform"},
        {"pattern": "row"}, {"layers": ("*.mlp.*",)}, {"data": IDS[:, :10]}, {"data": IDS[1:]},
        {"weight": 1.0},
    ],
)  # fmt: skip
def test_what_is_of_another_job_is_not_used(interrupted: Path, change: dict[str, Any]) -> None:
    found = []
    for keep in (None, interrupted):
        settings: dict[str, Any] = {"sparsity": 0.5, "data": IDS} | change
        module = llama()
        with torch.no_grad():
            module.get_parameter("model.norm.weight")[0].add_(settings.pop("weight", 0.0))
        records = prune_module(module, settings.pop("data"), keep=keep, **settings)
        found.append((records, state(module)))
    assert found[0][0] == found[1][0] and same(found[0][1], found[1][1])


def test_weights_before_training_are_part_of_the_job(tmp_path: Path) -> None:
    found = []
    for scale in (2.0, 0.5):
        module = llama()
        before = {n: x.matrix * scale for n, x in walk.prunable(module).items()}
        for keep in (None, tmp_path):
            module = llama()
            prune_module(
                module, IDS, sparsity=0.5, method="movement", repair=True, before=before, keep=keep
            )
            found.append(state(module))
    assert same(found[0], found[1]) and same(found[2], found[3]) and not same(found[0], found[2])


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_full_disk(
    left: int,
    tmp_path: Path,
    whole: tuple[list[Pruned], dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Room for so many files: the module is as it was, and what was kept is of use."""
    module = llama()
    before = state(module)
    with monkeypatch.context() as patch:
        room = [math.inf] * left
        patch.setattr("joulesmith.atomic.free_bytes", lambda _: room.pop() if room else 0)
        with pytest.raises(JoulesmithError, match="not enough disk space") as e:
            prune_module(module, IDS, sparsity=0.5, keep=tmp_path / "kept")
    assert "\n" not in str(e.value) and same(state(module), before)
    assert len(list((tmp_path / "kept").iterdir())) == left
    assert prune_module(module, IDS, sparsity=0.5, keep=tmp_path / "kept") == whole[0]
    assert same(state(module), whole[1])


def test_the_step_goes_on(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", steps=1)
    windows = IDS.repeat(3, axis=1)
    step, found = Prune(sparsity=0.5), []
    for keep in (None, tmp_path / "kept"):
        model = models.load(folder)
        if keep is not None:
            with pytest.raises(StopError):
                step.apply(model, windows, lambda x: None if x < 0.6 else stop_at(1)(x), keep)
            assert (keep / "block-0.safetensors").exists()
        found.append((step.apply(model, windows, keep=keep), state(model.module)))
    assert found[0][0].pruned == found[1][0].pruned and same(found[0][1], found[1][1])
