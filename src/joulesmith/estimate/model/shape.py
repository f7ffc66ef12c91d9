"""The shape of a language model, counted: its weights, those that one token multiplies,
and what is kept of a token.

Knows no file formats, no devices and no joules: `work` turns a shape into bytes and FLOPs,
`hub_config`, `header` and `plain` make one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Mixer:
    """How a block mixes tokens. Weights, elements and FLOPs as plain counts.

    kind: "full", "window", "latent" (MLA), "linear" (a constant state) or "none".
    matrices: weights multiplied with each token. vectors: norms, biases, short
    convolutions. sides: inputs plus outputs over the matrices, so that LoRA adapters of
    rank r on them hold r * sides weights.
    cache: elements kept per token in reach. window: tokens in reach, None for all.
    state: elements kept per sequence, whatever its length. heads: score matrices of a
    sequence. pair: FLOPs of one query and one key in prefill and training; pair_decode:
    in decode. step: FLOPs per token of the state. saved: elements per token that the
    backward pass needs, without inputs and scores.
    """

    kind: str
    matrices: int = 0
    vectors: int = 0
    sides: int = 0
    cache: int = 0
    window: int | None = None
    state: int = 0
    heads: int = 0
    pair: int = 0
    pair_decode: int = 0
    step: int = 0
    saved: int = 0


@dataclass(frozen=True)
class FeedForward:
    """The other half of a block: an MLP, or a mixture of experts, or nothing.

    matrices: weights multiplied with each token: the MLP, or the router and the shared
    experts. width: hidden neurons of those. experts, chosen: how many there are and how
    many a token meets; expert: weights of one's matrices. sides: as `Mixer`'s.
    """

    matrices: int = 0
    vectors: int = 0
    sides: int = 0
    width: int = 0
    gated: bool = True
    experts: int = 0
    chosen: int = 0
    expert: int = 0
    expert_vectors: int = 0
    expert_sides: int = 0
    expert_width: int = 0


@dataclass(frozen=True)
class Block:
    """One layer. vectors: its norms."""

    mixer: Mixer
    ffn: FeedForward
    vectors: int = 0

    @property
    def multiplied(self) -> int:
        """Weights that one token multiplies."""
        return self.mixer.matrices + self.ffn.matrices + self.ffn.chosen * self.ffn.expert

    @property
    def matrices(self) -> int:
        """Weights of matrices outside the experts."""
        return self.mixer.matrices + self.ffn.matrices

    @property
    def experts(self) -> int:
        """Weights of the matrices of all its experts."""
        return self.ffn.experts * self.ffn.expert

    @property
    def small(self) -> int:
        """Weights of norms, biases and the like."""
        f = self.ffn
        return self.vectors + self.mixer.vectors + f.vectors + f.experts * f.expert_vectors


@dataclass(frozen=True)
class Latent:
    """Ranks and sizes of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    q_rank: None where queries are not compressed.
    """

    kv_rank: int
    q_rank: int | None
    nope: int
    rope: int
    value: int


@dataclass(frozen=True)
class Stored:
    """Bytes of the weights as they are given, by what reads them.

    head: 0 where it is the embedding. vectors: norms, biases and the like.
    """

    embedding: int
    head: int
    matrices: int
    experts: int
    vectors: int

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.matrices + self.experts + self.vectors


@dataclass(frozen=True)
class Shape:
    """A decoder-only language model, counted.

    kind: the architecture's name. heads, kv_heads, head_dim, ffn: of the most usual block
    (0 where it has none). context: the longest sequence, None if unknown. embedding:
    weights of tables that are looked up (tokens, learned positions). head: weights
    multiplied for a token's logits, the embedding's own where tied. outside: other
    matrices outside blocks. vectors: norms and biases outside blocks. stored: bytes as
    given, None where only a shape is known. products: precision that the checkpoint's own
    quantization multiplies in, "fp8" or "int8"; None where it quantizes weights alone. notes:
    what was not counted or is a guess. assumed: numbers that nobody gave, each with its rule.
    """

    name: str
    kind: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    context: int | None
    blocks: tuple[Block, ...]
    embedding: int
    head: int
    outside: int = 0
    vectors: int = 0
    latent: Latent | None = None
    stored: Stored | None = None
    products: str | None = None
    notes: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        return len(self.blocks)

    @cached_property
    def groups(self) -> tuple[tuple[Block, int], ...]:
        """Each different block and how many there are of it."""
        return tuple(Counter(self.blocks).items())

    @cached_property
    def matrices(self) -> int:
        """Weights of matrices that every token multiplies, without the head."""
        return self.outside + sum(n * b.matrices for b, n in self.groups)

    @cached_property
    def expert_weights(self) -> int:
        """Weights of the matrices of all experts."""
        return sum(n * b.experts for b, n in self.groups)

    @cached_property
    def small(self) -> int:
        """Weights of all norms, biases and the like."""
        return self.vectors + sum(n * b.small for b, n in self.groups)

    @cached_property
    def parameters(self) -> int:
        """All weights, a tied head counted once."""
        head = 0 if self.tied else self.head
        return self.embedding + head + self.matrices + self.expert_weights + self.small

    @cached_property
    def active(self) -> int:
        """Weights that one token uses, as model cards count: all but the experts it does
        not meet, the embedding included."""
        idle = (
            n * (b.ffn.experts - b.ffn.chosen) * (b.ffn.expert + b.ffn.expert_vectors)
            for b, n in self.groups
        )
        return self.parameters - sum(idle)

    @cached_property
    def multiplied(self) -> int:
        """Weights that one token multiplies: twice this is its FLOPs before attention. The
        head counts, tied or not; the embedding, which is looked up, does not."""
        return self.outside + self.head + sum(n * b.multiplied for b, n in self.groups)

    @property
    def experts(self) -> int:
        """Experts of a layer of experts; 0 for a dense model."""
        return max(b.ffn.experts for b, _ in self.groups)

    @property
    def chosen(self) -> int:
        """Experts that one token meets in a layer of experts, shared ones not counted."""
        return max(b.ffn.chosen for b, _ in self.groups)

    @property
    def expert_layers(self) -> int:
        return sum(n for b, n in self.groups if b.ffn.experts)

    @property
    def gated(self) -> bool:
        """Whether MLPs have a gate: three matrices instead of two."""
        return any(b.ffn.gated for b, _ in self.groups)

    @property
    def attention(self) -> tuple[str, ...]:
        """Each layer's kind: "full", "window", "latent", "linear" or "none"."""
        return tuple(b.mixer.kind for b in self.blocks)

    @property
    def bits_per_weight(self) -> float | None:
        """Of the weights as given; None where only a shape is known."""
        return None if self.stored is None else 8 * self.stored.total / self.parameters


def stored_at(
    shape: Shape,
    *,
    rest: float = 16,
    table: float | None = None,
    blocks: float | None = None,
    experts: float | None = None,
) -> Stored:
    """Bytes at so many bits per weight: ``table`` for embedding and head, ``blocks`` for
    matrices in blocks, ``experts`` for those of experts (as ``blocks`` when None), ``rest``
    for everything else and what is not told."""
    inside = rest if blocks is None else blocks
    tables = rest if table is None else table

    def n(weights: int, bits: float) -> int:
        return round(weights * bits / 8)

    return Stored(
        embedding=n(shape.embedding, tables),
        head=0 if shape.tied else n(shape.head, tables),
        matrices=n(shape.matrices, inside),
        experts=n(shape.expert_weights, inside if experts is None else experts),
        vectors=n(shape.small, rest),
    )
