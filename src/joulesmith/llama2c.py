"""A llama2.c checkpoint as a model: its tensors one by one, its config, its vocabulary.

The header's reader, which proves that sizes add up, is `formats.llama2c_file`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from joulesmith.architectures import MAX_LAYERS, TensorRef
from joulesmith.errors import JoulesmithError
from joulesmith.formats.files import AGAIN, StoredTensor
from joulesmith.formats.llama2c_file import Llama2c
from joulesmith.weights import in_torch_order

if TYPE_CHECKING:
    import torch


class Llama2cShelf:
    """Tensors of a llama2.c checkpoint: one stored tensor has all layers of a kind.

    Rotary pairs are neighbours in it, as in GGUF.
    """

    def __init__(self, header: Llama2c, stored: Sequence[StoredTensor]) -> None:
        self.header = header
        self.stored = {t.name: t for t in stored}

    def _place(self, ref: TensorRef) -> tuple[StoredTensor, tuple[int, ...]] | None:
        role = ref.name.removesuffix(".weight").rpartition(".")[2]
        found = self.stored.get(_LLAMA2C.get(role, ""))
        if found is None:
            return None
        return found, found.shape[1:] if ref.layer is not None else found.shape

    def shape(self, ref: TensorRef) -> tuple[int, ...] | None:
        found = self._place(ref)
        return None if found is None else found[1]

    def read(self, ref: TensorRef) -> torch.Tensor:
        found = self._place(ref)
        assert found is not None  # its shape was asked for before
        tensor, shape = found
        count = math.prod(shape)
        at = tensor.offset + 4 * count * (ref.layer or 0)
        try:
            values = np.fromfile(tensor.file, "<f4", count, offset=at)
        except OSError as e:
            raise JoulesmithError(f"cannot read: {tensor.file}: {e.strerror or e}") from e
        if values.size != count:
            raise JoulesmithError(f"truncated: {tensor.file}: {AGAIN}")
        values = values.astype(np.float32, copy=False).reshape(shape)
        return in_torch_order(values, ref)

    def unused(self, refs: Mapping[str, TensorRef]) -> list[str]:
        return []  # the header says what there is, and tables are computed anew


_LLAMA2C = {
    "token_embd": "tok_embeddings", "output_norm": "norm", "output": "output",
    "attn_norm": "attention_norm", "attn_q": "wq", "attn_k": "wk", "attn_v": "wv",
    "attn_output": "wo", "ffn_norm": "ffn_norm", "ffn_gate": "w1", "ffn_down": "w2",
    "ffn_up": "w3",
}  # fmt: skip


def llama2c_config(header: Llama2c) -> Any:
    """The `transformers` config of a llama2.c checkpoint; its epsilon and its base of rotary
    frequencies are constants of run.c. Ids of BOS and EOS are SentencePiece's."""
    from transformers import LlamaConfig

    if header.layers > MAX_LAYERS:  # the config makes a list as long as this
        raise JoulesmithError(f"{header.layers} layers are absurd for a llama2.c checkpoint")
    return LlamaConfig(
        vocab_size=header.vocabulary,
        hidden_size=header.hidden,
        intermediate_size=header.intermediate,
        num_hidden_layers=header.layers,
        num_attention_heads=header.heads,
        num_key_value_heads=header.kv_heads,
        max_position_embeddings=header.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=header.tied,
        bos_token_id=1,
        eos_token_id=2,
    )


def vocabulary_beside(path: Path) -> Path:
    """The SentencePiece model that goes with a checkpoint: of its name, or the only one there."""
    for name in (path.with_suffix(".model"), path.with_name("tokenizer.model")):
        if name.is_file():
            return name
    found = sorted(p for p in path.parent.glob("*.model") if p.is_file())
    if len(found) == 1:
        return found[0]
    what = "several *.model files" if found else "no SentencePiece tokenizer (*.model)"
    raise JoulesmithError(f"{what} beside {path}: name the right one {path.stem}.model")
