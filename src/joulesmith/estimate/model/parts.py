"""Parts of blocks from their sizes: attention, latent attention, linear mixers, MLPs,
mixtures of experts.

A product of an (m, k) and a (k, n) matrix counts 2 m k n FLOPs; softmax, rotary
embeddings and norms count none (they are below 1 % of the products). Knows no model.
"""

from __future__ import annotations

from joulesmith.estimate.model.shape import FeedForward, Mixer


def attention(
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    value_dim: int | None = None,
    window: int | None = None,
    gate: bool = False,
    vectors: int = 0,
) -> Mixer:
    """Softmax attention with ``kv_heads`` shared by the heads (GQA, arXiv 2305.13245).

    window: tokens that a query reaches, itself included. gate: each head's output is
    gated by a projection as wide as the queries (Qwen3-Next).
    """
    v = head_dim if value_dim is None else value_dim
    q = heads * head_dim * (2 if gate else 1)
    outs = (q, kv_heads * head_dim, kv_heads * v)
    pair = 2 * heads * (head_dim + v)
    return Mixer(
        "full" if window is None else "window",
        matrices=hidden * (sum(outs) + heads * v),
        vectors=vectors,
        sides=sum(hidden + o for o in outs) + heads * v + hidden,
        cache=kv_heads * (head_dim + v),
        window=window,
        heads=heads,
        pair=pair,
        pair_decode=pair,
        saved=sum(outs) + heads * v,
    )


def latent_attention(
    hidden: int,
    heads: int,
    *,
    kv_rank: int,
    q_rank: int | None,
    nope: int,
    rope: int,
    value: int,
    vectors: int = 0,
) -> Mixer:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    The cache holds the latent and the shared rotary key. Decode absorbs the up-projection
    into queries and outputs, as engines do: every head meets the latent itself (a key of
    kv_rank + rope, a value of kv_rank), and the projections cost what they did.
    """
    key = heads * (nope + rope)
    shapes = [(hidden, kv_rank + rope), (kv_rank, heads * (nope + value)), (heads * value, hidden)]
    shapes += [(hidden, key)] if q_rank is None else [(hidden, q_rank), (q_rank, key)]
    return Mixer(
        "latent",
        matrices=sum(a * b for a, b in shapes),
        vectors=vectors + kv_rank + (q_rank or 0),  # the norms of both latents
        sides=sum(a + b for a, b in shapes),
        cache=kv_rank + rope,
        heads=heads,
        pair=2 * heads * (nope + rope + value),
        pair_decode=2 * heads * (2 * kv_rank + rope),
        saved=2 * key + 2 * heads * value + kv_rank + rope + (q_rank or 0),
    )


def gated_delta(
    hidden: int, *, key_heads: int, value_heads: int, key_dim: int, value_dim: int, kernel: int
) -> Mixer:
    """Gated delta rule (arXiv 2412.06464, eq. 10), as in Qwen3-Next.

    FLOPs of the state S (key_dim, value_dim) of each value head: decay 1, the value
    recalled 2, the rank-one correction 2, the readout 2 per element.
    """
    key, value = key_heads * key_dim, value_heads * value_dim
    mixed = 2 * key + value
    outs = 2 * key + 2 * value + 2 * value_heads
    state = value_heads * key_dim * value_dim
    return Mixer(
        "linear",
        matrices=hidden * outs + value * hidden,
        vectors=mixed * kernel + 2 * value_heads + value_dim,
        sides=hidden + outs + value + hidden,
        state=state + mixed * (kernel - 1),
        step=7 * state + 2 * mixed * kernel,
        saved=outs + mixed + value,
    )


def mamba2(
    hidden: int, *, inner: int, state: int, heads: int, groups: int, kernel: int, biases: int = 0
) -> Mixer:
    """State-space duality (Mamba-2, arXiv 2405.21060), run as a recurrence.

    FLOPs of a state of inner x state elements: decay 1, input 2, readout 2 per element.
    biases: of the convolution and the projections, when there are.
    """
    mixed = inner + 2 * groups * state
    outs = inner + mixed + heads
    return Mixer(
        "linear",
        matrices=hidden * outs + inner * hidden,
        vectors=mixed * kernel + 3 * heads + inner + biases,
        sides=hidden + outs + inner + hidden,
        state=inner * state + mixed * (kernel - 1),
        step=5 * inner * state + 2 * mixed * kernel,
        saved=outs + mixed + inner,
    )


def mamba(
    hidden: int, *, inner: int, state: int, rank: int, kernel: int, vectors: int = 0
) -> Mixer:
    """Selective state space (Mamba, arXiv 2312.00752), run as a recurrence.

    vectors: biases, and norms of the step and of B and C, when there are.
    """
    shapes = [(hidden, 2 * inner), (inner, rank + 2 * state), (rank, inner), (inner, hidden)]
    return Mixer(
        "linear",
        matrices=sum(a * b for a, b in shapes),
        vectors=inner * (kernel + state + 1) + vectors,
        sides=sum(a + b for a, b in shapes),
        state=inner * state + inner * (kernel - 1),
        step=5 * inner * state + 2 * inner * kernel,
        saved=5 * inner + rank + 2 * state,
    )


def short_convolution(hidden: int, *, kernel: int) -> Mixer:
    """A gated convolution over ``kernel`` tokens (LFM2, arXiv 2511.23404)."""
    return Mixer(
        "linear",
        matrices=4 * hidden * hidden,
        vectors=hidden * kernel,
        sides=6 * hidden,
        state=hidden * (kernel - 1),
        step=2 * hidden * kernel,
        saved=6 * hidden,
    )


def mlp(hidden: int, width: int, *, gated: bool, bias: bool = False) -> FeedForward:
    """Two matrices, or three with a gate (arXiv 2002.05202)."""
    ups = 2 if gated else 1
    return FeedForward(
        matrices=(ups + 1) * hidden * width,
        vectors=ups * width + hidden if bias else 0,
        sides=(ups + 1) * (hidden + width),
        width=width,
        gated=gated,
    )


def mixture(
    hidden: int,
    width: int,
    *,
    experts: int,
    chosen: int,
    gated: bool = True,
    shared: int = 0,
    shared_gate: bool = False,
    expert_bias: bool = False,
    router_bias: bool = False,
) -> FeedForward:
    """A router, ``experts`` MLPs of ``width`` of which a token meets ``chosen``, and MLPs
    that all tokens share, ``shared`` wide together.

    shared_gate: the shared ones are scaled by a gate of their own (Qwen2-MoE).
    """
    one = mlp(hidden, width, gated=gated, bias=expert_bias)
    always = mlp(hidden, shared, gated=gated)
    return FeedForward(
        matrices=hidden * experts + always.matrices + (hidden if shared_gate else 0),
        vectors=experts if router_bias else 0,
        sides=always.sides if shared else 0,
        width=shared,
        gated=gated,
        experts=experts,
        chosen=chosen,
        expert=one.matrices,
        expert_vectors=one.vectors,
        expert_sides=one.sides,
        expert_width=width,
    )
