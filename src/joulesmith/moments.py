"""Second moments of a linear layer's inputs and output gradients, summed as they come.

Knows linear layers and the head; not how their inputs are got.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Moments:
    """Second moments at one linear layer, means over ``tokens`` calibration tokens.

    hessian: (columns, columns) E[s x x^T] of the layer's inputs x, float32, with s of mean 1:
             half of it the same for all tokens, half the token's mean squared output
             gradient (GuidedQuant, Kim et al. 2025, eq. 7, one group), so that tokens count
             as the end loss depends on them, and yet no few of them decide. Where part of the
             text has gradients s is 1, and layers with the same inputs share one tensor
    squares: (columns,) E[x^2], unweighted: llama.cpp's importance matrix
    fisher:  (rows,) E[g^2] of the output gradients over the tokens that have them, float32
    sample:  some tokens as they came, for what second moments cannot tell
    outputs: (rows, rows) E[g g^T], float32, where it was asked for; None elsewhere
    ends:    (2, columns) least and largest input of each column over all tokens
    """

    hessian: torch.Tensor
    squares: torch.Tensor
    fisher: torch.Tensor
    tokens: int
    sample: Sample | None = None
    outputs: torch.Tensor | None = None
    ends: torch.Tensor | None = None


@dataclass(frozen=True)
class Sample:
    """Inputs and output gradients of one linear layer on whole windows spread over the text.

    x:    (n, columns) inputs, float32
    g:    (n, rows) gradients of -log p(drawn) at the outputs; None for the head, whose rows
          are too many
    pull: (n, columns) g W, the gradients at the inputs through this layer alone, where g is
          None
    """

    x: torch.Tensor
    g: torch.Tensor | None
    pull: torch.Tensor | None = None


@dataclass(frozen=True)
class HeadMoments:
    """Moments of the embedding and of the output head.

    head:            inputs are the final norm's outputs; ``fisher`` is exact, E[p (1 - p)]
    input_fisher:    (hidden,) E[g^2] of the gradients at the embedding's output
    token_share:     (vocab,) share of calibration tokens that are each token
    """

    head: Moments
    input_fisher: torch.Tensor
    token_share: torch.Tensor


class InputSums:
    """Sums over a linear layer's inputs; layers that read the same inputs may share them."""

    def __init__(self, columns: int) -> None:
        import torch

        self.weighted = torch.zeros(columns, columns)
        self.squares = torch.zeros(columns)
        self.ends: torch.Tensor | None = None
        self.weight = 0.0
        self.tokens = 0
        self.kept: list[torch.Tensor] = []

    def add(self, x: torch.Tensor, s: torch.Tensor | None) -> None:
        """x (tokens, columns), s (tokens,) their weights, None for 1."""
        import torch

        root = x if s is None else x * s.sqrt()[:, None]
        self.weighted.addmm_(root.T, root)
        self.squares += x.square().sum(dim=0)
        self.weight += len(x) if s is None else float(s.sum())
        self.tokens += len(x)
        low, high = x.amin(dim=0), x.amax(dim=0)
        if self.ends is not None:
            low, high = torch.minimum(low, self.ends[0]), torch.maximum(high, self.ends[1])
        self.ends = torch.stack([low, high])

    def hessian(self) -> torch.Tensor:
        """The weighted mean; made in place, so that one tensor is all there is of it."""
        if self.weight > 0:
            self.weighted /= self.weight
            self.weight = 1.0
        return self.weighted


class Accumulator:
    """Streams one linear layer's inputs and output gradients into moments.

    inputs: sums that are complete already; else they are added up here.
    """

    def __init__(
        self, rows: int, columns: int, outputs: bool = False, inputs: InputSums | None = None
    ) -> None:
        import torch

        self.ready = inputs is not None
        self.inputs = InputSums(columns) if inputs is None else inputs
        self.outputs = torch.zeros(rows, rows) if outputs else None
        self.fisher = torch.zeros(rows)
        self.graded = 0
        self.g: list[torch.Tensor] = []
        self.pull: list[torch.Tensor] = []

    def add(self, x: torch.Tensor, g: torch.Tensor) -> None:
        """x (tokens, columns), g (tokens, rows)."""
        g2 = g.square()
        self.grade(g2.sum(dim=0), len(g))
        if self.outputs is not None:
            self.outputs.addmm_(g.T, g)
        if not self.ready:
            s = g2.mean(dim=1)
            # Gradients have heavy tails: without the 1, a few tokens are most of the sum.
            self.inputs.add(x, s / s.mean().clamp_min(1e-30) + 1)

    def grade(self, fisher: torch.Tensor, tokens: int) -> None:
        """fisher (rows,), sums over so many tokens."""
        self.fisher += fisher
        self.graded += tokens

    def keep(self, g: torch.Tensor | None, pull: torch.Tensor | None = None) -> None:
        """Put gradients of some tokens by, as `Sample` has them; ``inputs.kept`` has the rest."""
        for values, kept in ((g, self.g), (pull, self.pull)):
            if values is not None:
                kept.append(values)

    def sample(self) -> Sample | None:
        """The tokens that were kept."""
        x = _joined(self.inputs.kept)
        return None if x is None else Sample(x, _joined(self.g), _joined(self.pull))

    def done(self) -> Moments:
        """The means over all that was added."""
        graded = max(self.graded, 1)
        return Moments(
            self.inputs.hessian(),
            self.inputs.squares / max(self.inputs.tokens, 1),
            self.fisher / graded,
            self.inputs.tokens,
            self.sample(),
            None if self.outputs is None else self.outputs / graded,
            self.inputs.ends,
        )


def _joined(kept: list[torch.Tensor]) -> torch.Tensor | None:
    """All of them in one; None for none. The list then holds that one, which others may share."""
    import torch

    if len(kept) > 1:
        kept[:] = [torch.cat(kept)]
    return kept[0] if kept else None


class HeadSums:
    """Moments of the head, in slices of tokens: logits of a whole batch never stand at once.

    weigh: whether inputs are summed here, tokens weighed by the spread of what they predict.
    """

    def __init__(self, vocab: int, hidden: int, weigh: bool) -> None:
        self.sums, self.weigh = Accumulator(vocab, hidden), weigh

    def add(
        self, x: torch.Tensor, head: torch.nn.Module, generator: torch.Generator, rows: int = 128
    ) -> torch.Tensor:
        """x (tokens, hidden) -> gradient of -log p(sampled) with respect to x, same shape."""
        import torch

        out = torch.empty_like(x)
        weight: torch.Tensor = head.weight  # type: ignore[assignment]
        for start in range(0, len(x), rows):
            part = x[start : start + rows]
            p = head(part).float()
            torch.softmax(p, dim=-1, out=p)
            drawn, spare = drawn_from(p, generator)
            square = torch.mul(p, p, out=spare)
            # The sums of p (1 - p), over words and over tokens.
            spread = (1 - square.sum(dim=1)) / p.shape[1]
            if self.weigh:
                self.sums.inputs.add(part, spread.clamp_min_(0))
            self.sums.grade(p.sum(dim=0) - square.sum(dim=0), len(part))
            p.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=p.dtype))
            out[start : start + rows] = p @ weight
        return out


def drawn_from(p: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """p (n, words), rows of probabilities -> a word drawn from each, (n, 1); and p's sums so far.

    By the inverse of the distribution, which takes one random number a row:
    ``torch.multinomial`` takes one a word, and with 49,000 words that is most of the time.
    """
    import torch

    below = p.cumsum(dim=-1)
    at = torch.rand(len(p), 1, generator=generator) * below[:, -1:]
    # right: a random number of 0 does not draw a word of probability 0.
    return torch.searchsorted(below, at, right=True).clamp_(max=p.shape[1] - 1), below
