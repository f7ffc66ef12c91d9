"""SliceGPT by its published recipe, for blocks like a Llama's: what `structured.py` compares with.

Ashkboos et al. 2024, "SliceGPT: compress large language models by deleting rows and columns",
section 3 and algorithm 1, with the choices of their released code: the inputs of each norm have
principal directions of their own, found on the network as it is sliced so far, in float64 with a
hundredth of the mean variance added; all norms but the last are cut to one width; the head is
rotated and not cut; a matrix on each residual connection turns one basis into the next. What
comes out is no plain Llama: it runs here, in torch.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from joulesmith.models import Model

BATCH = 4


class Norm(nn.Module):
    """A root mean square over as many channels as there were; its weight went elsewhere."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.channels, self.eps = channels, eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / self.channels + self.eps)


class Sliced(nn.Module):
    """A block between bases. turns: what the stream is multiplied with on its way past attention
    and past the MLP."""

    def __init__(self, block: nn.Module, channels: int, eps: float) -> None:
        super().__init__()
        self.attention, self.mlp, self.norm = block.self_attn, block.mlp, Norm(channels, eps)
        self.turns = [torch.eye(channels), torch.eye(channels)]
        for norm, parts in (
            (block.input_layernorm, [getattr(self.attention, f"{n}_proj") for n in "qkv"]),
            (block.post_attention_layernorm, [self.mlp.gate_proj, self.mlp.up_proj]),
        ):
            for part in parts:
                part.weight = nn.Parameter(part.weight * norm.weight)

    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        x = self.attended(hidden_states, given)
        return x @ self.turns[1] + self.mlp(self.norm(x))

    def attended(self, x: Tensor, given: dict[str, Any]) -> Tensor:
        """The stream between attention and MLP."""
        return x @ self.turns[0] + self.attention(self.norm(x), **given)[0]


def parameters(model: Model, width: int) -> int:
    """Of a model sliced to that width, matrices on residual connections counted."""
    config, module = model.module.config, model.module
    hidden = config.hidden_size
    block = sum(p.numel() for p in module.model.layers[0].parameters() if p.ndim == 2)
    blocks = config.num_hidden_layers * block * width // hidden
    # The last MLP and the last connection end at the full width.
    blocks += config.intermediate_size * (hidden - width) + width * (hidden - width)
    return (
        blocks + 2 * config.num_hidden_layers * width * width + config.vocab_size * (width + hidden)
    )


def widest(model: Model, most: int) -> int:
    """The largest of no more parameters than ``most``; theirs are multiples of 8."""
    widths = range(1, model.module.config.hidden_size)
    return max(w for w in widths if parameters(model, w) <= most)


def directions(parts: list[Tensor]) -> Tensor:
    """Principal directions of (..., channels), those of most variance first."""
    size = parts[0].shape[-1]
    h = torch.zeros(size, size, dtype=torch.float64)
    for x in parts:
        flat = x.flatten(0, -2).double()
        h += flat.T @ flat
    h.diagonal().add_(0.01 * h.diagonal().mean())
    return torch.linalg.eigh(h).eigenvectors.flip(1)


def slice_(model: Model, windows: np.ndarray, width: int) -> None:
    """Slice ``model.module`` in place; it is a module to run, and no longer one to save."""
    module = model.module
    config, inner = module.config, module.model
    hidden, eps = config.hidden_size, config.rms_norm_eps
    with torch.no_grad():
        head = module.lm_head.weight * inner.norm.weight
        embed = inner.embed_tokens.weight.detach().clone()
        calls = _calls(module, windows)
        states = [x for x, _ in calls]
        turn = directions(states)
        inner.embed_tokens.weight = nn.Parameter((embed.double() @ turn)[:, :width].float())
        last = len(inner.layers) - 1
        for i, block in enumerate(list(inner.layers)):
            sliced = Sliced(block, hidden, eps)
            inner.layers[i] = sliced
            into = turn[:, :width]
            _read(sliced.attention, "qkv", into)
            states = [(x.double() @ into).float() for x in states]
            sliced.turns[0] = into.T.float()
            turn = directions(
                [sliced.attended(x, k) for x, (_, k) in zip(states, calls, strict=True)]
            )
            into = turn[:, :width]
            sliced.turns[0] = (sliced.turns[0].double() @ into).float()
            _written(sliced.attention.o_proj, into)
            _read(sliced.mlp, ("gate", "up"), into)
            sliced.turns[1] = into.T.float()
            outs = [sliced(x, **k) for x, (_, k) in zip(states, calls, strict=True)]
            turn = directions(outs)
            into = turn if i == last else turn[:, :width]
            sliced.turns[1] = (sliced.turns[1].double() @ into).float()
            _written(sliced.mlp.down_proj, into)
            states = outs
        inner.norm = Norm(hidden, eps)
        module.lm_head = nn.Linear(hidden, len(head), bias=False)
        module.lm_head.weight = nn.Parameter((head.double() @ turn).float())


def _read(owner: nn.Module, names: Any, into: Tensor) -> None:
    for name in names:
        part = getattr(owner, f"{name}_proj")
        part.weight = nn.Parameter((part.weight.double() @ into).float())


def _written(part: nn.Module, into: Tensor) -> None:
    part.weight = nn.Parameter((into.T @ part.weight.double()).float())


def _calls(module: nn.Module, windows: np.ndarray) -> list[tuple[Tensor, dict[str, Any]]]:
    """What the first block is called with."""
    found: list[tuple[Tensor, dict[str, Any]]] = []

    class Enough(Exception):  # noqa: N818
        pass

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        found.append((hidden, {k: v for k, v in kwargs.items() if k != "hidden_states"}))
        raise Enough

    hook = module.model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    for part in torch.from_numpy(windows).long().split(BATCH):
        with contextlib.suppress(Enough):
            module(part, use_cache=False)
    hook.remove()
    return found
