"""Memory at its peak, in bytes: of training and of serving, in parts.

For the whole model; who shards it divides the parts. Knows no devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from joulesmith.errors import JoulesmithError
from joulesmith.estimate.model.shape import Block, Shape
from joulesmith.estimate.model.work import (
    Recompute,
    Targets,
    adapter_weights,
    bits_of,
    cache_bytes,
    check_number,
    weight_bytes,
)

OPTIMIZERS = {"adamw": 8.0, "adamw8bit": 2.0, "sgd": 0.0, "momentum": 4.0, "adafactor": 0.0}
"""Bytes of an optimizer's moments per trained weight. Adafactor keeps a row and a column
of each matrix (arXiv 1804.04235), too little to count; adamw8bit is arXiv 2110.02861."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes. optimizer: moments and, in mixed precision, the float32 weights."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True)
class ServingMemory:
    """Bytes. activations: of the tokens of one step, in one block, and the logits."""

    weights: float
    cache: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.activations


def training_memory(
    shape: Shape,
    *,
    sequence: int,
    batch: float = 1,
    recompute: Recompute = "none",
    optimizer: str = "adamw",
    bits: float = 16,
    dropout: bool = False,
    lora_rank: int | None = None,
    targets: Targets = "all",
) -> TrainingMemory:
    """Memory of training on ``batch`` sequences at a time.

    bits: of weights; gradients and activations have as many, 16 at least. Below 32 a
    float32 copy of what is trained counts with the optimizer: 16 bytes per weight with
    AdamW (ZeRO, arXiv 1910.02054, section 3.1). lora_rank: only adapters of that rank are
    trained, kept in 16 bits; activations count as if all were. dropout: as in GPT, see
    `block_activations`.
    recompute: "none" keeps attention scores; "selective" computes them again, as fused
    attention does; "full" keeps each block's input and one block's insides.
    """
    if optimizer not in OPTIMIZERS:
        raise JoulesmithError(
            f"optimizer {str(optimizer)[:40]!r}: give one of {', '.join(OPTIMIZERS)}"
        )
    stored, live = bits_of(bits), max(16.0, bits_of(bits)) / 8
    trained: float = shape.parameters
    weights = weight_bytes(shape, stored)
    if lora_rank is not None:
        trained = adapter_weights(shape, lora_rank, targets)
        weights += trained * live
    master = 4 if live < 4 else 0
    tokens = batch * sequence
    activations = activation_bytes(
        shape, sequence=sequence, batch=batch, recompute=recompute, dropout=dropout
    )
    return TrainingMemory(
        weights=weights,
        gradients=trained * live,
        optimizer=trained * (OPTIMIZERS[optimizer] + master),
        activations=activations * live / 2,
        # the last norm's and the head's input, and the logits in float32
        logits=tokens * (2 * live * shape.hidden + 4 * shape.vocab),
    )


def activation_bytes(
    shape: Shape,
    *,
    sequence: int,
    batch: float = 1,
    recompute: Recompute = "none",
    dropout: bool = False,
) -> float:
    """Bytes of activations that blocks keep for the backward pass, in 16 bits.

    Korthikanti et al. 2022 (arXiv 2205.05198): eq. 2 for "none", s b h (34 + 5 a s / h) a
    layer in their GPT; section 5 for "selective", 34 s b h; "full" 2 s b h a layer and
    once the insides of the largest block, which are there while it is computed again.
    """
    if recompute not in get_args(Recompute):
        raise JoulesmithError(f"recompute {str(recompute)[:40]!r}: give none, selective or full")
    check_number(sequence, "sequence")
    check_number(batch, "batch")
    scores = recompute == "none"
    each = [
        (block_activations(b, shape.hidden, sequence, scores=scores, dropout=dropout), n)
        for b, n in shape.groups
    ]
    if recompute == "full":
        kept = 2.0 * shape.hidden * shape.layers + max(size for size, _ in each)
    else:
        kept = sum(n * size for size, n in each)
    return kept * sequence * batch


def block_activations(
    block: Block, hidden: int, sequence: int, *, scores: bool, dropout: bool
) -> float:
    """Bytes per token that one block keeps, in 16 bits; eq. 2's terms one by one, so that
    shared keys and values, gates, experts and narrow heads count as what they are.

    Kept are the inputs of norms and of products, queries, keys, values, what leaves
    attention, and the MLP's neurons: before and after the activation, and the other branch
    of a gate. scores: softmax's output, 2 bytes for each head and key; with dropout 5 with
    its mask and result. dropout: 1 byte of mask for what leaves attention and the MLP.
    """
    mixer, ffn = block.mixer, block.ffn
    mask = hidden if dropout else 0
    total = 0.0
    if mixer.kind != "none":
        total += 2 * (2 * hidden + mixer.saved) + mask
        if scores:
            total += (5 if dropout else 2) * mixer.heads * sequence
    if ffn.width or ffn.experts:
        neurons = 3 if ffn.gated else 2
        total += 2 * (2 * hidden + neurons * ffn.width) + mask
        # each token's copies on their way to its experts and back
        total += 2 * ffn.chosen * (2 * hidden + neurons * ffn.expert_width)
    return total


def serving_memory(
    shape: Shape,
    *,
    batch: float,
    context: float,
    bits: float | None = None,
    cache_bits: float = 16,
    step_tokens: int = 2048,
) -> ServingMemory:
    """Memory of serving ``batch`` sequences of ``context`` tokens.

    bits: of weights, None as given. step_tokens: taken in at once, at most, in prefill;
    decode takes ``batch``.
    """
    check_number(batch, "batch")
    check_number(step_tokens, "step_tokens")
    tokens = max(batch, min(step_tokens, context))
    widest = max(
        b.mixer.saved + max(3 * b.ffn.width, b.ffn.chosen * (shape.hidden + 3 * b.ffn.expert_width))
        for b, _ in shape.groups
    )
    return ServingMemory(
        weights=weight_bytes(shape, bits),
        cache=batch * cache_bytes(shape, context, cache_bits),
        activations=2 * tokens * (2 * shape.hidden + widest) + 4 * batch * shape.vocab,
    )
