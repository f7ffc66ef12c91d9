"""A shape from the header of a GGUF file: weights and bytes as the tensors are stored, heads
and contexts as the keys say. Reads no weights.

Keys and tensor names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from joulesmith.errors import JoulesmithError
from joulesmith.estimate.model import parts
from joulesmith.estimate.model.keys import MAX_LAYERS, Keys
from joulesmith.estimate.model.shape import Block, FeedForward, Latent, Mixer, Shape, Stored
from joulesmith.gguf_file import GgufFile, GgufTensor, read_gguf

_BLOCK = re.compile(r"blk\.(\d{1,5})\.(.+)")
_ONE_EXPERT = re.compile(r"ffn_(?:gate|up|down)\.\d+\.weight")
_CONSTANT = re.compile(r"(?:.*\.)?rope_(?:freqs|factors_\w+)\.weight")
# Two-dimensional, but no product: convolutions over a few tokens, decays.
_SMALL = re.compile(r"ssm_(?:conv1d|a|d)\b.*|shortconv\.conv\.weight|.*_norm\.weight|.*\.bias")
_TABLES = ("token_embd.weight", "position_embd.weight", "token_types.weight",
           "per_layer_token_embd.weight")  # fmt: skip
_PATTERN = {"gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "cohere2": 4, "olmo2": 4,
            "exaone4": 4, "llama4": 4}  # fmt: skip
"""Every so many layers one reaches everything, where a file does not say (llama.cpp)."""


@dataclass
class _Tally:
    """What a block's tensors add up to, in weights."""

    mixer: int = 0
    mixer_sides: int = 0
    ffn: int = 0
    ffn_sides: int = 0
    experts: int = 0
    expert_sides: int = 0
    expert_vectors: int = 0
    norms: int = 0
    names: set[str] = field(default_factory=set)

    def has(self, *starts: str) -> bool:
        return any(name.startswith(starts) for name in self.names)


def of_gguf(path: str | os.PathLike[str]) -> Shape:
    """Count the model in a GGUF file.

    Raises `JoulesmithError`, one line, for a damaged file and for one that is no language
    model's; `MissingExtraError` without the package gguf, which knows the block types.
    """
    file = read_gguf(path)
    arch = file.value("general.architecture")
    if not isinstance(arch, str) or not arch.isprintable():
        raise JoulesmithError(f"no general.architecture: {path}: give a language model's GGUF")
    start = f"{arch}."
    own: dict[str, object] = {
        k.removeprefix(start): v.value for k, v in file.metadata.items() if k.startswith(start)
    }
    keys = Keys(own, str(path), {})
    listed = keys.count("block_count", most=MAX_LAYERS)
    further = keys.count("nextn_predict_layers", default=0, least=0, most=listed - 1)
    layers = listed - further
    for key, value in own.items():  # values of each layer
        if further and isinstance(value, list) and len(value) == listed:
            own[key] = value[:layers]
    notes = ["layers that only predict further tokens (MTP) are not counted"] if further else []
    tallies, stored, outside, vectors = _tally(file, layers)
    table, head = file.by_name.get("token_embd.weight"), file.by_name.get("output.weight")
    if table is None or len(table.shape) != 2:
        raise JoulesmithError(f"no token_embd.weight: {path}: give a language model's GGUF")
    hidden = keys.count("embedding_length")
    heads = keys.each(("attention.head_count",), layers, 0)
    latent = _latent(keys, max(heads), hidden)
    blocks = tuple(_blocks(keys, arch, hidden, heads, latent, tallies))
    most = max(heads)
    kv_heads = most if latent else max(_kv_heads(keys, heads))
    widest = max((b.ffn.width for b in blocks if not b.ffn.experts), default=0)
    name = file.value("general.name")
    return Shape(
        name=name[:80] if isinstance(name, str) and name.isprintable() else Path(path).stem,
        kind=arch[:40],
        hidden=hidden,
        heads=most,
        kv_heads=kv_heads,
        head_dim=(latent.nope + latent.rope) if latent else _head_dim(keys, most, hidden),
        ffn=widest or max(b.ffn.expert_width for b in blocks),
        vocab=table.shape[0],
        tied=head is None,
        context=keys.maybe("context_length", most=1 << 40),
        blocks=blocks,
        embedding=sum(math.prod(file.by_name[t].shape) for t in _TABLES if t in file.by_name),
        head=math.prod((table if head is None else head).shape),
        outside=outside,
        vectors=vectors,
        latent=latent,
        stored=stored,
        notes=tuple(notes),
    )


def _head_dim(keys: Keys, heads: int, hidden: int) -> int:
    if not heads:
        return 0
    return keys.maybe("attention.key_length") or max(1, hidden // heads)


def _kv_heads(keys: Keys, heads: list[int]) -> list[int]:
    name = "attention.head_count_kv"
    return heads if keys.find(name)[1] is None else keys.each((name,), len(heads))


def _latent(keys: Keys, heads: int, hidden: int) -> Latent | None:
    rank = keys.maybe("attention.kv_lora_rank")
    if rank is None or not heads:
        return None
    rope = keys.count("rope.dimension_count", default=64)
    key = keys.maybe("attention.key_length_mla", "attention.key_length") or hidden // heads
    value = keys.maybe("attention.value_length_mla", "attention.value_length") or key
    return Latent(rank, keys.maybe("attention.q_lora_rank"), max(0, key - rope), rope, value)


def _tally(file: GgufFile, layers: int) -> tuple[list[_Tally], Stored, int, int]:
    """Weights by block, bytes by use, weights of matrices and of vectors outside blocks."""
    tallies = [_Tally() for _ in range(layers)]
    sizes: Counter[str] = Counter()
    outside = vectors = 0
    for t in file.tensors:
        n = math.prod(t.shape)
        if _CONSTANT.fullmatch(t.name):
            sizes["vectors"] += t.nbytes  # tables, which are no weights
        elif (found := _BLOCK.fullmatch(t.name)) is not None:
            if int(found[1]) < layers:
                sizes[_add(tallies[int(found[1])], found[2], t, n)] += t.nbytes
        elif t.name in _TABLES:
            sizes["embedding"] += t.nbytes
        elif t.name == "output.weight":
            sizes["head"] += t.nbytes
        elif len(t.shape) > 1:
            outside += n
            sizes["matrices"] += t.nbytes
        else:
            vectors += n
            sizes["vectors"] += t.nbytes
    order = ("embedding", "head", "matrices", "experts", "vectors")
    return tallies, Stored(*(sizes[k] for k in order)), outside, vectors


def _add(tally: _Tally, name: str, t: GgufTensor, n: int) -> str:
    """Count one tensor of a block; says whose bytes it adds to."""
    tally.names.add(name)
    if "_exps." in name or _ONE_EXPERT.fullmatch(name):
        if name.endswith(".bias"):
            tally.expert_vectors += n
            return "vectors"
        tally.experts += n
        tally.expert_sides += sum(t.shape[-2:]) * (t.shape[0] if len(t.shape) > 2 else 1)
        return "experts"
    if len(t.shape) < 2 or _SMALL.fullmatch(name):
        tally.norms += n
        return "vectors"
    many = t.shape[0] if len(t.shape) > 2 else 1
    if name.startswith("ffn_"):
        tally.ffn += n
        tally.ffn_sides += 0 if name.startswith("ffn_gate_inp") else sum(t.shape)
    else:
        tally.mixer += n
        tally.mixer_sides += many * sum(t.shape[-2:])
    return "matrices"


def _blocks(
    keys: Keys,
    arch: str,
    hidden: int,
    heads: list[int],
    latent: Latent | None,
    tallies: list[_Tally],
) -> list[Block]:
    n, kv_heads = len(tallies), _kv_heads(keys, heads)
    widths = keys.each(("feed_forward_length",), n, 0)
    experts = keys.count("expert_count", default=0, least=0, most=1 << 16)
    windows = _windows(keys, arch, n)
    out = []
    for i, tally in enumerate(tallies):
        mixer = _mixer(keys, hidden, heads[i], kv_heads[i], latent, windows[i], tally)
        mixer = replace(mixer, matrices=tally.mixer, sides=tally.mixer_sides)
        out.append(Block(mixer, _ffn(keys, hidden, widths[i], experts, tally), tally.norms))
    return out


def _windows(keys: Keys, arch: str, n: int) -> list[int | None]:
    """Tokens in reach of each layer, None for all."""
    window = keys.maybe("attention.sliding_window", least=0)
    if arch == "llama4":
        window = keys.maybe("attention.chunk_size") or 8192
    _, told = keys.find("attention.sliding_window_pattern")
    if not window:
        return [None] * n
    if isinstance(told, list) and len(told) >= n:
        return [window if slides else None for slides in told[:n]]
    every = told if type(told) is int and told > 0 else _PATTERN.get(arch)
    if every is None:  # llama.cpp reads the key for no other architecture
        return [None] * n
    return [None if (i + 1) % every == 0 else window for i in range(n)]


def _mixer(
    keys: Keys,
    hidden: int,
    heads: int,
    kv_heads: int,
    latent: Latent | None,
    window: int | None,
    tally: _Tally,
) -> Mixer:
    if tally.has("ssm_"):
        inner, state = keys.count("ssm.inner_size"), keys.count("ssm.state_size")
        groups, kernel = keys.maybe("ssm.group_count", least=0) or 0, keys.count("ssm.conv_kernel")
        mixed = inner + 2 * groups * state
        # a gate or a beta of its own tells the gated delta rule from Mamba
        per = 7 if tally.has("attn_gate", "ssm_ba", "ssm_beta") else 5
        return Mixer(
            "linear",
            state=inner * state + mixed * (kernel - 1),
            step=per * inner * state + 2 * mixed * kernel,
            saved=3 * inner + 2 * mixed,
        )
    if tally.has("shortconv"):
        return parts.short_convolution(hidden, kernel=keys.count("shortconv.l_cache", default=3))
    if not tally.mixer or not heads or not kv_heads:
        return Mixer("none")
    if latent is not None:
        made = parts.latent_attention(
            hidden, heads, kv_rank=latent.kv_rank, q_rank=latent.q_rank, nope=latent.nope,
            rope=latent.rope, value=latent.value,
        )  # fmt: skip
        return replace(made, vectors=0)
    size = _head_dim(keys, heads, hidden)
    value = keys.count("attention.value_length", default=size)
    made = parts.attention(hidden, heads, kv_heads, size, value_dim=value, window=window)
    return replace(made, vectors=0)


def _ffn(keys: Keys, hidden: int, width: int, experts: int, tally: _Tally) -> FeedForward:
    gated = tally.has("ffn_gate.", "ffn_gate_exps") or tally.ffn > 2.5 * hidden * width > 0
    if not tally.experts:
        return FeedForward(
            matrices=tally.ffn,
            sides=tally.ffn_sides,
            width=width if tally.ffn else 0,
            gated=gated,
        )
    if not experts or tally.experts % experts or tally.expert_vectors % experts:
        raise JoulesmithError(
            f"experts' tensors do not divide into {experts}: {keys.where}: convert the model again"
        )
    shared = keys.maybe("expert_shared_feed_forward_length", least=0)
    own = keys.count("expert_feed_forward_length", default=max(width, 1))
    if shared is None:
        shared = keys.count("expert_shared_count", default=0, least=0) * own
    return FeedForward(
        matrices=tally.ffn,
        sides=tally.ffn_sides,
        width=shared,
        gated=gated,
        experts=experts,
        chosen=keys.count("expert_used_count", most=experts),
        expert=tally.experts // experts,
        expert_vectors=tally.expert_vectors // experts,
        expert_sides=tally.expert_sides // experts,
        expert_width=own,
    )
