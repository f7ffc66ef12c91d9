"""A random Llama of 100 k parameters, as a torch module and as a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from joulesmith.engines.llamacpp import LlamaCpp, LlamaSession

gguf = pytest.importorskip("gguf")
if find_spec("xllamacpp") is None:
    pytest.skip("the engine wheel is not installed", allow_module_level=True)

VOCAB, HIDDEN, HEADS, KV_HEADS, LAYERS, FFN = 128, 64, 4, 2, 2, 128


@pytest.fixture(scope="session")
def module() -> Any:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=1024,
        tie_word_embeddings=False, initializer_range=0.15, rms_norm_eps=1e-5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def write_gguf(module: Any, path: Path) -> Path:
    """float32, with the rotary permutation of q and k that GGUF's llama layout has."""
    state = {k: v.detach().float().numpy() for k, v in module.state_dict().items()}
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(1024)
    w.add_embedding_length(HIDDEN)
    w.add_block_count(LAYERS)
    w.add_feed_forward_length(FFN)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(HIDDEN // HEADS)
    w.add_rope_freq_base(10000.0)
    w.add_vocab_size(VOCAB)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("default")
    w.add_token_list([chr(33 + i) if i < 94 else f"<{i}>" for i in range(VOCAB)])
    w.add_token_types([1] * VOCAB)
    w.add_token_merges(["! #"])
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)

    def rotary(a: np.ndarray, heads: int) -> np.ndarray:
        return a.reshape(heads, 2, a.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(a.shape)

    w.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    w.add_tensor("output_norm.weight", state["model.norm.weight"])
    w.add_tensor("output.weight", state["lm_head.weight"])
    for i in range(LAYERS):
        old, new = f"model.layers.{i}.", f"blk.{i}."
        w.add_tensor(new + "attn_norm.weight", state[old + "input_layernorm.weight"])
        w.add_tensor(new + "ffn_norm.weight", state[old + "post_attention_layernorm.weight"])
        q, k = state[old + "self_attn.q_proj.weight"], state[old + "self_attn.k_proj.weight"]
        w.add_tensor(new + "attn_q.weight", np.ascontiguousarray(rotary(q, HEADS)))
        w.add_tensor(new + "attn_k.weight", np.ascontiguousarray(rotary(k, KV_HEADS)))
        w.add_tensor(new + "attn_v.weight", state[old + "self_attn.v_proj.weight"])
        w.add_tensor(new + "attn_output.weight", state[old + "self_attn.o_proj.weight"])
        for part in ("gate", "up", "down"):
            w.add_tensor(f"{new}ffn_{part}.weight", state[f"{old}mlp.{part}_proj.weight"])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.fixture(scope="session")
def model_file(module: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(module, tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="session")
def engine() -> LlamaCpp:
    return LlamaCpp(silence=60.0)


@pytest.fixture(scope="session")
def session(engine: LlamaCpp, model_file: Path) -> Iterator[LlamaSession]:
    with engine.load(model_file, context=1024, threads=1) as opened:
        yield opened


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCAB, 48, dtype=np.int32)


@pytest.fixture
def windows() -> np.ndarray:
    return np.random.default_rng(2).integers(0, VOCAB, (3, 70), dtype=np.int32)
