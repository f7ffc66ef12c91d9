"""A key-value cache for `transformers` whose keys and values stay packed in memory.

    model.generate(..., past_key_values=PackedCache(model.config, KVScheme(4)))

What attention reads is what is stored, in the first pass over a prompt too, so that a
perplexity measured in one pass is that of the cache. With keys by channel, up to a group of
the newest keys waits unpacked until the group is full (KIVI's residual, as short as it can be;
values wait for nothing), and `nbytes` counts it. Keys and values of one layer are
unpacked at a time, in torch: memory is saved, and no time. Knows schemes; no search.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from joulesmith.compress.quantize.kv_cache import (
    KVScheme,
    Packed,
    hadamard,
    join,
    pack,
    turned,
    unpack,
)
from joulesmith.errors import JoulesmithError
from joulesmith.models import cache_word


class PackedLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values. ``keys`` holds those that wait for a full group."""

    def __init__(self, scheme: KVScheme, frequencies: Tensor | None = None) -> None:
        """frequencies: of the keys' position embedding, where the scheme takes it off."""
        super().__init__()
        if scheme.rope and frequencies is None:
            raise JoulesmithError("the frequencies of the position embedding are not known")
        self.scheme = scheme
        self.frequencies = frequencies if scheme.rope else None
        self._dtype = torch.float32
        self._heads = 0
        self._packed: dict[str, Packed | None] = {"keys": None, "values": None}
        self._rotation: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take over dtype and device; keys and values (batch, heads, tokens, channels)."""
        super().lazy_initialization(key_states, value_states)
        self._dtype = key_states.dtype
        self._heads = int(key_states.shape[1])
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        for states in (key_states, value_states):
            self.scheme.check(states.shape[-1])

    def _turn(self, x: Tensor) -> Tensor:
        """Rotate the channels; the matrix is its own inverse."""
        if not self.scheme.rotate:
            return x
        if self._rotation is None or self._rotation.shape[0] != x.shape[-1]:
            self._rotation = hadamard(x.shape[-1]).to(x.device)
        return (x.float() @ self._rotation).to(x.dtype)

    @property
    def _run(self) -> int:
        """Keys that share a scale in time."""
        return self.scheme.group if self.scheme.keys == "channel" else 1

    def _append(self, what: str, x: Tensor, run: int) -> None:
        if not x.shape[-2]:
            return
        packed = self._packed[what]
        if what == "keys" and self.frequencies is not None:
            start = 0 if packed is None else int(packed.codes.shape[-2])
            x = turned(x, self.frequencies, start, back=True)
        x = self._turn(x)
        columns = 1
        if run == 1:
            columns = self.scheme.columns(*x.shape[1::2])
            if columns > x.shape[-1]:  # heads side by side
                x = x.transpose(1, 2).flatten(-2)[:, None]
        new = pack(
            x,
            self.scheme.bits,
            tokens=run,
            columns=columns,
            symmetric=self.scheme.symmetric,
        )
        self._packed[what] = join(packed, new)

    def _read(self, what: str, waiting: Tensor) -> Tensor:
        found = self._packed[what]
        if found is None:
            return waiting
        stored = unpack(found, self.scheme.bits, torch.float32)
        if stored.shape[1] != self._heads:
            b, _, n, _ = stored.shape
            stored = stored.view(b, n, self._heads, -1).transpose(1, 2)
        stored = self._turn(stored)
        if what == "keys" and self.frequencies is not None:
            stored = turned(stored, self.frequencies, 0, back=False)
        stored = stored.to(self._dtype)
        return torch.cat([stored, waiting], dim=-2) if waiting.shape[-2] else stored

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens and return all, as they read back."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = torch.cat([self.keys, key_states], dim=-2)
        full = keys.shape[-2] // self._run * self._run
        self._append("keys", keys[..., :full, :], self._run)
        self.keys = keys[..., full:, :].clone()
        self._append("values", value_states, 1)
        return self._read("keys", self.keys), self._read("values", self.values)

    def get_seq_length(self) -> int:
        """Tokens held."""
        found = self._packed["values"]
        return 0 if found is None else int(found.codes.shape[-2])

    @property
    def nbytes(self) -> int:
        """Bytes of everything held."""
        if not self.is_initialized:
            return 0
        waiting = self.keys.numel() * self.keys.element_size()
        return waiting + sum(p.nbytes for p in self._packed.values() if p is not None)

    # -- what generation strategies ask for --------------------------------------

    def reset(self) -> None:
        """Forget all tokens."""
        self._packed = {"keys": None, "values": None}
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest ``-tokens_to_remove`` tokens."""
        if tokens_to_remove > 0:
            raise ValueError("give the tokens to remove as a negative number")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        left = max(0, self.get_seq_length() + tokens_to_remove)
        keys = self._packed["keys"]
        whole = 0 if keys is None else int(keys.codes.shape[-2])
        if left >= whole:
            self.keys = self.keys[..., : left - whole, :].clone()
        else:
            # Of a group that is cut, what is left waits again, as it read back.
            full = left // self._run * self._run
            back = self._read("keys", self.keys)
            self.keys = back[..., full:left, :].clone()
            self._keep("keys", full, self._run)
        self._keep("values", left, 1)

    def _keep(self, what: str, tokens: int, run: int) -> None:
        found = self._packed[what]
        if found is not None:
            self._packed[what] = found.tokens(0, tokens, run) if tokens else None

    def _take(self, index: Tensor) -> None:
        if not self.is_initialized:
            return
        index = index.to(self.keys.device)
        self.keys, self.values = self.keys[index], self.values[index]
        for what, found in self._packed.items():
            if found is not None:
                self._packed[what] = found.take(index)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the batch into another order, for beam search."""
        self._take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the batch."""
        self._take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each of the batch ``repeats`` times."""
        if self.is_initialized:
            self._take(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def offload(self) -> None:
        """To the processor's memory."""
        super().offload()
        self._move("cpu")

    def prefetch(self) -> None:
        """Back to where attention runs."""
        super().prefetch()
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        for what, found in self._packed.items():
            if found is not None:
                self._packed[what] = found.to(device)


def frequencies(config: Any, channels: int) -> Tensor:
    """Radians a token by which a model's position embedding turns each pair of channels.

    As the text config says it, in the words of any `transformers`. Where a model turns
    otherwise (by length, or neighbouring channels), packing loses by it and reading stays
    exact.
    """
    told = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = told.get("rope_type", told.get("type", "default"))
    if kind != "default":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        if kind in ROPE_INIT_FUNCTIONS:
            found: Tensor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0]
            return found.float()
    base = float(told.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)
    part = told.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1
    width = int(channels * part)
    return base ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)


class PackedCache(Cache):  # type: ignore[misc]
    """A cache of `PackedLayer`s for ``config``.

    Raises `JoulesmithError` for models with sliding or linear attention, or with heads that
    the scheme does not fit.
    """

    def __init__(self, config: Any, scheme: KVScheme) -> None:
        text = config.get_text_config(decoder=True)
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        if kinds - {"full_attention"}:
            raise JoulesmithError(
                f"a packed cache holds full attention only, and the model has "
                f"{', '.join(sorted(kinds - {'full_attention'}))}"
            )
        heads = text.num_attention_heads
        channels = getattr(text, "head_dim", None) or text.hidden_size // heads
        scheme.check(channels)
        held = getattr(text, "num_key_value_heads", None) or heads
        self.bits_per_value = scheme.bits_for(held, channels)
        turning = frequencies(text, channels) if scheme.rope else None
        layers = [PackedLayer(scheme, turning) for _ in range(text.num_hidden_layers)]
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, as held."""
        return sum(layer.nbytes for layer in self.layers)


@contextmanager
def packed_cache(module: Any, scheme: KVScheme) -> Iterator[None]:
    """While open, ``module`` (a causal language model) starts every text on a `PackedCache`,
    also where it was asked for no cache: its logits are those of generation with it."""

    word = cache_word(module)

    def start(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get(word) is None:
            cache = PackedCache(module.config, scheme)
            return args, {**kwargs, word: cache, "use_cache": True}
        return None

    handle = module.register_forward_pre_hook(start, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
