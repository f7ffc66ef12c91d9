"""Distillation: the loss that the settings say, of the models that they are given, and no other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed import Killed, killed_at
from pydantic import ValidationError
from torch import Tensor, nn

from joulesmith import models
from joulesmith.errors import JoulesmithError
from joulesmith.train import losses
from joulesmith.train.distil import Distil, check_tokenizers
from joulesmith.train.loop import train
from joulesmith.train.outputs import eager, even_spread, run
from joulesmith.train.recover_settings import DistilSettings
from joulesmith.train.sample import continuations
from joulesmith.train.settings import TrainSettings
from joulesmith.train.teacher import cache_top
from small_modules import language
from tiny import write_tiny

VOCAB = 50
WINDOWS = np.random.default_rng(0).integers(0, VOCAB, (20, 12)).astype(np.int32)
PLACES = np.arange(4)


def tokens() -> Tensor:
    return torch.from_numpy(WINDOWS[PLACES].astype(np.int64))


def loss(student: nn.Module, teacher: nn.Module | None, cache: Any = None, **given: Any) -> Tensor:
    extra = {n: given.pop(n) for n in ("vocab", "eos") if n in given}
    distil = Distil(DistilSettings(**given), teacher=teacher, cache=cache, **extra)
    return distil(student, tokens(), PLACES)


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    return language("llama", 0), language("llama", 1, layers=4)


def test_each_loss_at_its_weight(pair: tuple[nn.Module, nn.Module]) -> None:
    student, teacher = pair
    with eager(student, teacher), torch.no_grad():
        given = {"output_hidden_states": True, "output_attentions": True}
        s, t = (m(input_ids=tokens()[:, :-1], **given) for m in pair)
        parts = {
            "hard": losses.hard(s.logits, tokens()[:, 1:]),
            "soft": losses.soft(s.logits, t.logits, 2.0),
            "hidden": sum(
                losses.hidden(s.hidden_states[i], t.hidden_states[j]) for i, j in ((1, 2), (2, 4))
            )
            / 2,
            "attention": sum(
                losses.attention(s.attentions[i], t.attentions[j]) for i, j in ((0, 1), (1, 3))
            )
            / 2,
        }
        for name, wanted in parts.items():
            weights = {"soft": 0.0, name: 3.0}
            found = loss(student, teacher, temperature=2.0, **weights)
            torch.testing.assert_close(found, 3 * wanted, rtol=1e-5, atol=0)
        weights = {"hard": 0.1, "soft": 0.2, "hidden": 0.3, "attention": 0.4}
        found = loss(student, teacher, temperature=2.0, **weights)
        wanted = sum(w * parts[n] for n, w in weights.items())
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
        one = loss(student, teacher, soft=0.0, hidden=1.0, layers=((1, 3),))
        wanted = losses.hidden(s.hidden_states[1], t.hidden_states[3])
        torch.testing.assert_close(one, wanted)
        back = loss(student, teacher, divergence="reverse")
        torch.testing.assert_close(back, losses.reverse(s.logits, t.logits))
    assert student.config._attn_implementation == "sdpa", "put back"  # type: ignore[union-attr]


def test_the_teacher_gets_no_gradient_and_no_dropout(pair: tuple[nn.Module, nn.Module]) -> None:
    student, teacher = copy.deepcopy(pair[0]), copy.deepcopy(pair[1]).train()
    loss(student, teacher, hidden=1.0).backward()
    assert not teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_a_student_that_is_the_teacher_has_nothing_to_learn(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    teacher = pair[0]
    student = copy.deepcopy(teacher)
    with eager(student, teacher):
        found = loss(student, teacher, hidden=1.0, attention=1.0)
    assert abs(float(found.detach())) < 1e-5
    with pytest.raises(JoulesmithError, match="one module"):
        loss(teacher, teacher)


def test_cached_is_live_as_far_as_float16_goes(
    pair: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    student, teacher = copy.deepcopy(pair[0]), pair[1]
    cache = cache_top(teacher, WINDOWS, VOCAB, tmp_path / "all")
    live, kept = (loss(student, t, c) for t, c in ((teacher, None), (None, cache)))
    assert float(kept.detach()) == pytest.approx(float(live.detach()), rel=2e-3)
    gradients = [torch.autograd.grad(x, student.lm_head.weight)[0] for x in (live, kept)]  # type: ignore[union-attr]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.02, atol=1e-4)
    few = cache_top(teacher, WINDOWS, 5, tmp_path / "few")
    ids, values = few.read(PLACES)
    with torch.no_grad():
        wanted = losses.soft_top(student(tokens()[:, :-1]).logits, ids, values, 2.0)
        assert float(loss(student, None, few, temperature=2.0)) == float(wanted)
        # with the teacher beside it, for what is in no cache
        both = loss(student, teacher, few, temperature=2.0, hidden=1.0)
        hidden = loss(student, teacher, soft=0.0, hidden=1.0)
    assert float(both) == pytest.approx(float(wanted + hidden), rel=1e-5)
    for t in (1.0, 2.0):  # at 1 in the pass over logits of the teacher's loss
        parts = [loss(student, None, few, temperature=t), loss(student, None, soft=0.0, hard=1.0)]
        both = loss(student, None, few, temperature=t, hard=0.2)
        expected = parts[0] + 0.2 * parts[1]
        torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-6)
        gradients = [torch.autograd.grad(x, student.lm_head.weight)[0] for x in (both, expected)]  # type: ignore[union-attr]
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    shifted = Distil(DistilSettings(), cache=few)
    with pytest.raises(JoulesmithError, match="window 1 is not the one"):
        shifted(student, tokens(), PLACES + 1)


class Padded(nn.Module):
    """More logits than tokens."""

    def __init__(self, inner: nn.Module, more: int) -> None:
        super().__init__()
        self.inner, self.more = inner, more

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.inner(tokens).logits
        return torch.cat([out, 5 + out[..., : self.more]], -1)


def test_logits_of_no_token_are_left_out(pair: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    student, teacher = pair
    with torch.no_grad():
        wanted = float(loss(student, teacher))
        assert float(loss(Padded(student, 3), Padded(teacher, 7), vocab=VOCAB)) == wanted
        assert float(loss(student, Padded(teacher, 7))) == wanted
        assert float(loss(Padded(student, 7), teacher)) == wanted
        cache = cache_top(Padded(teacher, 7), WINDOWS, 9, tmp_path / "a", vocab=VOCAB)
        plain = cache_top(teacher, WINDOWS, 9, tmp_path / "b")
        found = loss(Padded(student, 3), None, cache)
        assert float(found) == float(loss(student, None, plain))
        with pytest.raises(JoulesmithError, match="same tokenizer"):
            loss(student, teacher, vocab=VOCAB + 1)
        with pytest.raises(JoulesmithError, match="same tokenizer"):
            loss(Padded(student, 3), None, cache, vocab=VOCAB + 1)


def test_models_that_do_not_match(pair: tuple[nn.Module, nn.Module]) -> None:
    student, teacher = pair
    for bad in (((3, 1),), ((1, 5),), ((0, 1),)):
        with pytest.raises(JoulesmithError, match="cannot be matched: the student has 1 to 2"):
            loss(student, teacher, hidden=1.0, layers=bad)
    with pytest.raises(JoulesmithError, match="no layers to match"):
        loss(student, teacher, hidden=1.0, layers=())
    with pytest.raises(JoulesmithError, match="eager attention"):
        loss(student, teacher, attention=1.0)
    with pytest.raises(JoulesmithError, match="no hidden states"):
        loss(Padded(student, 1), teacher, hidden=1.0)
    with pytest.raises(JoulesmithError, match="gives no logits"):
        loss(language("bert"), teacher)


def test_settings_that_teach_nothing(pair: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    cache = cache_top(pair[1], WINDOWS, 3, tmp_path)
    with pytest.raises(JoulesmithError, match="needs a teacher"):
        Distil(DistilSettings())
    for given in ({"hidden": 1.0}, {"attention": 1.0}, {"on_policy": 0.5}):
        with pytest.raises(JoulesmithError, match="give the teacher itself"):
            Distil(DistilSettings(**given), cache=cache)  # type: ignore[arg-type]
    with pytest.raises(JoulesmithError, match="forward divergence only"):
        Distil(DistilSettings(divergence="reverse"), cache=cache)
    with pytest.raises(ValidationError, match="all weights are 0"):
        DistilSettings(soft=0)
    with pytest.raises(ValidationError, match="needs a weight in soft"):
        DistilSettings(soft=0, hard=1, on_policy=0.5)
    Distil(DistilSettings(soft=0, hard=1))


def test_even_spread() -> None:
    assert even_spread(2, 4) == ((1, 2), (2, 4))
    assert even_spread(3, 3) == ((1, 1), (2, 2), (3, 3))
    assert even_spread(4, 6) == ((1, 2), (2, 3), (3, 5), (4, 6))
    for s in range(1, 9):
        for t in range(s, 13):
            found = even_spread(s, t)
            assert [i for i, _ in found] == list(range(1, s + 1)) and found[-1] == (s, t)
            assert all(abs(j - i * t / s) <= 0.5 for i, j in found)
            assert len({j for _, j in found}) == s


# -- on-policy ----------------------------------------------------------------


def test_samples_follow_the_student(pair: tuple[nn.Module, nn.Module]) -> None:
    student = pair[0]
    torch.manual_seed(0)
    prompts = tokens()[:1, :5].expand(4000, 5)
    rows, counted = continuations(student, prompts, 2)
    assert rows.shape == (4000, 7) and bool(counted.all()) and torch.equal(rows[:, :5], prompts)
    with torch.no_grad():
        p = run(student, prompts[:1]).logits[0, -1].softmax(-1)
        again = run(student, rows[:, :6]).logits[:, -1].softmax(-1)
    for column, expected in ((5, p), (6, again.mean(0))):
        got = torch.bincount(rows[:, column], minlength=VOCAB) / 4000
        assert float((got - expected).abs().max()) < 5 * (0.25 / 4000) ** 0.5
    # conditional on the first: the cache reads what was drawn
    first = int(rows[:, 5].mode().values)
    mine = rows[rows[:, 5] == first]
    p = again[rows[:, 5] == first][0]
    got = torch.bincount(mine[:, 6], minlength=VOCAB) / len(mine)
    assert float((got - p).abs().max()) < 5 * (0.25 / len(mine)) ** 0.5


def test_samples_without_a_cache_are_those_with_one(pair: tuple[nn.Module, nn.Module]) -> None:
    torch.manual_seed(1)
    one = continuations(pair[0], tokens()[:, :4], 6)[0]
    torch.manual_seed(1)
    two = continuations(Padded(pair[0], 3), tokens()[:, :4], 6, vocab=VOCAB)[0]
    assert torch.equal(one, two)


def test_a_sampled_text_ends(pair: tuple[nn.Module, nn.Module]) -> None:
    torch.manual_seed(0)
    rows, counted = continuations(pair[0].train(), tokens().repeat(50, 1)[:, :4], 6, eos=7)
    pair[0].eval()
    for row, mine in zip(rows[:, 4:].tolist(), counted.tolist(), strict=True):
        length = row.index(7) + 1 if 7 in row else 6
        assert mine == [True] * length + [False] * (6 - length)
    assert 7 in rows[:, 4:-1]


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_on_policy_loss(pair: tuple[nn.Module, nn.Module], divergence: str) -> None:
    student, teacher = pair
    given = {
        "on_policy": 1.0, "prompt": 4, "continuation": 5, "on_policy_divergence": divergence,
        "hard": 9.0, "soft": 2.0, "temperature": 1.5,
    }  # fmt: skip
    torch.manual_seed(3)
    found = loss(student, teacher, eos=7, **given)
    assert found.requires_grad
    torch.manual_seed(3)
    torch.rand(())
    rows, counted = continuations(student, tokens()[:, :4], 5, eos=7)
    f = {"forward": losses.soft, "reverse": losses.reverse}[divergence]
    total, n = 0.0, 0
    with torch.no_grad():
        s, t = student(rows).logits, teacher(rows).logits
        for i, row in enumerate(counted.tolist()):
            for j, counts in enumerate(row):
                if counts:
                    n += 1
                    total += float(f(s[i, 3 + j], t[i, 3 + j], 1.5))
    assert float(found.detach()) == pytest.approx(2 * total / n, rel=1e-4)


def test_after_sampling_in_bfloat16_every_weight_learns(pair: tuple[nn.Module, nn.Module]) -> None:
    """Autocast must not hand the pass what it cast without a gradient (torch before 2.11 did)."""
    student = language("llama", 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(student, pair[1], on_policy=1.0, prompt=4)
    found.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())


def test_a_student_with_more_logits_samples_what_the_teacher_reads(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    found = loss(Padded(pair[0], 20), pair[1], on_policy=1.0)
    assert bool(torch.isfinite(found))


def test_share_of_on_policy(
    pair: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    distil = Distil(DistilSettings(on_policy=0.25), teacher=pair[1])
    calls = []
    monkeypatch.setattr(distil, "_on_policy", lambda *_: calls.append(1) or torch.zeros(()))
    torch.manual_seed(0)
    for _ in range(200):
        with torch.no_grad():
            distil(pair[0], tokens()[:1, :3], PLACES[:1])
    assert 30 <= len(calls) <= 70
    with pytest.raises(JoulesmithError, match="leaves nothing of windows of 12"):
        loss(*pair, on_policy=1.0, prompt=12)


# -- training -----------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"hard": 0.5, "hidden": 0.5, "temperature": 2.0},
        {"on_policy": 0.5, "prompt": 4},
        {"cached": True},
    ],
)
@pytest.mark.parametrize("stop", [1, 5])
def test_a_killed_distillation_goes_on_with_the_same_losses(
    pair: tuple[nn.Module, nn.Module], tmp_path: Path, given: dict[str, Any], stop: int
) -> None:
    given = dict(given)
    teacher = pair[1]
    cached = given.pop("cached", False)
    cache = cache_top(teacher, WINDOWS, 8, tmp_path / "top") if cached else None
    settings = TrainSettings(steps=7, batch=4, micro=2, rate=1e-2)

    def go(module: nn.Module, **more: Any) -> Any:
        objective = Distil(
            DistilSettings(**given), teacher=None if cached else teacher, cache=cache, eos=7
        )
        return train(module, WINDOWS, objective, settings, save_seconds=0.0, **more)

    whole = language("llama", 0)
    one = go(whole)
    with pytest.raises(Killed):
        go(language("llama", 0), folder=tmp_path / "run", progress=killed_at(stop + 1))
    again = language("llama", 5)  # weights come from the checkpoint
    two = go(again, folder=tmp_path / "run")
    assert two.losses == one.losses
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_student_comes_nearer_to_its_teacher(pair: tuple[nn.Module, nn.Module]) -> None:
    teacher = pair[1]

    def judge(module: nn.Module) -> float:
        rows = torch.from_numpy(WINDOWS.astype(np.int64))
        return float(losses.soft(module(rows).logits, teacher(rows).logits))

    for more in ({}, {"on_policy": 1.0, "prompt": 2}):
        objective = Distil(DistilSettings(**more), teacher=teacher)
        settings = TrainSettings(steps=40, batch=10, micro=10, rate=1e-2)
        found = train(language("llama", 0), WINDOWS, objective, settings, judge=judge)
        assert found.curve[-1][1] < 0.8 * found.curve[0][1]


# -- tokenizers ---------------------------------------------------------------


def test_tokenizers(tmp_path: Path) -> None:
    one = models.load(write_tiny(tmp_path / "a", steps=0)).tokenizer
    same = models.load(tmp_path / "a").tokenizer
    assert check_tokenizers(one, same) == len(one) == 400
    import json

    file = tmp_path / "a" / "tokenizer.json"
    text = json.loads(file.read_text())

    def other(change: Any) -> Any:
        import tokenizers

        new = json.loads(json.dumps(text))
        change(new)
        backend = tokenizers.Tokenizer.from_str(json.dumps(new))
        return type(one)(backend, one.bos, one.eos, one.add_bos)

    def swap(new: Any) -> None:
        vocab = new["model"]["vocab"]
        vocab["!"], vocab['"'] = vocab['"'], vocab["!"]

    def cut(new: Any) -> None:
        new["model"]["merges"] = new["model"]["merges"][::-1]

    def fewer(new: Any) -> None:
        last = max(new["model"]["vocab"], key=new["model"]["vocab"].get)
        del new["model"]["vocab"][last]
        new["model"]["merges"] = new["model"]["merges"][:-1]

    assert check_tokenizers(one, other(lambda new: None)) == 400
    for change, why in (
        (swap, r"token 1 is '!' in the student's alone"),
        (cut, "cut the same text differently"),
        (fewer, "400 and 399 tokens"),
    ):
        with pytest.raises(JoulesmithError, match=why) as e:
            check_tokenizers(one, other(change))
        assert "\n" not in str(e.value)
    with pytest.raises(JoulesmithError, match="BOS and EOS are 0, 0 and 0, 1"):
        check_tokenizers(one, type(one)(one.backend, 0, 1, False))
