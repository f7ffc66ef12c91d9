"""A shape from plain numbers; those that nobody gave are filled by rules and marked assumed.

The rules (L layers, h hidden, N weights that a token uses):

- L and h: N = 12 L h^2 (Kaplan et al. 2020, arXiv 2001.08361, table 1) with h = 128 L, as
  Llama's and GPT-3's larger models have it.
- head_dim 128, or 64 below a width of 1024; heads h / head_dim.
- kv_heads 8 where they divide the heads (Ainslie et al. 2023, arXiv 2305.13245).
- vocabulary 128,256, at most a tenth of the weights; head and embedding apart.
- feed-forward: what the other parts leave of the weights, with a gate.
- experts: the width that makes total and active weights come out; 8 a token, or 2 where
  more than an eighth of the weights is in use; as many as that share says.

Knows no files.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NoReturn

from joulesmith.errors import JoulesmithError
from joulesmith.estimate.model import parts
from joulesmith.estimate.model.keys import MAX_LAYERS, MOST
from joulesmith.estimate.model.shape import Block, FeedForward, Shape

_ASPECT = 128
_WHERE = "plain numbers"


def of_numbers(
    params: float | None = None,
    *,
    layers: int | None = None,
    hidden: int | None = None,
    active: float | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    ffn: int | None = None,
    vocab: int | None = None,
    tied: bool | None = None,
    experts: int | None = None,
    experts_per_token: int | None = None,
    window: int | None = None,
    context: int | None = None,
    name: str = "model",
) -> Shape:
    """A decoder of these sizes.

    params, active: weights in all, and those that one token uses (embedding included);
    less of them than params means a mixture of experts in every layer. window: sliding
    attention in every layer. Without params, layers, hidden and ffn count it. The total
    comes out exactly as given, whatever was filled in.
    Raises `JoulesmithError`, one line, for numbers that are absurd or do not fit together.
    """
    given = _checked(
        layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim, ffn=ffn,
        vocab=vocab, experts=experts, experts_per_token=experts_per_token, window=window,
        context=context,
    )  # fmt: skip
    total, used = _weights(params, "params"), _weights(active, "active")
    _together(total, used, given)
    if used == total and not experts:
        used = None  # dense
    said: list[str] = []
    one = used or total  # the weights that set depth and width
    layers, hidden = _depth(one, layers, hidden, said)
    heads, kv_heads, head_dim = _heads(hidden, heads, kv_heads, head_dim, said)
    if vocab is None:
        vocab = 128_256 if one is None else max(1, min(128_256, one // 10 // hidden))
        said.append(f"vocab = {vocab}: 128,256, at most a tenth of the weights")
    if tied is None:
        tied = one is not None and one < 2e9
        said.append(f"tied = {tied}: embedding and head are one matrix below 2e9 weights")
    mixer = parts.attention(hidden, heads, kv_heads, head_dim, window=window)
    fixed = vocab * hidden * (1 if tied else 2) + hidden + layers * (mixer.matrices + 2 * hidden)
    if total is None:
        if ffn is None:
            ffn = round(8 * hidden / 3)
            said.append(f"ffn = {ffn}: 8/3 hidden, with a gate")
        halves = [parts.mlp(hidden, ffn, gated=True)] * layers
    elif total <= fixed:
        _refuse(
            f"params {total:.4g} are no more than the {fixed:.4g} of embedding and attention",
            "give a smaller vocab, hidden or layers",
        )
    elif used is None and experts is None:
        halves = _dense(total - fixed, layers, hidden, ffn, said)
    else:
        over = None if used is None else used - fixed
        halves = _mixtures(
            total - fixed, over, layers, hidden, ffn, experts, experts_per_token, said
        )
    first = halves[0]
    shape = Shape(
        name=name,
        kind="plain",
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=first.expert_width or first.width,
        vocab=vocab,
        tied=tied,
        context=context,
        blocks=tuple(Block(mixer, half, 2 * hidden) for half in halves),
        embedding=vocab * hidden,
        head=vocab * hidden,
        vectors=hidden,
    )
    if used is not None and abs(shape.active / used - 1) > 0.01:
        said.append(f"active = {shape.active:.4g}: as near as experts of this number come")
    return replace(shape, assumed=tuple(said))


def _refuse(what: str, advice: str) -> NoReturn:
    raise JoulesmithError(f"{what}: {_WHERE}: {advice}")


def _weights(value: float | None, word: str) -> int | None:
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 1e5 <= value <= 1e15:  # false for NaN too
        _refuse(f"{word} is {str(value)[:40]}", "give a number of weights from 1e5 to 1e15")
    return int(value)


def _checked(**sizes: int | None) -> dict[str, int]:
    """The sizes that are given. Raises `JoulesmithError` for one that is no size."""
    limits = {"layers": MAX_LAYERS, "experts": 1 << 16, "context": 1 << 40}
    for word, value in sizes.items():
        most = limits.get(word, MOST)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            _refuse(f"{word} is {str(value)[:40]}", f"give a whole number from 1 to {most}")
    return {word: value for word, value in sizes.items() if value is not None}


def _together(total: int | None, used: int | None, given: dict[str, int]) -> None:
    """Raise `JoulesmithError` for numbers that contradict each other."""
    if total is None:
        if not {"layers", "hidden"} <= given.keys():
            _refuse("neither params nor both layers and hidden", "give params, such as 8e9")
        if used is not None or {"experts", "experts_per_token"} & given.keys():
            _refuse("a mixture of experts without params", "give its weights in all")
    elif used is not None and used > total:
        _refuse(f"active {used:.4g} is more than params {total:.4g}", "give the smaller one")
    elif "experts_per_token" in given and used is None and "experts" not in given:
        _refuse("experts_per_token without experts", "give how many experts there are, or active")
    if given.get("experts_per_token", 1) > given.get("experts", MOST):
        _refuse("experts_per_token is more than experts", "give no more than there are")


def _depth(
    weights: int | None, layers: int | None, hidden: int | None, said: list[str]
) -> tuple[int, int]:
    """Layers and width by N = 12 L h^2 and h = 128 L."""
    if layers is None or hidden is None:
        n = float(weights or 0)
        if hidden is not None:
            layers = round(n / (12 * hidden**2))
        elif layers is None:
            layers = round((n / (12 * _ASPECT**2)) ** (1 / 3))
        else:
            hidden = _even(math.sqrt(n / (12 * layers)))
            said.append(f"hidden = {hidden}: params = 12 layers hidden^2")
            return layers, hidden
        layers = min(max(1, layers), MAX_LAYERS)
        said.append(f"layers = {layers}: params = 12 layers hidden^2")
        if hidden is None:
            hidden = _even(math.sqrt(n / (12 * layers)))
            said.append(f"hidden = {hidden}: about {_ASPECT} layers")
    return layers, hidden


def _even(width: float) -> int:
    """A width that heads of 64, or 8 times as many of 128, divide."""
    step = 1024 if width >= 2048 else 64
    return min(max(step, round(width / step) * step), MOST)


def _heads(
    hidden: int, heads: int | None, kv_heads: int | None, head_dim: int | None, said: list[str]
) -> tuple[int, int, int]:
    if head_dim is None and heads is None:
        head_dim = min(128 if hidden >= 1024 else 64, hidden)
        said.append(f"head_dim = {head_dim}: 128, or 64 below a width of 1024")
    if head_dim is None:
        head_dim = hidden // (heads or 1)
        if head_dim < 1:
            _refuse(f"{heads} heads are more than hidden {hidden}", "give fewer heads")
    if heads is None:
        heads = max(1, hidden // head_dim)
        said.append(f"heads = {heads}: hidden / head_dim")
    if kv_heads is None:
        kv_heads = 8 if heads % 8 == 0 else heads
        said.append(f"kv_heads = {kv_heads}: 8 where they divide the heads")
    if heads % kv_heads:
        _refuse(f"{kv_heads} kv_heads do not divide {heads} heads", "give a divisor")
    return heads, kv_heads, head_dim


def _shares(amount: int, layers: int) -> list[int]:
    """``amount`` in whole parts that differ by one at most."""
    each, left = divmod(amount, layers)
    return [each + (i < left) for i in range(layers)]


def _dense(
    rest: int, layers: int, hidden: int, ffn: int | None, said: list[str]
) -> list[FeedForward]:
    # a given width says whether there is a gate
    gated = ffn is None or rest > 2.5 * layers * hidden * ffn
    width = ffn or max(1, rest // (3 * hidden * layers))
    if ffn is None:
        said.append(f"ffn = {width}: what is left of params, with a gate")
    sides = (3 if gated else 2) * (hidden + width)
    return [
        FeedForward(matrices=part, sides=sides, width=width, gated=gated)
        for part in _shares(rest, layers)
    ]


def _mixtures(
    rest: int,
    used: int | None,
    layers: int,
    hidden: int,
    ffn: int | None,
    experts: int | None,
    chosen: int | None,
    said: list[str],
) -> list[FeedForward]:
    """Mixtures of experts in every layer from their weights in all, ``rest``, and the part
    of them that one token uses."""
    if used is not None and used <= 0:
        _refuse(
            "active is no more than embedding and attention",
            "give a smaller vocab, hidden or layers",
        )
    share = None if used is None else used / rest
    if chosen is None:
        rule = "8, or 2 where more than an eighth of the weights is in use"
        if experts is not None and share is not None:
            chosen = min(experts, max(1, round(experts * share)))
            rule = "experts by their share in use"
        elif share is not None:
            chosen = 8 if share < 1 / 8 else 2
        else:
            chosen = min(experts or 2, 8 if (experts or 2) > 16 else 2)
            rule = "8, or 2 of at most 16 experts"
        said.append(f"experts_per_token = {chosen}: {rule}")
    if experts is None:
        experts = max(chosen + 1, min(1 << 16, round(chosen / (share or 1))))
        said.append(f"experts = {experts}: experts_per_token / share of weights in use")
    pool = rest - layers * hidden * experts
    if pool < layers * experts:
        _refuse(f"{experts} experts are too many for their weights", "give fewer experts")
    expert = pool // (layers * experts)
    if used is not None and experts > chosen:
        # what does not lie idle and is no chosen expert is shared by all tokens
        expert = min(expert, max(1, (rest - used) // (layers * (experts - chosen))))
    width = ffn or max(1, expert // (3 * hidden))
    if ffn is None:
        said.append(f"expert width = {width}: by their weights, with a gate")
    shared = _shares(pool - layers * experts * expert, layers)
    return [
        FeedForward(
            matrices=hidden * experts + more,
            sides=3 * hidden + more // hidden,
            width=more // (3 * hidden),
            experts=experts,
            chosen=chosen,
            expert=expert,
            expert_sides=3 * (hidden + width),
            expert_width=width,
        )
        for more in shared
    ]
