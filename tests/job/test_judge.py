"""A tied head stored apart from the embedding, and the file that comes of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from joulesmith.compress.quantize import codebooks, ternary
from joulesmith.compress.quantize.grids import grid
from joulesmith.engines.llamacpp import LlamaCpp
from joulesmith.engines.torch_engine import TorchSession
from joulesmith.gguf_file import read_gguf
from joulesmith.job.judge import bits_per_weight, stored_types, write_choice
from joulesmith.models import EMBEDDING, HEAD, Model, gguf_weight, load

pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return load(str(tiny))


@pytest.mark.parametrize(
    ("chosen", "stored"),
    [
        ({}, {}),
        ({EMBEDDING: "Q8_0"}, {EMBEDDING: "Q8_0"}),
        ({EMBEDDING: "Q8_0", HEAD: "IQ4_NL"}, {EMBEDDING: "Q8_0", HEAD: "IQ4_NL"}),
        # An embedding no larger than the head would be stored twice for nothing.
        ({EMBEDDING: "Q8_0", HEAD: "Q8_0"}, {EMBEDDING: "Q8_0"}),
        ({EMBEDDING: "Q8_0", HEAD: "BF16"}, {EMBEDDING: "BF16"}),
        ({HEAD: "IQ4_NL"}, {HEAD: "IQ4_NL"}),
    ],
)
def test_when_a_tied_head_is_stored_apart(
    model: Model, chosen: dict[str, str], stored: dict[str, str]
) -> None:
    assert stored_types(model, chosen) == stored


def test_bits_count_a_second_copy(model: Model) -> None:
    embedding = int(np.prod(model.ref(EMBEDDING).shape))
    weights = sum(int(np.prod(r.shape)) for r in model.matrices())
    tied = bits_per_weight(model, {EMBEDDING: "Q8_0"})
    apart = bits_per_weight(model, {EMBEDDING: "Q8_0", HEAD: "Q4_0"})
    assert apart - tied == pytest.approx(4.5 * embedding / weights)
    assert bits_per_weight(model, {EMBEDDING: "Q8_0", HEAD: "Q8_0"}) == tied


@pytest.mark.parametrize("head", ["Q4_0", "Q8_0"])
def test_the_engine_uses_the_head_that_was_written(
    model: Model, tiny: Path, tmp_path: Path, head: str
) -> None:
    """llama.cpp's logits are those of transformers with an embedding and a head of their own."""
    import torch

    def packed(name: str, kind: str) -> np.ndarray:
        # Nothing that the two uses share: the head's bytes are those of another matrix.
        sign = -1.0 if name == HEAD else 1.0
        return grid(kind).pack(sign * gguf_weight(model, name))

    path = tmp_path / "apart.gguf"
    write_choice(model, packed, {EMBEDDING: "Q8_0", HEAD: head}, path)
    file = read_gguf(path)
    apart = head == "Q4_0"
    assert (HEAD in file.by_name) == apart
    twin = load(str(tiny)).module
    with torch.no_grad():
        if apart:
            twin.lm_head.weight = torch.nn.Parameter(torch.from_numpy(file.dequantize(HEAD)))
        twin.model.embed_tokens.weight.copy_(torch.from_numpy(file.dequantize(EMBEDDING)))
        for name, ref in model.tensors.items():
            if ref.is_matrix and name != EMBEDDING:
                parameter = twin.get_parameter(ref.parameter)
                parameter.copy_(parameter.bfloat16().float())
    tokens = np.arange(1, 60, dtype=np.int32)
    expected = TorchSession(twin).logits(tokens)
    with LlamaCpp().load(path, context=64) as session:
        found = session.logits(tokens)
    # The engine rounds the inputs of block types to 8 bits.
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.9


def test_the_engine_reads_super_blocks_as_we_wrote_them(tiny: Path, tmp_path: Path) -> None:
    """Every codebook and ternary type and IQ4_XS, in one file: llama.cpp's logits are torch's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=0, initializer_range=0.08,
    )  # fmt: skip
    folder = tmp_path / "wide"
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in tiny.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    wide = load(str(folder))
    kinds = [*codebooks.GRIDS, *ternary.GRIDS, "IQ4_XS"]
    blocks = [r.name for r in wide.matrices() if r.layer is not None]
    types = {name: kinds[i % len(kinds)] for i, name in enumerate(blocks)}
    assert set(types.values()) == set(kinds)
    path = tmp_path / "wide.gguf"
    write_choice(wide, lambda name, kind: grid(kind).pack(gguf_weight(wide, name)), types, path)
    stored = read_gguf(path)
    assert {n: stored.by_name[n].type for n in types} == types
    twin = load(path).module
    tokens = np.random.default_rng(0).integers(0, 400, 60).astype(np.int32)
    want = TorchSession(twin).logits(tokens)
    with LlamaCpp(silence=60.0).load(path, context=64, threads=1) as session:
        got = session.logits(tokens)
    # the engine rounds the inputs of every matrix to 8 bits, which costs as much with Q4_K
    assert np.square(got - want).mean() < 0.05**2 * np.square(want).mean()
    untouched = TorchSession(wide.module).logits(tokens)
    assert np.square(untouched - want).mean() > 0.3**2 * np.square(want).mean()  # so this can fail
