"""What a model of a shape has to do: bytes it reads, bytes it keeps, FLOPs it computes.

Pure functions. A product of an (m, k) and a (k, n) matrix is 2 m k n FLOPs; lookups, norms
and softmax count none. Contexts and tokens are counts, bits are per element. Knows no
devices, no seconds and no joules; memory at its peak is in `peak`.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

from joulesmith.errors import JoulesmithError
from joulesmith.estimate.model.shape import Mixer, Shape, Stored, stored_at

Recompute = Literal["none", "selective", "full"]
Targets = Literal["all", "attention"]

BITS = {
    "fp32": 32.0, "tf32": 32.0, "bf16": 16.0, "fp16": 16.0, "bfloat16": 16.0, "float16": 16.0,
    "float32": 32.0, "fp8": 8.0, "int8": 8.0, "int4": 4.0, "fp4": 4.0, "mxfp8": 8.25,
    "mxfp4": 4.25, "nvfp4": 4.5, "q8_0": 8.5, "q6_k": 6.5625, "q5_k": 5.5, "q4_k": 4.5,
    "q4_0": 4.5, "q3_k": 3.4375, "q2_k": 2.625,
}  # fmt: skip
"""Bits per weight with scales and zero points: ggml's blocks and OCP's microscaling formats."""

STATE_BITS = 32
"""A recurrent state stays in float32, whatever the precision of keys and values."""


def bits_of(precision: str | float) -> float:
    """Bits per weight: a number from 1 to 64, or a name such as "bf16" or "q4_k".

    Raises `JoulesmithError` for anything else, with the names.
    """
    bits = precision
    if isinstance(bits, str):
        found = BITS.get(bits.strip().lower())
        if found is not None:
            return found
        try:
            bits = float(bits)
        except ValueError:
            bits = math.nan
    if isinstance(bits, bool) or not 1 <= bits <= 64:
        raise JoulesmithError(
            f"precision {str(precision)[:40]}: give bits per weight from 1 to 64, or one of "
            f"{', '.join(BITS)}"
        )
    return float(bits)


def weight_bytes(shape: Shape, bits: float | None = None) -> float:
    """Bytes of all weights, a tied head counted once.

    bits: per weight of every matrix; norms and biases stay at 16 at least. None: as given
    (a GGUF's own bytes), or 16 where only a shape is known.
    """
    return _stored(shape, bits).total


def step_bytes(shape: Shape, batch: float = 1, bits: float | None = None) -> float:
    """Bytes of weights read in one decode step of ``batch`` sequences: the dense parts and
    the head once, and of the experts those that any of the tokens meets.

    A prefill of n tokens in one pass reads ``step_bytes(shape, n)``. Rows of the embedding
    are too few to count. bits: as in `weight_bytes`.
    """
    stored = _stored(shape, bits)
    head = stored.embedding if shape.tied else stored.head
    if shape.tied and shape.embedding > shape.head:  # learned positions lie in the same table
        head = round(head * shape.head / shape.embedding)
    met = weights = 0.0
    for block, n in shape.groups:
        f = block.ffn
        weights += n * block.experts
        met += n * f.expert * experts_met(f.experts, f.chosen, batch)
    experts = stored.experts * met / weights if weights else 0.0
    return head + stored.matrices + stored.vectors + experts


def experts_met(experts: int, chosen: int, tokens: float) -> float:
    """Different experts that ``tokens`` tokens meet, expected: E (1 - (1 - k/E)^tokens).

    Takes experts as equally likely and tokens as independent; real routing is skewed, so
    that it meets somewhat fewer.
    """
    check_number(tokens, "batch")
    if not experts:
        return 0.0
    if chosen >= experts:
        return float(experts)
    return -experts * math.expm1(tokens * math.log1p(-chosen / experts))


def cache_bytes_per_token(shape: Shape, bits: float = 16) -> float:
    """Bytes that one more token of a sequence keeps, before windows are full."""
    return sum(n * b.mixer.cache for b, n in shape.groups) * bits_of(bits) / 8


def state_bytes(shape: Shape) -> float:
    """Bytes of recurrent states that a sequence of any length keeps."""
    return sum(n * b.mixer.state for b, n in shape.groups) * STATE_BITS / 8


def cache_bytes(shape: Shape, context: float, bits: float = 16) -> float:
    """Bytes that a sequence of ``context`` tokens keeps: keys and values (of a window no
    more than it reaches; the latent, in MLA), and recurrent states."""
    check_number(context, "context", least=0)
    held = sum(n * b.mixer.cache * _reach(b.mixer, context) for b, n in shape.groups)
    return held * bits_of(bits) / 8 + state_bytes(shape)


def decode_bytes(
    shape: Shape,
    batch: float,
    context: float,
    bits: float | None = None,
    cache_bits: float = 16,
) -> float:
    """Bytes moved in one decode step: weights once, every sequence's cache read, and its
    recurrent states read and written."""
    kept = cache_bytes(shape, context, cache_bits) + state_bytes(shape)
    return step_bytes(shape, batch, bits) + batch * kept


def decode_flops(shape: Shape, context: float) -> float:
    """FLOPs of one token that reaches ``context`` tokens, itself included; head included."""
    check_number(context, "context")
    return 2 * shape.multiplied + sum(
        n * (b.mixer.pair_decode * _reach(b.mixer, context) + b.mixer.step) for b, n in shape.groups
    )


def attention_flops(
    shape: Shape, tokens: float, cached: float = 0, *, causal: bool = True
) -> float:
    """FLOPs of attention, and of recurrent states, over ``tokens`` tokens of one sequence
    that follow ``cached`` others. causal: a query meets only what comes before it, as fused
    kernels compute; False: every pair, as papers that report MFU count."""
    check_number(tokens, "tokens")
    check_number(cached, "cached", least=0)
    return sum(
        n * (b.mixer.pair * _pairs(b.mixer, tokens, cached, causal) + b.mixer.step * tokens)
        for b, n in shape.groups
    )


def prefill_flops(
    shape: Shape, tokens: float, cached: float = 0, *, logits: float | None = 1
) -> float:
    """FLOPs to take in ``tokens`` tokens of a prompt after ``cached`` others.

    logits: at how many tokens the head is computed: the last one, as engines do; None: all.
    """
    head = 2 * shape.head * (tokens if logits is None else min(logits, tokens))
    inside = 2 * (shape.multiplied - shape.head) * tokens
    return inside + head + attention_flops(shape, tokens, cached)


def forward_flops(shape: Shape, tokens: float, sequence: float, *, causal: bool = True) -> float:
    """FLOPs of a forward pass over ``tokens`` tokens in sequences of ``sequence``, logits at
    all of them: what a distillation's teacher costs."""
    check_number(tokens, "tokens")
    return 2 * shape.multiplied * tokens + (
        attention_flops(shape, sequence, causal=causal) * tokens / sequence
    )


def training_flops(
    shape: Shape,
    tokens: float,
    sequence: float,
    *,
    recompute: Recompute = "none",
    causal: bool = True,
) -> float:
    """FLOPs to train on ``tokens`` tokens: 6 N tokens plus attention, N the weights that a
    token multiplies; the backward pass costs two forward ones.

    recompute: of activations (Korthikanti et al. 2022, arXiv 2205.05198): "selective"
    computes attention once more, "full" all blocks, neither the head.
    Source: Kaplan et al. 2020, section 2.1; Narayanan et al. 2021 (arXiv 2104.04473), eq. 2.
    """
    _recompute(recompute)
    forward = forward_flops(shape, tokens, sequence, causal=causal)
    return 3 * forward + _again(shape, tokens, sequence, recompute, causal)


def lora_flops(
    shape: Shape,
    tokens: float,
    sequence: float,
    *,
    rank: int = 16,
    targets: Targets = "all",
    recompute: Recompute = "none",
    causal: bool = True,
) -> float:
    """FLOPs to train low-rank adapters (arXiv 2106.09685) on ``tokens`` tokens: 4 N, as the
    frozen weights get no gradients, 6 for each weight of the adapters, and attention."""
    _recompute(recompute)
    check_number(tokens, "tokens")
    adapters = adapter_weights(shape, rank, targets, active=True)
    attention = attention_flops(shape, sequence, causal=causal) * tokens / sequence
    again = _again(shape, tokens, sequence, recompute, causal)
    if recompute == "full":
        again += 2 * adapters * tokens
    return (4 * shape.multiplied + 6 * adapters) * tokens + 3 * attention + again


def distillation_flops(
    student: Shape,
    teacher: Shape,
    tokens: float,
    sequence: float,
    *,
    recompute: Recompute = "none",
    causal: bool = True,
) -> float:
    """FLOPs to train ``student`` on ``tokens`` tokens under a teacher that only runs forward."""
    own = training_flops(student, tokens, sequence, recompute=recompute, causal=causal)
    return own + forward_flops(teacher, tokens, sequence, causal=causal)


def adapter_weights(
    shape: Shape, rank: int, targets: Targets = "all", *, active: bool = False
) -> int:
    """Weights of LoRA adapters: rank x (inputs + outputs) of each matrix in a block.

    targets: "all" matrices (each expert's too, the router not), or those of "attention".
    active: only those that one token meets.
    """
    if type(rank) is not int or not 1 <= rank <= 1 << 16:
        raise JoulesmithError(f"rank {str(rank)[:40]}: give a whole number from 1")
    if targets not in get_args(Targets):
        raise JoulesmithError(f"targets {str(targets)[:40]!r}: give all or attention")
    sides = 0
    for block, n in shape.groups:
        f = block.ffn
        sides += n * block.mixer.sides
        if targets == "all":
            sides += n * (f.sides + (f.chosen if active else f.experts) * f.expert_sides)
    return rank * sides


def _again(
    shape: Shape, tokens: float, sequence: float, recompute: Recompute, causal: bool
) -> float:
    if recompute == "none":
        return 0
    attention = attention_flops(shape, sequence, causal=causal) * tokens / sequence
    if recompute == "selective":
        return attention
    return 2 * (shape.multiplied - shape.head) * tokens + attention


def _stored(shape: Shape, bits: float | None) -> Stored:
    if bits is None:
        return shape.stored or stored_at(shape)
    b = bits_of(bits)
    return stored_at(shape, rest=max(b, 16), table=b, blocks=b)


def _reach(mixer: Mixer, context: float) -> float:
    return context if mixer.window is None else min(context, mixer.window)


def _pairs(mixer: Mixer, tokens: float, cached: float, causal: bool) -> float:
    """Query-key pairs of ``tokens`` queries after ``cached`` tokens, within the window."""
    w = mixer.window
    if not causal:
        return tokens * _reach(mixer, cached + tokens)
    last = cached + tokens
    if w is None or last <= w:
        return _triangle(last) - _triangle(cached)
    if cached >= w:
        return tokens * w
    return _triangle(w) - _triangle(cached) + (last - w) * w


def _triangle(n: float) -> float:
    """1 + 2 + ... + n."""
    return n * (n + 1) // 2 if isinstance(n, int) else n * (n + 1) / 2


def check_number(value: float, word: str, least: float = 1) -> None:
    """Raise `JoulesmithError` unless a count is a number from ``least`` on."""
    # an average batch or context need not be whole
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= 1e18:
        raise JoulesmithError(f"{word} is {str(value)[:40]}: give a number from {least:g}")


def _recompute(word: str) -> None:
    if word not in get_args(Recompute):
        known = ", ".join(get_args(Recompute))
        raise JoulesmithError(f"recompute {str(word)[:40]!r}: give one of {known}")
