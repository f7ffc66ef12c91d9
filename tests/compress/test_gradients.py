"""Gradients block by block against one backward pass of autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from joulesmith.compress.gradients import backward
from joulesmith.compress.layers import Linear, blocks_of, linears_of
from joulesmith.compress.taps import experts_one_by_one
from joulesmith.errors import JoulesmithError
from joulesmith.moments import drawn_from
from small_modules import Branches, language, mlp, tokens

Loss = Callable[[Any, Any], Tensor]


def blockwise(module: nn.Module, batches: list[Any], **more: Any) -> dict[str, Tensor]:
    """Name -> summed gradient of the matrix, from inputs and output gradients."""
    found: dict[str, Tensor] = {}

    def visit(name: str, layer: Linear, x: Tensor, g: Tensor) -> None:
        assert x.shape == (len(g), layer.shape[1]) and g.shape[1] == layer.shape[0]
        found[name] = found.get(name, torch.zeros(layer.shape)) + g.T @ x

    backward(module, batches, visit, **more)
    return found


def plain(module: nn.Module, batches: list[Any], loss: Loss) -> dict[str, Tensor]:
    """The same of the whole module at once."""
    module.zero_grad()
    with experts_one_by_one(module):
        for batch in batches:
            out = module(**batch) if isinstance(batch, dict) else module(batch)
            loss(out, batch).backward()
    found = {}
    for name, layer in linears_of(module).items():
        grad = layer.stored.grad
        if grad is None:  # a pooler, behind the last block
            continue
        grad = grad if layer.expert is None else grad[layer.expert]
        found[name] = grad.T if layer.transposed else grad
    module.zero_grad()
    return found


def alike(got: dict[str, Tensor], want: dict[str, Tensor], names: set[str]) -> None:
    assert set(got) == names
    for name in names:
        scale = float(want[name].abs().max())
        torch.testing.assert_close(got[name], want[name], atol=2e-5 * scale, rtol=1e-3)


def inside(module: nn.Module) -> set[str]:
    return {n for b, m in blocks_of(module).items() for n in linears_of(m, b)}


def drawn(seed: int) -> Loss:
    """-log p of labels drawn as `backward` draws them, or the product with its noise."""
    generator = torch.Generator().manual_seed(seed)

    def loss(out: Any, batch: Any) -> Tensor:
        y = out if isinstance(out, Tensor) else getattr(out, "logits", None)
        if y is None:
            y = out.last_hidden_state
            return (y * torch.randn(y.shape, generator=generator)).sum()
        logp = y.log_softmax(-1).flatten(0, -2)
        labels, _ = drawn_from(logp.detach().exp(), generator)
        return -logp.gather(1, labels).sum()

    return loss


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "mixtral"])
def test_drawn_labels(kind: str) -> None:
    module = language(kind)
    batches = [{"input_ids": tokens(3, seed=i)} for i in range(2)]
    want = plain(module, batches, drawn(5))
    alike(blockwise(module, batches, seed=5), want, inside(module))
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("module", [mlp(), Branches(), nn.Sequential(nn.Linear(12, 4))])
def test_any_module(module: nn.Module) -> None:
    batches = list(torch.randn(2, 7, 8 if isinstance(module, Branches) else 12))
    alike(blockwise(module, batches, seed=1), plain(module, batches, drawn(1)), inside(module))


def test_blocks_that_work_in_place() -> None:
    """What a block reads is not what it leaves."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(6, 6), nn.SiLU(inplace=True), nn.Linear(6, 3), nn.SiLU(inplace=True)
    )  # fmt: skip
    batches = list(torch.randn(2, 7, 6))
    alike(blockwise(module, batches), plain(module, batches, drawn(0)), {"0", "2"})


def test_tokens_in_a_sequential() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(80, 8), nn.Linear(8, 3))
    batches = [tokens(4, seed=i) for i in range(2)]
    alike(blockwise(module, batches), plain(module, batches, drawn(0)), {"2", "3"})


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_next_tokens(kind: str) -> None:
    module = language(kind)
    batches = [{"input_ids": tokens(3, seed=i)} for i in range(2)]

    def loss(out: Any, batch: Any) -> Tensor:
        ids = batch["input_ids"]
        return nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )

    alike(blockwise(module, batches, labels="given"), plain(module, batches, loss), inside(module))


def test_labels_of_the_data() -> None:
    """-100 counts for nothing; those of a model that generates are shifted."""
    module = language("llama")
    labels = tokens(3)
    labels[:, :4] = -100
    batch = {"input_ids": tokens(3), "labels": labels}

    def loss(out: Any, _: Any) -> Tensor:
        found: Tensor = out.loss * 3 * 6
        return found

    got = blockwise(module, [batch], labels="given")
    alike(got, plain(module, [batch], loss), inside(module))


class Classifier(nn.Module):
    """Takes a table of arguments; labels are looked at by the loss alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        found: Tensor = self.layers(x)
        return found


def test_labels_of_a_classifier() -> None:
    batches = [{"x": torch.randn(7, 12), "labels": torch.randint(0, 4, (7,))} for _ in range(2)]
    module = Classifier()

    def loss(out: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(out, batch["labels"], reduction="sum")

    got = blockwise(module, batches, labels="given")
    alike(got, plain(module, batches, loss), set(linears_of(module)))


def test_bad_data_is_told() -> None:
    for module, batch, more, match in (
        (mlp(), torch.randn(3, 12), {"labels": "given"}, "no labels"),
        (mlp(), torch.full((3, 12), torch.nan), {}, "not finite"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 1)), torch.full((3, 12), torch.inf), {},
         "not finite"),
        (nn.Sequential(nn.ReLU(), nn.Tanh()), torch.randn(3, 12), {}, None),
        (Odd(), torch.randn(3, 4), {}, "no tensor of floats, but str"),
    ):  # fmt: skip
        if match is None:
            assert blockwise(module, [batch], **more) == {}
            continue
        with pytest.raises(JoulesmithError, match=match):
            blockwise(module, [batch], **more)
        assert all(p.requires_grad for p in module.parameters())


class Odd(nn.Module):
    """Gives text."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> str:
        return str(self.inner(x).shape)
