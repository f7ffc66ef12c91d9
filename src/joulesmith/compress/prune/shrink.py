"""The surgery: a model of another shape, made of the blocks that it is given.

All blocks of a plain decoder have one shape: `transformers`' configs and llama.cpp's "llama",
"qwen2" and "qwen3" keep a single number for the heads, the MLP and the width. Layers, neurons,
heads and the width are what a `Shape` says; how they are chosen is not known here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from joulesmith.architectures import head_dim, hyperparameters
from joulesmith.compress.prune.heads import Heads, Layout, columns_of
from joulesmith.errors import JoulesmithError
from joulesmith.memory import release_memory
from joulesmith.weights import finish, skeleton

if TYPE_CHECKING:
    from joulesmith.models import Model

State = Mapping[str, Tensor]
"""A block's parameters, by name within the block."""


@dataclass(frozen=True)
class Shape:
    """layers, hidden: counts. neurons: of each MLP. kv, queries: key-value heads of each block
    and query heads of each of them. dim: elements of a head. tied: one matrix for both ends."""

    layers: int
    hidden: int
    neurons: int
    kv: int
    queries: int
    dim: int
    tied: bool

    @property
    def layout(self) -> Layout:
        """The heads alone."""
        return Layout(self.kv, self.queries, self.dim)

    def words(self) -> str:
        """For people."""
        return (
            f"{self.layers} layers, {self.neurons} neurons, {self.kv * self.queries} heads in "
            f"{self.kv} groups, width {self.hidden}"
        )


def shape_of(model: Model) -> Shape:
    """The shape that a model has. Raises `JoulesmithError` for blocks of another structure."""
    c = model.module.config
    inner = getattr(model.module, "model", None)
    for block in getattr(inner, "layers", ()):
        names = {n for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        if names != LINEARS:
            raise JoulesmithError(
                f"{type(block).__name__} is not built like a Llama's block (or its layers are "
                "kept as factors): merge them first"
            )
    return Shape(
        c.num_hidden_layers,
        c.hidden_size,
        c.intermediate_size,
        c.num_key_value_heads,
        c.num_attention_heads // c.num_key_value_heads,
        head_dim(c),
        model.tied,
    )


LINEARS = {f"self_attn.{n}_proj" for n in "qkvo"} | {
    f"mlp.{n}_proj" for n in ("gate", "up", "down")
}


def count(model: Model, shape: Shape) -> int:
    """Parameters that a model of this family and vocabulary has in another shape."""
    heads, kv = shape.kv * shape.queries * shape.dim, shape.kv * shape.dim
    rows = {"q_proj": heads, "k_proj": kv, "v_proj": kv, "o_proj": shape.hidden}
    rows |= {"gate_proj": shape.neurons, "up_proj": shape.neurons, "down_proj": shape.hidden}
    columns = {"o_proj": heads, "down_proj": shape.neurons}
    block = 0
    for name, p in model.module.model.layers[0].named_parameters():
        owner = name.split(".")[-2]
        if owner in rows:
            block += rows[owner] * (columns.get(owner, shape.hidden) if p.ndim == 2 else 1)
        else:  # norms: over the width, or over a head's elements
            block += shape.dim if owner in ("q_norm", "k_norm") else shape.hidden
    ends = model.module.config.vocab_size * shape.hidden * (1 if shape.tied else 2)
    total: int = shape.layers * block + ends + shape.hidden
    return total


def read_per_token(model: Model, shape: Shape) -> int:
    """Parameters that decoding one token reads: all but an embedding of its own, of which it
    reads one row. Joules of decode follow it where memory is the limit."""
    own = 0 if shape.tied else model.module.config.vocab_size * shape.hidden
    return count(model, shape) - own


def config_for(model: Model, shape: Shape, kept: Sequence[int]) -> Any:
    """The model's config with another shape; ``kept``: which of its layers are left.

    Raises `JoulesmithError` for a shape that transformers would not read back: its Llama wants
    a width that is a multiple of the number of heads, though the size of a head is given.
    """
    config = copy.deepcopy(model.module.config)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        config.layer_types = [kinds[i] for i in kept]
    config.num_hidden_layers = shape.layers
    if getattr(config, "max_window_layers", None) is not None:
        config.max_window_layers = min(config.max_window_layers, shape.layers)
    before = config.hidden_size
    config.head_dim = shape.dim  # said, since it is no longer hidden_size / heads
    config.hidden_size, config.intermediate_size = shape.hidden, shape.neurons
    config.num_key_value_heads = shape.kv
    config.num_attention_heads = shape.kv * shape.queries
    config.tie_word_embeddings = shape.tied
    if shape.hidden != before and config.model_type != "qwen3":
        # mean squares are over fewer channels; Qwen3's norms of heads share the number
        config.rms_norm_eps *= before / shape.hidden
    try:
        type(config).from_dict(config.to_dict())
    except Exception as e:  # transformers validates with its own exception types
        line = (str(e).strip().splitlines() or [type(e).__name__])[-1].strip()[:200]
        raise JoulesmithError(f"{shape.words()}: transformers refuses it: {line}") from e
    return config


def gguf_refusal(model: Model, shape: Shape) -> str | None:
    """Why llama.cpp does not load a GGUF of that shape; None where it does.

    Its "llama" and "qwen3" read the size of a head from the file; its "qwen2" takes the width for
    that of all heads together.
    """
    if model.architecture == "qwen2" and shape.kv * shape.queries * shape.dim != shape.hidden:
        return "llama.cpp's qwen2 wants heads that are together as wide as the stream"
    return None


def possible(model: Model, shape: Shape) -> bool:
    """Whether transformers and llama.cpp load a model of that shape."""
    try:
        config_for(model, shape, range(shape.layers))
    except JoulesmithError:
        return False
    return gguf_refusal(model, shape) is None


def cut_block(block: nn.Module, heads: Heads, neurons: Tensor, dim: int) -> dict[str, Tensor]:
    """A block's parameters with these heads and neurons alone; what is left is unchanged.

    Names are those within the block; tensors are copies.
    """
    q, kv = columns_of(heads.query, dim), columns_of(heads.kv, dim)
    rows = {"q_proj": q, "k_proj": kv, "v_proj": kv, "gate_proj": neurons, "up_proj": neurons}
    columns = {"o_proj": q, "down_proj": neurons}
    out = {}
    for name, p in block.named_parameters():
        owner, value = name.split(".")[-2], p.detach()
        if owner in rows:
            value = value[rows[owner]]
        elif owner in columns and p.ndim == 2:
            value = value[:, columns[owner]]
        out[name] = value.clone()
    return out


def block_of(state: State, like: nn.Module, config: Any, index: int) -> nn.Module:
    """A block of the family of ``like`` with these parameters, ready to run."""
    with torch.device("meta"):
        block: nn.Module = type(like)(config, index)
    place(block, state)
    return block.eval()


def place(block: nn.Module, state: State) -> None:
    """Put parameters into a block without storage. Raises `JoulesmithError` unless all fit."""
    wanted = {n: tuple(p.shape) for n, p in block.named_parameters()}
    if wanted != {n: tuple(t.shape) for n, t in state.items()}:
        wrong = next(
            n for n in {**wanted, **state} if n not in state or n not in wanted
            or wanted[n] != tuple(state[n].shape)
        )  # fmt: skip
        raise JoulesmithError(f"{wrong} does not have the shape that the new model wants")
    for name, value in state.items():
        owner, _, leaf = name.rpartition(".")
        if not bool(torch.isfinite(value).all()):
            raise JoulesmithError(f"{name} became NaN or infinite: nothing was changed")
        setattr(block.get_submodule(owner), leaf, nn.Parameter(value))


def rebuild(
    model: Model,
    shape: Shape,
    kept: Sequence[int],
    block: Callable[[int], State],
    ends: State | None = None,
) -> None:
    """Turn ``model`` into one of that shape: module, config, tensors, metadata, count.

    kept: which old layers are left, rising. block: place among the new ones -> its parameters;
    asked for one at a time, and the old block goes before the next is asked for, so that the
    peak is one block above the model. ends: new "embed", "norm" and "head" where they change.
    All is checked but the blocks' values before anything changes.
    """
    old = model.module
    config = config_for(model, shape, kept)
    made, refs = skeleton(config, model.name)
    metadata = _metadata(model, config)
    parts = {"embed": old.model.embed_tokens, "norm": old.model.norm, "head": old.lm_head}
    new = {"embed": made.model.embed_tokens, "norm": made.model.norm, "head": made.lm_head}
    for name, part in parts.items():
        value = (ends or {}).get(name, part.weight.detach())
        if name != "head" or not shape.tied:
            place(new[name], {"weight": value.to(part.weight.dtype)})
    dtype = old.model.embed_tokens.weight.dtype
    grads = old.model.embed_tokens.weight.requires_grad
    made.generation_config = copy.deepcopy(getattr(old, "generation_config", None))
    layers = old.model.layers
    for i in range(len(layers)):
        if i in kept:
            place(made.model.layers[list(kept).index(i)], _to(block(list(kept).index(i)), dtype))
        layers[i] = nn.Identity()
    model.module = finish(made, dtype).requires_grad_(grads)
    model.tensors, model.metadata = refs, metadata
    model.parameters = sum(p.numel() for p in model.module.parameters())
    release_memory()


def read_back(model: Model, folder: Path) -> None:
    """Turn ``model``, as it was or as `rebuild` left it, into the one that `rebuild` made and
    `models.write_weights` wrote. Raises `JoulesmithError` for a damaged folder."""
    from joulesmith.vocab_folder import read_config
    from joulesmith.weights import build, open_safetensors

    old = next(model.module.parameters())
    config = read_config(folder)
    with open_safetensors(folder) as shelf:
        module, refs = build(config, shelf, old.dtype, folder)
    model.metadata = _metadata(model, config)
    model.module, model.tensors = module.requires_grad_(old.requires_grad), refs
    model.parameters = sum(p.numel() for p in module.parameters())
    release_memory()


def _to(state: State, dtype: torch.dtype) -> State:
    return {n: t.to(dtype) for n, t in state.items()}


def _metadata(model: Model, config: Any) -> dict[str, Any]:
    """GGUF's keys with the new numbers; what described the old size goes."""
    out = {k: v for k, v in model.metadata.items() if k != "general.size_label"}
    for key, value in hyperparameters(config, model.name).items():
        if not key.startswith("general.") and (key in out or "scaling" not in key):
            out[key] = value
    return out
