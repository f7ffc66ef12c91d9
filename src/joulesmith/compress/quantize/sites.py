"""Where scales may be folded in a Llama-like decoder block, and which layers share an input.

Knows the module names that `transformers` gives to Llama, Mistral, Qwen2 and Qwen3 blocks;
no maths.
"""

from __future__ import annotations

from typing import Any

import torch

from joulesmith.compress.quantize.fold import Fold
from joulesmith.errors import JoulesmithError

_NORMS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
)
INPUTS = (*(consumers for _, consumers in _NORMS), ("self_attn.o_proj",), ("mlp.down_proj",))
"""Linear layers of a block by shared input: engines fuse them and want one scheme for each."""
READERS = {
    **{norm: consumers[0] for norm, consumers in _NORMS},
    "self_attn.v_proj": "self_attn.o_proj",
    "mlp.up_proj": "mlp.down_proj",
}
"""The first layer that reads what a fold's producer gives."""


def folds_of(block: torch.nn.Module, config: Any) -> list[Fold]:
    """All folds inside one decoder block, names relative to it.

    Norm weights into the layers that read them; rows of v into the columns of o, where with
    grouped queries several columns read one value channel; rows of up into the columns of
    down, exact since the gate only multiplies up's output. Raises `JoulesmithError` for a
    block of another structure.
    """
    names = {name for name, _ in block.named_modules()}
    wanted = {n for norm, consumers in _NORMS for n in (norm, *consumers)}
    wanted |= {"self_attn.o_proj", "mlp.down_proj"}
    if missing := sorted(wanted - names):
        raise JoulesmithError(
            f"{type(block).__name__} has no {missing[0]}: folding knows the blocks of Llama, "
            "Mistral, Qwen2 and Qwen3"
        )
    found = [Fold(norm, consumers) for norm, consumers in _NORMS]
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    source = tuple(
        (head * kv // heads) * size + channel for head in range(heads) for channel in range(size)
    )
    found.append(Fold("self_attn.v_proj", ("self_attn.o_proj",), source))
    found.append(Fold("mlp.up_proj", ("mlp.down_proj",)))
    return found
