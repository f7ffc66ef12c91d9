"""What a change of blocks does to a model's predictions: KL divergence on held-out windows.

The dense model's log-probabilities wait on disk (float16); in memory are the hidden states of
the held-out windows, a few thousand tokens, and one slice of logits. Knows blocks and windows;
not how the blocks came about.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from joulesmith.calibrate import enter, first
from joulesmith.errors import JoulesmithError

BATCH = 4
ROWS = 512
"""Rows of logits made at once."""


class Judge:
    """Mean KL(dense || changed) in nats per token on fixed windows.

    module: the dense causal LM, unchanged while this is in use. windows: int32 (n, length).
    scratch: an existing folder, for (n length, vocab) float16.
    """

    def __init__(self, module: Any, windows: NDArray[np.int32], scratch: Path) -> None:
        self.module, self.scratch = module, scratch
        inner = module.model
        self.start: list[Tensor] = []
        self.tokens: list[Tensor] = []
        self.calls: dict[int, dict[str, Any]] = {}
        tokens = torch.from_numpy(np.ascontiguousarray(windows)).long()
        with torch.no_grad():
            for part in torch.split(tokens, BATCH):
                hidden, kwargs = enter(inner, inner.layers[0], part)
                self.calls.setdefault(len(hidden), kwargs)
                self.start.append(hidden)
                self.tokens.append(part)
            states = self.run(inner.layers, self.start)
            for b, x in enumerate(states):
                logits = [self._logp(p, inner.norm, module.lm_head) for p in _slices(x)]
                whole = torch.cat([p.clamp_min(-6e4).half() for p in logits])
                np.save(self.scratch / f"dense-{b}.npy", whole.numpy())

    def run(self, blocks: Iterable[nn.Module], states: Sequence[Tensor]) -> list[Tensor]:
        """Hidden states behind these blocks."""
        now = list(states)
        with torch.no_grad():
            for block in blocks:
                now = [first(block(x, **self.calls[len(x)])) for x in now]
        return now

    def entered(self, embed: Tensor) -> list[Tensor]:
        """What enters the first block where the embedding (vocab, width) is another."""
        return [embed[t] for t in self.tokens]

    def kl(self, states: Sequence[Tensor], norm: Any = None, head: Any = None) -> float:
        """Of hidden states behind the last block; norm, head: where they are not the dense's.

        Infinite where a probability is not finite.
        """
        norm = self.module.model.norm if norm is None else norm
        head = self.module.lm_head if head is None else head
        total, tokens = 0.0, 0
        with torch.no_grad():
            for b, x in enumerate(states):
                dense = np.load(self.scratch / f"dense-{b}.npy", mmap_mode="r", allow_pickle=False)
                at = 0
                for part in _slices(x):
                    q = self._logp(part, norm, head)
                    p = torch.from_numpy(np.array(dense[at : at + len(q)], np.float32))
                    total += float((p.exp() * (p - q)).sum())
                    at += len(q)
                tokens += at
        found = total / tokens
        return found if math.isfinite(found) else math.inf

    def of(
        self,
        blocks: Iterable[nn.Module],
        states: Sequence[Tensor] | None = None,
        norm: Any = None,
        head: Any = None,
    ) -> float:
        """KL of the model with these blocks, from the start or from ``states`` before them."""
        return self.kl(self.run(blocks, self.start if states is None else states), norm, head)

    def _logp(self, hidden: Tensor, norm: Any, head: Any) -> Tensor:
        found: Tensor = head(norm(hidden)).float().log_softmax(dim=-1)
        return found


def _slices(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x.flatten(0, 1), ROWS)


def split(
    windows: NDArray[np.int32], held: int | None = None
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Windows to fit on and windows to judge by; ``held`` None: one in eight, at most 8, spread
    evenly. Raises `JoulesmithError` for fewer than 2 windows."""
    if windows.ndim != 2 or len(windows) < 2:
        raise JoulesmithError("shrinking needs 2 calibration windows or more: one is held out")
    n = len(windows)
    count = max(1, min(8, n // 8)) if held is None else held
    at = np.unique(np.linspace(0, n - 1, count).round().astype(int))
    rest = np.setdiff1d(np.arange(n), at)
    return windows[rest], windows[at]
