"""What a student writes itself: continuations of prompts by ancestral sampling.

Draws come from torch's own generator, which the loop seeds at each step. Knows no teacher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from joulesmith.models import cache_word
from joulesmith.train.outputs import run


@torch.no_grad()
def continuations(
    module: nn.Module,
    prompts: Tensor,
    count: int,
    *,
    eos: int | None = None,
    vocab: int | None = None,
) -> tuple[Tensor, Tensor]:
    """prompts int64 (n, p) -> tokens (n, p + count), and which of the ``count`` new ones count,
    bool (n, count): those up to the first ``eos``, itself included.

    At temperature 1, in eval mode, of what ranks replicate (DDP) this one's copy; only
    the first ``vocab`` tokens are drawn.
    """
    module = getattr(module, "replica", module)
    training = module.training
    module.eval()
    try:
        rows = prompts
        alive = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
        counted = []
        read = _Reader(module)
        for _ in range(count):
            drawn = torch.multinomial(read(rows)[:, :vocab].float().softmax(-1), 1)
            rows = torch.cat([rows, drawn], 1)
            counted.append(alive)
            if eos is not None:
                alive = alive & (drawn[:, 0] != eos)
        return rows, torch.stack(counted, 1)
    finally:
        module.train(training)


class _Reader:
    """The logits after the last token, with a key-value cache where the module has one."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        config: Any = getattr(module, "config", None)
        self.word = cache_word(module) if hasattr(config, "use_cache") else None
        self.cache: Any = None
        self.seen = 0

    def __call__(self, rows: Tensor) -> Tensor:
        """(n, so far) -> (n, vocab)."""
        if self.word is None:
            return run(self.module, rows).logits[:, -1]
        given: dict[str, Any] = {} if self.cache is None else {self.word: self.cache}
        out: Any = self.module(input_ids=rows[:, self.seen :], use_cache=True, **given)
        self.cache = getattr(out, self.word, None)
        self.seen = 0 if self.cache is None else rows.shape[1]
        found: Tensor = out.logits[:, -1]
        return found
