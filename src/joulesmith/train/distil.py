"""Knowledge distillation as an objective of the loop: a student is pulled towards a teacher that is
there, or whose predictions are kept (`teacher`).

Which losses and how much of each is told by `DistilSettings`; the losses themselves are in
`losses`. Knows no optimizer and no files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from joulesmith.errors import JoulesmithError
from joulesmith.train import checkpoint, losses
from joulesmith.train.outputs import Outputs, device_of, even_spread, run
from joulesmith.train.recover_settings import DistilSettings, Divergence
from joulesmith.train.sample import continuations
from joulesmith.train.teacher import TopK
from joulesmith.vocab import Tokenizer

_PROBE = "Joules, 12.5 kWh; naïve “Ωμέγα” 東京\n\n\tdef f(x):\r\n    return x  # 👍🏽 don't   stop"
"""What two tokenizers are likely to cut apart differently."""


class Distil:
    """The loss of `settings` as an `Objective`, nats a token (and shares of squares) as weighted.

    teacher: what gives logits, in eval mode and without gradients from here on; not the student.
    cache: its most likely tokens of the windows that are trained on, in the place of logits on
    them. vocab: how many tokens both models' tokenizer has; logits beyond are of no token and left
    out of divergences; default the narrower model's. eos: what ends a sampled text.

    A window of n tokens is n - 1 predictions; all count. Of sampled text those of the continuation
    count, up to its end. Raises `JoulesmithError` for settings that need a teacher that is not
    there, and when called for models that do not give what is to be matched, or do not match.
    """

    def __init__(
        self,
        settings: DistilSettings,
        *,
        teacher: nn.Module | None = None,
        cache: TopK | None = None,
        vocab: int | None = None,
        eos: int | None = None,
    ) -> None:
        self.settings, self.teacher, self.cache = settings, teacher, cache
        self.vocab, self.eos = vocab, eos
        s = settings
        if teacher is not None:
            teacher.eval()
        if s.soft and teacher is None and cache is None:
            raise JoulesmithError("distillation needs a teacher, or a cache of its predictions")
        if teacher is None and (s.hidden or s.attention or s.on_policy):
            raise JoulesmithError(
                "a cache has no hidden states, no attention and nothing of sampled text: give the "
                "teacher itself"
            )
        if s.soft and cache is not None and s.divergence == "reverse":
            raise JoulesmithError(
                "a cache of the likeliest tokens serves the forward divergence only: give the "
                "teacher itself for the reverse one"
            )

    def __call__(self, module: nn.Module, tokens: Tensor, places: NDArray[np.int64]) -> Tensor:
        """tokens: int64 (n, length); places: which windows they are, in the cache."""
        if module is self.teacher:
            raise JoulesmithError("teacher and student are one module: load the teacher apart")
        s = self.settings
        tokens = tokens.to(device_of(module))
        if s.on_policy and self._drawn(tokens.device):
            return s.soft * self._on_policy(module, tokens)
        cached = s.soft > 0 and self.cache is not None
        inside = {"hidden": s.hidden > 0, "attention": s.attention > 0}
        mine = run(module, tokens[:, :-1], **inside)
        total = torch.zeros((), device=tokens.device)
        if cached:
            total = total + self._cached(mine.logits, tokens, places)
        elif s.hard:
            total = total + s.hard * losses.hard(mine.logits, tokens[:, 1:])
        if (s.soft and not cached) or any(inside.values()):
            other = self._taught(tokens[:, :-1], **inside)
            if s.soft and not cached:
                total = total + s.soft * self._divergence(mine.logits, other.logits, s.divergence)
            if s.hidden:
                found = self._matched(losses.hidden, mine.hidden[1:], other.hidden[1:])
                total = total + s.hidden * found
            if s.attention:
                found = self._matched(losses.attention, mine.attention, other.attention)
                total = total + s.attention * found
        return total

    def _taught(self, tokens: Tensor, *, hidden: bool = False, attention: bool = False) -> Outputs:
        assert self.teacher is not None
        with torch.no_grad():
            return run(self.teacher, tokens, hidden=hidden, attention=attention)

    def _divergence(self, mine: Tensor, other: Tensor, which: Divergence) -> Tensor:
        """Logits (..., vocab) of student and teacher, whose widths may differ."""
        width = self._width(min(mine.shape[-1], other.shape[-1]))
        f = losses.soft if which == "forward" else losses.reverse
        return f(mine[..., :width], other[..., :width], self.settings.temperature)

    def _width(self, most: int) -> int:
        if self.vocab is not None and self.vocab > most:
            raise JoulesmithError(
                f"{most} logits for a vocabulary of {self.vocab} tokens: teacher and student must "
                "have the same tokenizer"
            )
        return self.vocab or most

    def _cached(self, mine: Tensor, tokens: Tensor, places: NDArray[np.int64]) -> Tensor:
        """The losses of teacher and text, weighed."""
        assert self.cache is not None
        soft, hard, labels = self.settings.soft, self.settings.hard, tokens[:, 1:]
        vocab, t = self.cache.layout.vocab, self.settings.temperature
        if vocab > mine.shape[-1] or self.vocab not in (None, vocab):
            raise JoulesmithError(
                f"a cache of a vocabulary of {vocab} tokens for a student of "
                f"{self.vocab or mine.shape[-1]}: they must have the same tokenizer"
            )
        self.cache.check(places, tokens.cpu().numpy())
        ids, values = (x.to(mine.device) for x in self.cache.read(places))
        if hard and t == 1 and vocab == mine.shape[-1]:  # both in one pass over logits
            return soft * losses.soft_top(mine, ids, values, t, vocab, labels, hard / soft)
        found = soft * losses.soft_top(mine[..., :vocab], ids, values, t, vocab)
        return found + hard * losses.hard(mine, labels) if hard else found

    def _matched(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        mine: tuple[Tensor, ...],
        other: tuple[Tensor, ...],
    ) -> Tensor:
        """Mean over the pairs of what layers give."""
        student, teacher = len(mine), len(other)
        pairs = self.settings.layers
        if pairs is None:
            pairs = even_spread(student, teacher)
        if not pairs:
            raise JoulesmithError("no layers to match: give pairs, or none for an even spread")
        for i, j in pairs:
            if not (1 <= i <= student and 1 <= j <= teacher):
                raise JoulesmithError(
                    f"layers {i} and {j} cannot be matched: the student has 1 to {student}, the "
                    f"teacher 1 to {teacher}"
                )
        return torch.stack([loss(mine[i - 1], other[j - 1]) for i, j in pairs]).mean()

    def _drawn(self, device: torch.device) -> bool:
        """Whether this pass is on sampled text; the same on all ranks, who pass together."""
        draw = torch.rand((), device=device)
        if checkpoint.world() > 1:
            torch.distributed.broadcast(draw, 0)
        return bool(draw < self.settings.on_policy)

    def _on_policy(self, module: nn.Module, tokens: Tensor) -> Tensor:
        """GKD (Agarwal et al. 2024, algorithm 1): no gradient passes through what was drawn."""
        s, length = self.settings, tokens.shape[1]
        start = s.prompt or length // 2
        count = min(s.continuation or length - start, length - start)
        if count < 1:
            raise JoulesmithError(
                f"a prompt of {start} tokens leaves nothing of windows of {length}: give a shorter"
            )
        config: Any = getattr(self.teacher, "config", None)
        known = self.vocab or getattr(config, "vocab_size", None)  # what the teacher can read
        rows, counted = continuations(module, tokens[:, :start], count, eos=self.eos, vocab=known)
        # older autocasts keep weights cast without a gradient for the pass that wants one
        # (pytorch/pytorch#158232)
        torch.clear_autocast_cache()
        mine = run(module, rows[:, :-1]).logits[:, start - 1 :][counted]
        other = self._taught(rows[:, :-1]).logits[:, start - 1 :][counted]
        return self._divergence(mine, other, s.on_policy_divergence)


def check_tokenizers(student: Tokenizer, teacher: Tokenizer) -> int:
    """How many tokens their tokenizer has; `JoulesmithError` where they have two."""
    mine, other = (t.backend.get_vocab(with_added_tokens=True) for t in (student, teacher))
    why = ""
    if len(mine) != len(other):
        why = f"{len(mine)} and {len(other)} tokens"
    elif mine != other:
        first = min((i, t) for t, i in mine.items() if other.get(t) != i)
        why = f"token {first[0]} is {first[1][:40]!r} in the student's alone"
    elif (student.bos, student.eos) != (teacher.bos, teacher.eos):
        why = f"BOS and EOS are {student.bos}, {student.eos} and {teacher.bos}, {teacher.eos}"
    elif student.encode(_PROBE) != teacher.encode(_PROBE):
        why = "they cut the same text differently"
    if why:
        raise JoulesmithError(
            f"teacher and student have different tokenizers: {why}: take a teacher of the "
            "student's family"
        )
    return int(max(mine.values())) + 1
