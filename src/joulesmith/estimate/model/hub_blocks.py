"""The blocks of a model from its config.json: which mixer and which MLP each layer has.

Knows no files; see `hub_config` for what lies outside the blocks.
"""

from __future__ import annotations

from dataclasses import replace

from joulesmith.errors import JoulesmithError
from joulesmith.estimate.model import parts
from joulesmith.estimate.model.families import Family
from joulesmith.estimate.model.keys import MAX_LAYERS, Keys
from joulesmith.estimate.model.shape import Block, FeedForward, Latent, Mixer
from joulesmith.formats.files import quoted

HIDDEN = ("hidden_size", "n_embd", "d_model", "n_embed", "dim")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_query_heads", "num_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
WIDTH = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "inner_hidden_size")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_topk", "moe_k")
PLAIN_MAMBA = ("mamba", "falcon_mamba", "mamba2")

_KINDS = {
    "full_attention": "full", "attention": "full", "full": "full", "global": "full", "*": "full",
    "sliding_attention": "window", "chunked_attention": "window", "local": "window",
    "sliding": "window", "hybrid_sliding": "window", "linear_attention": "linear",
    "mamba": "linear", "mamba2": "linear", "M": "linear", "conv": "conv",
    "mlp": "mlp", "-": "mlp", "moe": "moe", "E": "moe",
}  # fmt: skip


def latent_of(keys: Keys) -> Latent | None:
    """The sizes of latent attention, where the config has it."""
    rank = keys.maybe("kv_lora_rank")
    if rank is None:
        return None
    return Latent(
        rank,
        keys.maybe("q_lora_rank"),
        keys.count("qk_nope_head_dim", default=128, least=0),
        keys.count("qk_rope_head_dim", default=64, least=0),
        keys.count("v_head_dim", default=128),
    )


def head_dim_of(keys: Keys) -> int:
    """Elements of a head: given, or an even share of the width."""
    hidden, heads = keys.count(*HIDDEN), max(keys.each(HEADS, _layers(keys)))
    found = keys.maybe("head_dim", "kv_channels", "attention_head_dim")
    if found is None and not 0 < heads <= hidden:
        raise keys.bad(HEADS[0], heads, f"no more than hidden_size, {hidden}")
    return found or hidden // heads


def blocks_of(
    keys: Keys, kind: str, family: Family
) -> tuple[tuple[Block, ...], Latent | None, list[str]]:
    """Each layer's block, the latent sizes, and notes.

    Raises `JoulesmithError` for values that are missing, absurd or do not fit together.
    """
    n = _layers(keys)
    notes: list[str] = []
    if kind in PLAIN_MAMBA:
        mixer = _mamba2(keys) if kind == "mamba2" else _mamba(keys)
        norm = keys.count(*HIDDEN)
        return (Block(mixer, FeedForward(), norm),) * n, None, notes
    kinds = _kinds(keys, kind, family, n)
    if strange := sorted({k for k in kinds if k not in _KINDS.values()}):
        named = ", ".join(quoted(k) for k in strange[:3])
        notes.append(f"layers of kind {named} are counted as full attention")
        kinds = ["full" if k in strange else k for k in kinds]
    names = {"llama4": "attention_chunk_size", "llama4_text": "attention_chunk_size"}
    names["gpt_neo"] = "window_size"
    window = keys.maybe(names.get(kind, "sliding_window"), least=0) or None
    if "window" in kinds and window is None:
        kinds = ["full" if k == "window" else k for k in kinds]
    if "llama4" in kind and "window" in kinds:
        notes.append("chunks of attention are counted as sliding windows, their upper bound")
    latent = latent_of(keys)
    mixers = _mixers(keys, kind, family, kinds, window, latent)
    ffns = _ffns(keys, kind, family, n)
    if kind == "nemotron_h":  # a layer is a mixer or an MLP, not both
        ffns = _alone(keys, kinds, ffns)
    hidden = keys.count(*HIDDEN)
    norms = family.norm * _norms(keys, kind, family) * hidden
    blocks = [Block(m, f, norms) for m, f in zip(mixers, ffns, strict=True)]
    if kind == "bitnet":  # norms before both output projections
        blocks = [replace(b, vectors=norms + hidden + b.ffn.width) for b in blocks]
    return tuple(blocks), latent, notes


def _pattern(keys: Keys) -> str | None:
    """Nemotron-H's letter for each layer."""
    found = keys.text("hybrid_override_pattern") or None
    if found is not None and len(found) > MAX_LAYERS:
        raise keys.bad("hybrid_override_pattern", found, f"at most {MAX_LAYERS} letters")
    return found


def _layers(keys: Keys) -> int:
    if (pattern := _pattern(keys)) is not None:
        return len(pattern)
    _, listed = keys.find("layers_block_type")
    if isinstance(listed, list) and 0 < len(listed) <= MAX_LAYERS:
        return len(listed)
    return keys.count(*LAYERS, most=MAX_LAYERS)


def _norms(keys: Keys, kind: str, family: Family) -> int:
    """Norms of a block."""
    if kind == "falcon":
        if not keys.flag("parallel_attn", True) and not keys.flag("new_decoder_architecture"):
            return 2
        apart = keys.flag("new_decoder_architecture")
        return keys.count("num_ln_in_parallel_attn", default=2 if apart else 1)
    if kind == "stablelm" and keys.flag("use_parallel_residual"):
        return 1
    return family.norms


def _kinds(keys: Keys, kind: str, family: Family, n: int) -> list[str]:
    """Each layer's kind: full, window, linear, conv, mlp, moe, or a word that is not known."""
    told = keys.words("layer_types", n) or keys.words("layers_block_type", n)
    if kind == "gpt_neo":
        told = keys.words("attention_layers", n)
    if told is None and (letters := _pattern(keys)) is not None:
        told = list(letters)
    if told is not None:
        return [_KINDS.get(word, word) for word in told]
    if (every := keys.maybe("full_attention_interval")) is not None:
        return ["full" if (i + 1) % every == 0 else "linear" for i in range(n)]
    if (attends := keys.numbers("attn_layer_indices")) is not None:
        return ["full" if i in attends else "linear" for i in range(n)]
    if kind == "bamba":
        return ["linear"] * n
    if (period := keys.maybe("attn_layer_period")) is not None:
        at = keys.count("attn_layer_offset", default=0, least=0)
        return ["full" if i % period == at else "linear" for i in range(n)]
    if "llama4" in kind:
        ropes = keys.numbers("no_rope_layers") or []
        step = keys.count("no_rope_layer_interval")
        ropes = ropes if len(ropes) == n else [int((i + 1) % step != 0) for i in range(n)]
        return ["window" if rope else "full" for rope in ropes]
    if kind == "gpt_neo":
        return ["window" if i % 2 else "full" for i in range(n)]
    if not keys.flag("use_sliding_window", kind not in ("qwen2", "qwen3") and family.slide > 0):
        return ["full"] * n
    if family.slide == 0:  # Qwen: layers from this one on
        first = keys.count("max_window_layers", default=0, least=0)
        return ["full" if i < first else "window" for i in range(n)]
    pattern = keys.find("sliding_window_pattern", "_sliding_window_pattern")[1]
    every = family.slide
    if every > 1 and not isinstance(pattern, str):  # "LLLG" says what the family does
        every = keys.count("sliding_window_pattern", "_sliding_window_pattern", default=every)
    return ["window" if every == 1 or (i + 1) % every else "full" for i in range(n)]


def _mixers(
    keys: Keys,
    kind: str,
    family: Family,
    kinds: list[str],
    window: int | None,
    latent: Latent | None,
) -> list[Mixer]:
    n, hidden = len(kinds), keys.count(*HIDDEN)
    size = head_dim_of(keys) if latent is None else latent.nope + latent.rope
    heads = keys.each(HEADS, n)
    kv_heads = kv_heads_of(keys, kind, n)
    qkv, out = keys.switch(family.qkv_bias), keys.switch(family.out_bias)
    normed = keys.flag(family.qk_norm_key) if family.qk_norm_key else True
    made: dict[tuple[str, int, int], Mixer] = {}

    def one(which: str, a: int, kv: int) -> Mixer:
        if which in ("mlp", "moe"):
            return Mixer("none")
        if which == "linear":
            return _linear(keys)
        if which == "conv":
            kernel = keys.count("conv_L_cache", default=3)
            return parts.short_convolution(hidden, kernel=kernel)
        vectors = (a + 2 * kv) * size * qkv + hidden * out
        if family.qk_norm and normed:
            wide = {"head": 2 * size, "whole": (a + kv) * size, "heads": (a + kv) * size}
            vectors += wide[family.qk_norm]
        if kind == "gpt_oss":
            vectors += a  # the sinks
        if latent is not None:
            if keys.flag("attention_bias"):
                vectors += (latent.q_rank or 0) + latent.kv_rank + latent.rope + hidden
            return parts.latent_attention(
                hidden, a, kv_rank=latent.kv_rank, q_rank=latent.q_rank, nope=latent.nope,
                rope=latent.rope, value=latent.value, vectors=vectors,
            )  # fmt: skip
        if a == 0 or kv == 0:
            return Mixer("none")
        return parts.attention(
            hidden, a, kv, size, window=window if which == "window" else None,
            gate=family.attention_gate, vectors=vectors,
        )  # fmt: skip

    out_list = []
    for which, a, kv in zip(kinds, heads, kv_heads, strict=True):
        key = (which, a, kv)
        if key not in made:
            made[key] = one(*key)
        out_list.append(made[key])
    return out_list


def kv_heads_of(keys: Keys, kind: str, n: int) -> list[int]:
    """Heads of keys and values of each layer."""
    heads = keys.each(HEADS, n)
    if kind == "falcon" and not keys.flag("new_decoder_architecture"):
        # num_kv_heads is read by the new architecture only
        return [1] * n if keys.flag("multi_query", True) else heads
    if kind == "gpt_bigcode":
        return [1] * n if keys.flag("multi_query", True) else heads
    _, told = keys.find(*KV_HEADS)
    found = heads if told is None else keys.each(KV_HEADS, n)
    for a, kv in zip(heads, found, strict=True):
        if kv and (kv > a or a % kv):
            raise keys.bad(KV_HEADS[0], kv, f"a divisor of the {a} heads")
    return found


def _linear(keys: Keys) -> Mixer:
    """The mixer of constant state that the keys describe."""
    if keys.find("linear_num_key_heads")[1] is None:
        if keys.find("mamba_n_heads", "mamba_num_heads")[1] is not None:
            return _mamba2(keys)
        if keys.find("mamba_d_state", "mamba_dt_rank")[1] is not None:
            return _mamba(keys)
        raise JoulesmithError(
            f"linear attention of an unknown kind: {keys.where}: give plain numbers"
        )
    return parts.gated_delta(
        keys.count(*HIDDEN),
        key_heads=keys.count("linear_num_key_heads"),
        value_heads=keys.count("linear_num_value_heads"),
        key_dim=keys.count("linear_key_head_dim"),
        value_dim=keys.count("linear_value_head_dim"),
        kernel=keys.count("linear_conv_kernel_dim", default=4),
    )


def _mamba2(keys: Keys) -> Mixer:
    hidden = keys.count(*HIDDEN)
    expand = keys.count("mamba_expand", "expand", default=2)
    heads = keys.count("mamba_n_heads", "mamba_num_heads", "num_heads", default=128)
    name, size = keys.find("mamba_d_head", "mamba_head_dim", "head_dim")
    inner = expand * hidden if size in (None, "auto") else heads * keys.count(name)
    groups = keys.count("mamba_n_groups", "n_groups", default=1)
    state = keys.count("mamba_d_state", "ssm_state_size", "state_size", default=128)
    biases = 0
    if keys.flag("mamba_conv_bias", keys.flag("use_conv_bias", True)):
        biases += inner + 2 * groups * state
    if keys.flag("mamba_proj_bias", keys.flag("use_bias")):
        biases += 2 * inner + 2 * groups * state + heads + hidden
    kernel = keys.count("mamba_d_conv", "conv_kernel", default=4)
    return parts.mamba2(
        hidden, inner=inner, state=state, heads=heads, groups=groups, kernel=kernel, biases=biases
    )


def _mamba(keys: Keys) -> Mixer:
    hidden = keys.count(*HIDDEN)
    inner = keys.maybe("d_inner") or hidden * keys.count("mamba_expand", "expand", default=2)
    state = keys.count("mamba_d_state", "state_size", default=16)
    name, rank = keys.find("mamba_dt_rank", "time_step_rank")
    rank = -(-hidden // 16) if rank in (None, "auto") else keys.count(name)
    vectors = inner  # the step's bias
    if keys.flag("mamba_conv_bias", keys.flag("use_conv_bias", True)):
        vectors += inner
    if keys.flag("mamba_proj_bias", keys.flag("use_bias")):
        vectors += 2 * inner + hidden
    kernel = keys.count("mamba_d_conv", "conv_kernel", default=4)
    return parts.mamba(hidden, inner=inner, state=state, rank=rank, kernel=kernel, vectors=vectors)


def _ffns(keys: Keys, kind: str, family: Family, n: int) -> list[FeedForward]:
    hidden = keys.count(*HIDDEN)
    experts = keys.count(*EXPERTS, default=0, least=0, most=1 << 16)
    wide = WIDTH if "llama4" not in kind else ("intermediate_size_mlp", *WIDTH)
    default = None if family.gated else 4 * hidden
    if experts > 1 and keys.find(*wide)[1] is None:
        default = 0  # all its layers hold experts
    shared = keys.maybe("shared_intermediate_size", least=0)
    if kind == "granitemoehybrid" and shared is not None and not experts:
        widths = [shared] * n
    else:
        widths = keys.each(wide, n, default)
    if kind == "lfm2" and keys.flag("block_auto_adjust_ff_dim", True):
        many = keys.count("block_multiple_of", default=256)
        widths = [-(-(2 * w // 3) // many) * many for w in widths]
    bias = keys.switch(family.mlp_bias)
    dense = [parts.mlp(hidden, w, gated=family.gated, bias=bias) for w in widths]
    if experts <= 1:
        return dense
    mixed = _mixture(keys, kind, family, hidden, experts)
    return [mixed if m else d for m, d in zip(_mixed(keys, kind, n), dense, strict=True)]


def _mixture(keys: Keys, kind: str, family: Family, hidden: int, experts: int) -> FeedForward:
    width = keys.count("moe_intermediate_size", "expert_intermediate_size", *WIDTH)
    chosen = keys.count(*CHOSEN, default=2, most=experts)
    shared = keys.maybe(
        "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size",
        "shared_intermediate_size", least=0,
    )  # fmt: skip
    if shared is None:
        many = keys.count("n_shared_experts", "num_shared_experts", "moe_num_shared_experts",
                          default=int("llama4" in kind), least=0)  # fmt: skip
        shared = many * width
    return parts.mixture(
        hidden, width, experts=experts, chosen=chosen, gated=family.gated, shared=shared,
        shared_gate=kind.startswith(("qwen2_moe", "qwen3_next", "qwen3_5")) and shared > 0,
        expert_bias=family.expert_bias, router_bias=family.router_bias,
    )  # fmt: skip


def _mixed(keys: Keys, kind: str, n: int) -> list[bool]:
    """Which layers hold experts."""
    if (told := keys.words("mlp_layer_types", n)) is not None:
        return [word == "sparse" for word in told]
    if (listed := keys.numbers("moe_layers")) is not None:
        return [i in listed for i in range(n)]
    if isinstance(keys.find("moe_layer_freq")[1], list):
        return [bool(v) for v in keys.each(("moe_layer_freq",), n)]
    if (step := keys.maybe("interleave_moe_layer_step")) is not None:
        return [(i + 1) % step == 0 for i in range(n)]
    if (period := keys.maybe("expert_layer_period")) is not None:
        at = keys.count("expert_layer_offset", default=0, least=0)
        return [i % period == at for i in range(n)]
    first = keys.count(
        "first_k_dense_replace", "moe_layer_start_index", "num_dense_layers", default=0, least=0
    )
    frequency = keys.count("moe_layer_freq", "moe_layer_interval", default=1)
    step = keys.count("decoder_sparse_step", default=1)
    only = keys.numbers("mlp_only_layers") or []
    return [
        i >= first and i % frequency == 0 and (i + 1) % step == 0 and i not in only
        for i in range(n)
    ]


def _alone(keys: Keys, kinds: list[str], ffns: list[FeedForward]) -> list[FeedForward]:
    """Nemotron-H: MLPs only where the pattern says so."""
    hidden, width = keys.count(*HIDDEN), keys.count(*WIDTH)
    plain = parts.mlp(hidden, width, gated=False, bias=keys.flag("mlp_bias"))
    chosen = {"mlp": plain}
    return [
        f if k == "moe" else chosen.get(k, FeedForward()) for k, f in zip(kinds, ffns, strict=True)
    ]
