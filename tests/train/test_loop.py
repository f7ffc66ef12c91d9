"""The loop, on a model of a few thousand weights whose joules are made up."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed import Killed, killed_at
from numpy.typing import NDArray
from torch import Tensor, nn

from joulesmith.energy.reading import Reading
from joulesmith.errors import JoulesmithError
from joulesmith.train import checkpoint, loop, losses
from joulesmith.train.loop import Trained, train
from joulesmith.train.settings import TrainSettings

VOCAB = 17
WINDOWS = np.random.default_rng(0).integers(0, VOCAB, (20, 12)).astype(np.int32)
WINDOWS[:, 1::2] = (WINDOWS[:, ::2] + 1) % VOCAB  # something to learn


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.inner = nn.Linear(16, 16)
        self.drop = nn.Dropout(0.1)
        self.lm_head = nn.Linear(16, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.drop(torch.relu(self.inner(self.embed(tokens)))))
        return out


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small()


def objective(module: nn.Module, tokens: Tensor, places: NDArray[np.int64]) -> Tensor:
    return losses.hard(module(tokens[:, :-1]), tokens[:, 1:])


def judge(module: nn.Module) -> float:
    tokens = torch.from_numpy(WINDOWS.astype(np.int64))
    return float(objective(module, tokens, np.arange(len(tokens))))


def go(module: nn.Module | None = None, **given: Any) -> Trained:
    settings = {"steps": 12, "batch": 8, "micro": 4, "rate": 1e-2}
    settings |= {k: given.pop(k) for k in list(given) if k in TrainSettings.model_fields}
    return train(module or small(), WINDOWS, objective, TrainSettings(**settings), **given)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw", "adafactor", "muon"])
def test_it_learns(optimizer: str) -> None:
    rate = {"sgd": 0.5, "momentum": 0.1, "adafactor": 0.02, "muon": 0.02}.get(optimizer, 1e-2)
    found = go(optimizer=optimizer, rate=rate, steps=60, judge=judge, every=20)
    assert len(found.losses) == found.steps == 60 and found.stopped == "all steps done"
    assert found.curve[-1][1] < found.curve[0][1] - 0.3
    assert len(found.curve) == 4
    assert (found.optimizer_bytes > 0) == (optimizer != "sgd")


def test_gradients_are_those_of_the_whole_batch() -> None:
    whole, parts = small(), small()
    whole.drop.p = parts.drop.p = 0.0
    go(whole, micro=8, steps=1, optimizer="sgd", warmup=0)
    go(parts, micro=3, steps=1, optimizer="sgd", warmup=0)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "adafactor", "muon"])
@pytest.mark.parametrize("stop", [1, 5, 11])
def test_a_killed_run_goes_on_with_the_same_losses(
    tmp_path: Path, optimizer: str, stop: int
) -> None:
    given: dict[str, Any] = {
        "optimizer": optimizer,
        "judge": judge,
        "every": 5,
        "save_seconds": 0.0,
    }
    whole = small()
    one = go(whole, **given)
    with pytest.raises(Killed):
        go(folder=tmp_path, progress=killed_at(stop + 1), **given)
    again = small(7)  # weights come from the checkpoint
    two = go(again, folder=tmp_path, **given)
    assert two.losses == one.losses
    assert [x for _, x in two.curve] == [x for _, x in one.curve]
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000012"]
    third = go(small(9), folder=tmp_path, **given)
    assert third.losses == one.losses, "a finished run is not done again"


def test_a_head_that_is_the_embedding_is_kept_once(tmp_path: Path) -> None:
    def tied(seed: int) -> Small:
        module = small(seed)
        module.lm_head.weight = module.embed.weight
        return module

    one = go(whole := tied(0))
    go(tied(0), folder=tmp_path, save_seconds=0.0)
    two = go(again := tied(7), folder=tmp_path)
    assert two.losses == one.losses
    assert again.lm_head.weight is again.embed.weight
    assert torch.equal(again.embed.weight, whole.embed.weight)


def test_loss_that_is_not_finite(tmp_path: Path) -> None:
    steps = 0

    def bad(module: nn.Module, tokens: Tensor, places: NDArray[np.int64]) -> Tensor:
        nonlocal steps
        steps += 1
        return objective(module, tokens, places) * (math.nan if steps > 5 else 1)

    settings = TrainSettings(steps=9, micro=8)
    with pytest.raises(JoulesmithError, match=r"the loss became nan at step 5.*step-000000005 is"):
        train(small(), WINDOWS, bad, settings, folder=tmp_path, save_seconds=0)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000000005"


class Window:
    name = "train"
    reading = Reading(10.0, 1.0, low=9.0, high=11.0, pedigree="measured")

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        pass


class Meter:
    """Ten joules a window; evaluations end one."""

    def window(self, name: str) -> Window:
        return Window()


def test_a_budget_ends_it() -> None:
    found = go(steps=50, meter=Meter(), judge=judge, every=1, budget_joules=65.0)
    assert found.stopped == "the budget of 65 J is spent"
    assert 0 < found.steps < 50
    assert found.joules is not None and found.pedigree == "measured"
    assert go(steps=4, meter=Meter(), judge=judge, every=1, budget_joules=1e6).steps == 4


def test_evaluations_are_not_of_the_budget() -> None:
    class Dear(Meter):
        def window(self, name: str) -> Window:
            window = Window()
            if name == "evaluate":
                window.reading = Reading(1e6, 1.0, low=1e6, high=1e6, pedigree="assumed")
            return window

    found = go(steps=4, meter=Dear(), judge=judge, every=1, budget_joules=1e5)
    assert found.steps == 4 and found.joules is not None and found.joules < 1e5
    assert found.aside == 5e6 and found.pedigree == "measured"
    assert found.curve[0][0] == 0, "nothing was spent before the first step"


def test_joules_that_nobody_knows_end_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind(Meter):
        def window(self, name: str) -> Window:
            window = Window()
            window.reading = Reading(None, 1.0)
            return window

    for given in ({"budget_joules": 9.0}, {"joules_per_percent": 9.0}):
        assert go(steps=3, meter=Blind(), judge=judge, every=1, **given).steps == 3
        monkeypatch.setattr(loop, "UNKNOWN_SECONDS", 0.5)
        with pytest.raises(JoulesmithError, match="joules are unknown on this machine"):
            go(steps=50, meter=Blind(), judge=judge, every=1, **given)
        monkeypatch.undo()


def test_the_next_percent_is_too_dear() -> None:
    found = go(steps=50, meter=Meter(), judge=judge, every=1, rate=1e-9, joules_per_percent=1.0)
    assert "next percent of quality costs more than 1 J" in found.stopped
    assert found.steps < 50
    for without in ({"judge": judge}, {"every": 1}):
        with pytest.raises(JoulesmithError, match="every how many steps"):
            go(steps=50, meter=Meter(), joules_per_percent=1.0, **without)


def test_gradient_that_is_not_finite() -> None:
    def bad(module: nn.Module, tokens: Tensor, places: NDArray[np.int64]) -> Tensor:
        return (
            objective(module, tokens, places)
            + 0
            * module.inner.weight.norm()
            .sub(  # type: ignore[operator, union-attr]
                module.inner.weight.norm()
            )
            .sqrt()
        )

    with pytest.raises(JoulesmithError, match="gradient became nan at step 0"):
        train(small(), WINDOWS, bad, TrainSettings(steps=2))


def test_a_full_disk_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(folder=tmp_path, steps=4)
    before = {p: p.read_bytes() for p in (tmp_path / "step-000000004").iterdir()}
    real = checkpoint.HuggingFaceStorageWriter

    class Full(real):  # type: ignore[misc, valid-type]
        def write_data(self, *args: Any) -> Any:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "HuggingFaceStorageWriter", Full)
    module = small()
    optimizer = torch.optim.AdamW(module.parameters())
    with pytest.raises(JoulesmithError, match=r"No space left.*the one before it is kept") as e:
        checkpoint.save(tmp_path, 5, module, optimizer, {})
    assert "\n" not in str(e.value)
    assert {p: p.read_bytes() for p in (tmp_path / "step-000000004").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000004"]


@pytest.mark.parametrize("what", [KeyboardInterrupt, Killed])
def test_ctrl_c_amid_a_checkpoint_is_no_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: type[BaseException]
) -> None:
    go(folder=tmp_path, steps=4)

    def pressed(*_: Any) -> Any:
        raise what

    monkeypatch.setattr(checkpoint.HuggingFaceStorageWriter, "write_data", pressed)
    module = small()
    with pytest.raises(what):
        checkpoint.save(tmp_path, 5, module, torch.optim.AdamW(module.parameters()), {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000004"]
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint.HuggingFaceStorageReader, "read_data", pressed)
    with pytest.raises(what):
        go(folder=tmp_path, steps=4)


def test_weights_that_no_gradient_reaches(tmp_path: Path) -> None:
    class Idle(Small):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(3, 3)

    def idle() -> Idle:
        torch.manual_seed(0)
        return Idle()

    whole = go(idle(), steps=6)

    def fail(module: nn.Module, tokens: Tensor, places: NDArray[np.int64]) -> Tensor:
        if (tmp_path / "step-000000003").is_dir():
            raise KeyboardInterrupt
        return objective(module, tokens, places)

    settings = TrainSettings(steps=6, batch=8, micro=4, rate=1e-2)
    with pytest.raises(KeyboardInterrupt):
        train(idle(), WINDOWS, fail, settings, folder=tmp_path, save_seconds=0)
    on = go(idle(), steps=6, folder=tmp_path)
    assert on.losses == whole.losses and on.optimizer_bytes == whole.optimizer_bytes


def test_checkpoints_of_another_run_are_refused(tmp_path: Path) -> None:
    go(folder=tmp_path, steps=2)
    with pytest.raises(JoulesmithError, match="checkpoints of another training"):
        go(folder=tmp_path, steps=3)
    (tmp_path / "step-000000002" / "state.json").write_text("[")
    with pytest.raises(JoulesmithError, match="damaged checkpoint"):
        go(folder=tmp_path, steps=2)


def test_a_damaged_checkpoint_is_told(tmp_path: Path) -> None:
    go(folder=tmp_path, steps=2)
    for file in (tmp_path / "step-000000002").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(JoulesmithError, match="of another model or damaged") as e:
        go(folder=tmp_path, steps=2)
    assert "\n" not in str(e.value)


def test_nothing_to_train_on() -> None:
    for bad in (WINDOWS[:0], WINDOWS[:, :1]):
        with pytest.raises(JoulesmithError, match="no windows"):
            train(small(), bad, objective, TrainSettings(steps=1))
    with pytest.raises(JoulesmithError, match="every parameter is frozen"):
        go(small().requires_grad_(False))


def test_modes_are_put_back() -> None:
    module = small().eval()
    go(module, steps=1)
    assert not module.training


def test_short_windows_first() -> None:
    seen: list[tuple[int, ...]] = []

    def noted(module: nn.Module, tokens: Tensor, places: NDArray[np.int64]) -> Tensor:
        seen.append(tuple(tokens.shape))
        return objective(module, tokens, places)

    settings = TrainSettings(steps=10, batch=4, micro=4, start_length=3, short=0.5)
    module = small()
    found = train(module, WINDOWS, noted, settings)
    assert [n * length for n, length in seen] == [48] * 10, "the same tokens"
    assert found.tokens == sum(n * (length - 1) for n, length in seen), "that are predicted"
    lengths = [length for _, length in seen]
    assert lengths[0] == 3 and lengths == sorted(lengths) and lengths[5:] == [12] * 5
    with pytest.raises(JoulesmithError, match="divisor"):
        train(small(), WINDOWS, noted, settings.model_copy(update={"start_length": 5}))


def test_a_time_ends_it(tmp_path: Path) -> None:
    found = go(steps=100_000, budget_seconds=1e-6)
    assert found.steps < 100_000 and "s are over" in found.stopped


def test_the_end_is_judged_once() -> None:
    found = go(steps=12, every=6, judge=judge)
    assert len(found.curve) == 3
