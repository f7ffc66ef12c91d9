"""Sparse training in the loop, on a model of a few thousand weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed import Killed, killed_at
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor, nn

from joulesmith.errors import JoulesmithError
from joulesmith.train import losses
from joulesmith.train.loop import Trained, train
from joulesmith.train.settings import TrainSettings
from joulesmith.train.sparse import SparseTraining
from joulesmith.train.sparse_settings import SparseSettings

VOCAB, STEPS = 17, 12
WINDOWS = np.random.default_rng(0).integers(0, VOCAB, (20, 12)).astype(np.int32)
WINDOWS[:, 1::2] = (WINDOWS[:, ::2] + 1) % VOCAB  # something to learn
METHODS = ("static", "magnitude", "movement", "set", "rigl")
PATTERNS: tuple[dict[str, Any], ...] = ({"sparsity": 0.75}, {"pattern": "2:4"})


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.up = nn.Linear(16, 32)
        self.drop = nn.Dropout(0.1)
        self.down = nn.Linear(32, 16)
        self.lm_head = nn.Linear(16, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = hidden + self.down(self.drop(torch.relu(self.up(hidden))))
        out: Tensor = self.lm_head(hidden)
        return out


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small()


def objective(module: nn.Module, tokens: Tensor, places: NDArray[np.int64]) -> Tensor:
    return losses.hard(module(tokens[:, :-1]), tokens[:, 1:])


def sparse(method: str, **given: Any) -> SparseSettings:
    moves: dict[str, Any] = {} if method == "static" else {"every": 2, "until": 9}
    return SparseSettings.model_validate(
        {"method": method, "layers": ("up", "down"), **moves, **given}
    )


def settings(**given: Any) -> TrainSettings:
    return TrainSettings(**{"steps": STEPS, "batch": 8, "micro": 4, "rate": 1e-2, **given})


class Watched(SparseTraining):
    """Looks after each step whether what has to hold does."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[dict[str, Tensor]] = []

    def wrap(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        found = super().wrap(optimizer)
        self.look()
        return found

    def after(self, step: int) -> None:
        super().after(step)
        self.look()

    def look(self) -> None:
        masks = self.layer_masks()
        for name, mask in masks.items():
            layer = self.layers[name]
            assert not layer.matrix[~mask].any(), "dead weights are zero"
            for key, value in self.live.state.get(layer.stored, {}).items():
                assert value.numel() == (
                    1 if key == "step" else int(self.live.mask(layer.stored).sum())
                )
            if self.pattern.of:
                live = mask.view(len(mask), -1, self.pattern.of).sum(-1)
                assert (live == live[0, 0]).all() and live[0, 0] >= self.pattern.keep
        self.seen.append({n: m.clone() for n, m in masks.items()})


def go(
    module: nn.Module, method: str, how: dict[str, Any] | None = None, **given: Any
) -> tuple[Trained, Watched]:
    of = settings(**{k: given.pop(k) for k in list(given) if k in TrainSettings.model_fields})
    hook = Watched(module, sparse(method, **(how or {"sparsity": 0.75})), of)
    return train(module, WINDOWS, objective, of, hook=hook, **given), hook


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_zero_and_are_as_many_as_asked(method: str, pattern: dict[str, Any]) -> None:
    module = small()
    found, hook = go(module, method, pattern, steps=STEPS, decay=0.1)
    wanted = pattern.get("sparsity", 0.5)
    assert hook.sparsity == wanted
    zeros = sum(int((m.weight == 0).sum()) for m in (module.up, module.down))
    assert zeros >= wanted * 1024
    counts = [sum(int(m.sum()) for m in masks.values()) for masks in hook.seen]
    moves = [
        any(not torch.equal(a[n], b[n]) for n in a)
        for a, b in zip(hook.seen, hook.seen[1:], strict=False)
    ]
    if method in ("magnitude", "movement"):
        assert counts[0] == 1024 and counts == sorted(counts, reverse=True)
        assert not any(moves[9:]) and len(set(counts)) >= 3
        for a, b in zip(hook.seen, hook.seen[1:], strict=False):
            assert not any((b[n] & ~a[n]).any() for n in a), "none comes back"
    else:
        assert len(set(counts)) == 1
        assert any(moves) == (method != "static") and not any(moves[9:])
    assert not module.embed.weight.eq(0).any() and not module.lm_head.weight.eq(0).any()
    assert found.losses[-1] < found.losses[0]


@pytest.mark.parametrize("optimizer", ["adamw", "momentum", "sgd"])
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_with_the_same_losses(
    tmp_path: Path, method: str, optimizer: str
) -> None:
    whole = small()
    one, kept = go(whole, method, optimizer=optimizer)
    for stop in range(1, STEPS) if optimizer == "adamw" else (3, 6, 9):
        folder = tmp_path / str(stop)
        with pytest.raises(Killed):
            go(
                small(),
                method,
                optimizer=optimizer,
                folder=folder,
                save_seconds=0.0,
                progress=killed_at(stop + 1),
            )
        assert [p.name for p in folder.iterdir()] == [f"step-{stop:09d}"]
        again = small(7)  # weights come from the checkpoint
        two, hook = go(again, method, optimizer=optimizer, folder=folder)
        assert two.losses == one.losses and two.optimizer_bytes == one.optimizer_bytes
        for a, b in zip(whole.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b)
        for n, mask in kept.layer_masks().items():
            assert torch.equal(mask, hook.layer_masks()[n])
        for p, q in zip(whole.parameters(), again.parameters(), strict=True):
            a, b = kept.live.state.get(p, {}), hook.live.state.get(q, {})
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method", ["movement", "rigl"])
def test_a_killed_run_with_groups(tmp_path: Path, method: str) -> None:
    how = {"pattern": "1:4"}
    whole, again = small(), small(7)
    one, _ = go(whole, method, how)
    with pytest.raises(KeyboardInterrupt):

        def killing(share: float) -> None:
            if share > 0.5:
                raise KeyboardInterrupt

        go(small(), method, how, folder=tmp_path, save_seconds=0.0, progress=killing)
    two, _ = go(again, method, how, folder=tmp_path)
    assert two.losses == one.losses
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_checkpoints_of_another_sparse_training_are_refused(tmp_path: Path) -> None:
    go(small(), "static", folder=tmp_path)
    for method, how in (("static", {"sparsity": 0.5}), ("rigl", {"sparsity": 0.75})):
        with pytest.raises(JoulesmithError, match="of another training"):
            go(small(), method, how, folder=tmp_path)
    with pytest.raises(JoulesmithError, match="of another training"):
        train(small(), WINDOWS, objective, settings(), folder=tmp_path)


def test_rigl_looks_at_the_gradients_of_the_whole_batch() -> None:
    found = []
    for micro in (8, 3):
        module = small()
        module.drop.p = 0.0
        _, hook = go(module, "rigl", micro=micro, optimizer="sgd", steps=9)
        found.append(hook.seen)
    for a, b in zip(*found, strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)


def test_rigl_grows_where_the_dense_gradient_is_largest() -> None:
    """One exchange, by hand: before the third step."""
    module = small()
    module.drop.p = 0.0
    seen: dict[str, Any] = {}

    class Third(SparseTraining):
        def before(self, step: int) -> None:
            if step == 2:
                grad = module.up.weight.grad
                assert grad is not None
                seen.update(
                    mask=self.layer_masks()["up"].clone(), grad=grad.clone(),
                    weight=module.up.weight.detach().clone(),
                )  # fmt: skip
            super().before(step)
            if step == 2:
                seen["after"] = self.layer_masks()["up"].clone()
                assert not module.up.weight[~seen["after"]].any()

    how = sparse("rigl", sparsity=0.75, drop=0.5, until=100)
    hook = Third(module, how, settings(steps=100))
    train(module, WINDOWS, objective, settings(steps=100), hook=hook)
    mask, weight, grad = seen["mask"].flatten(), seen["weight"].flatten(), seen["grad"].flatten()
    count = int(0.25 * (1 + np.cos(np.pi * 2 / 100)) * int(mask.sum()))
    assert grad[~mask].any(), "gradients of dead weights are there"
    live = sorted(mask.nonzero().flatten().tolist(), key=lambda i: abs(float(weight[i])))
    stay = set(live[count:])
    others = sorted(set(range(len(mask))) - stay, key=lambda i: -abs(float(grad[i])))
    assert set(seen["after"].flatten().nonzero().flatten().tolist()) == stay | set(others[:count])


def test_gradients_of_dead_weights_do_not_count_in_the_clip() -> None:
    """Beside a dense module whose gradients are masked by hand, clipped hard."""
    module, peer = small(), small()
    for m in (module, peer):
        m.drop.p = 0.0
    of = settings(clip=0.01, optimizer="momentum", warmup=0, schedule="constant", steps=3)
    hook = SparseTraining(module, sparse("static", sparsity=0.75), of)
    train(module, WINDOWS, objective, of, hook=hook)
    masks = hook.layer_masks()

    class Masking:
        identity = None

        def wrap(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
            self.mask(lambda p: p.data)
            return optimizer

        def before(self, step: int) -> None:
            self.mask(lambda p: p.grad)

        def mask(self, what: Any) -> None:
            what(peer.up.weight).mul_(masks["up"])
            what(peer.down.weight).mul_(masks["down"])

        def after(self, step: int) -> None: ...

        def state(self) -> dict[str, Any]:
            return {}

        def tensors(self) -> dict[str, Tensor]:
            return {}

        def load(self, state: dict[str, Any]) -> None: ...

        def end(self) -> None: ...

    train(peer, WINDOWS, objective, of, hook=Masking())
    for a, b in zip(module.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_gradual_zeros_follow_the_paper() -> None:
    _, hook = go(small(), "magnitude", {"sparsity": 0.8, "begin": 1, "every": 2, "until": 9})
    for done, masks in enumerate(hook.seen):
        at = max(0, min(done, 9) - 1) // 2 * 2  # what the last change before it saw
        paper = 0.8 + (0 - 0.8) * (1 - at / 8) ** 3
        for mask in masks.values():
            assert abs(float((~mask).float().mean()) - paper) < 1.01 / mask.numel(), done


def test_what_is_pruned_already_stays_so() -> None:
    module = small()
    module.up.weight.data[:, :10] = 0
    module.down.weight.data[3] = 0
    live = module.up.weight != 0
    _, hook = go(module, "static", {"start": "pruned"})
    assert torch.equal(hook.layer_masks()["up"], live)
    assert not module.down.weight[3].any()


def test_the_largest_live_at_first() -> None:
    module = small()
    before = module.up.weight.detach().abs()
    _, hook = go(module, "static", {"sparsity": 0.75, "start": "magnitude"})
    mask = hook.seen[0]["up"]
    assert before[mask].min() > before[~mask].max()


def test_transposed_and_fused_layers() -> None:
    class Conv1D(nn.Module):  # as GPT-2's
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 32) / 4)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, 16, 32) / 4)

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.up.transpose(1, 2)).sum(0)

    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(VOCAB, 16), Conv1D(), Experts(), nn.Linear(16, VOCAB))

    def loss(m: nn.Module, tokens: Tensor, places: NDArray[np.int64]) -> Tensor:
        return losses.hard(m(tokens[:, :-1].flatten()), tokens[:, 1:].flatten())

    of = settings()
    how = SparseSettings(method="rigl", pattern="2:4", every=2, layers=("1", "2.up.1"))
    hook = Watched(module, how, of)
    train(module, WINDOWS, loss, of, hook=hook)
    assert set(hook.layers) == {"1", "2.up.1"} and hook.sparsity == 0.5
    experts: Any = module[2]
    assert not (experts.up[0] == 0).any() and int((experts.up[1] == 0).sum()) >= 256
    first, last = hook.seen[0], hook.seen[-1]
    assert all(not torch.equal(first[n], last[n]) for n in first)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"sparsity": 0.0}, "greater than 0"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": float("nan")}, "less than 1"),
        ({}, "give one of a sparsity"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "give one of a sparsity"),
        ({"pattern": "4:2"}, "unknown pattern"),
        ({"pattern": "2:4", "allocation": "erk"}, "leave it out"),
        ({"sparsity": 0.5, "pattern": "block:4x4"}, "exchanges single weights"),
        ({"sparsity": 0.5, "begin": 3}, "rigl has no begin"),
        ({"sparsity": 0.5, "drop": 1.0}, "less than 1"),
        ({"sparsity": 0.5, "every": 0}, "greater than or equal to 1"),
        ({"sparsity": 0.5, "method": "magnitude", "drop": 0.1}, "magnitude has no drop"),
        ({"sparsity": 0.5, "method": "magnitude", "begin": 9}, "begin 9 is not before until 9"),
    ],
)
def test_bad_settings(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        sparse(**{"method": "rigl", **bad})


@pytest.mark.parametrize(
    ("bad", "of", "words"),
    [
        ({"sparsity": 0.5, "until": 13}, {}, "until 13 is beyond the 12 steps"),
        ({"pattern": "2:3"}, {}, "up has rows of 16 weights, which groups of 3"),
        ({"sparsity": 0.5, "layers": ("nothing",)}, {}, "no linear layer is called 'nothing'"),
        ({"sparsity": 0.9999}, {}, "leaves 0 weights to 2 layers"),
        ({"sparsity": 0.5}, {"optimizer": "muon"}, "muon has no states of single weights"),
        ({"sparsity": 0.5}, {"optimizer": "adafactor"}, "adafactor has no states"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_training(
    bad: dict[str, Any], of: dict[str, Any], words: str
) -> None:
    with pytest.raises(JoulesmithError, match=words) as e:
        SparseTraining(small(), sparse("rigl", **bad), settings(**of))
    assert "\n" not in str(e.value)


def test_frozen_layers_and_early_questions() -> None:
    module = small()
    module.up.weight.requires_grad_(False)
    with pytest.raises(JoulesmithError, match="up is frozen: leave it out"):
        SparseTraining(module, sparse("static", sparsity=0.5), settings())
    hook = SparseTraining(small(), sparse("static", sparsity=0.5), settings())
    with pytest.raises(JoulesmithError, match="when a training has begun"):
        hook.layer_masks()
    late = sparse("magnitude", sparsity=0.5, begin=8, until=9)
    assert late.last(9) == 9
    with pytest.raises(JoulesmithError, match="begin 8 is not before"):
        SparseSettings(method="magnitude", sparsity=0.5, begin=8).last(9)
