"""Windows: disjoint, spread, seeded; texts that cannot serve are one line."""

import hashlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from joulesmith import text
from joulesmith.errors import JoulesmithError, MissingExtraError


def test_english_says_which_python_it_is_of():
    t = text.english()
    version = ".".join(map(str, sys.version_info[:3]))
    assert version in t.source
    assert t.sha256 == hashlib.sha256(t.text.encode()).hexdigest()
    assert len(t.text) > 300_000 and "expression" in t.text
    assert text.read("english") == t


def test_windows_are_disjoint_and_spread():
    t = text.Text("", "test", "0")
    out = text.split(t, np.arange(1003), 10, {"a": 40, "b": 30, "c": 20}, seed=3)
    assert {k: w.tokens.shape for k, w in out.items()} == {
        "a": (40, 10),
        "b": (30, 10),
        "c": (20, 10),
    }
    assert all(w.tokens.dtype == np.int32 and len(w) == w.tokens.shape[0] for w in out.values())
    used = np.concatenate([w.tokens.ravel() for w in out.values()])
    assert len(set(used.tolist())) == used.size
    for w in out.values():
        assert (w.tokens[:, 0] % 10 == 0).all() and (np.diff(w.tokens, axis=1) == 1).all()
        assert (np.diff(w.tokens[:, 0]) > 0).all()
        # Spread over the text: the mean position is near its middle.
        assert abs(w.tokens.mean() - 500) < 150


def test_windows_are_seeded():
    t = text.Text("", "test", "0")
    a, b, c = (text.split(t, np.arange(500), 10, {"a": 20}, seed=s)["a"].tokens for s in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_bos_is_part_of_the_length():
    t = text.Text("", "test", "0")
    w = text.split(t, np.arange(100), 11, {"a": 10}, bos=7)["a"].tokens
    assert w.shape == (10, 11) and (w[:, 0] == 7).all()
    assert sorted(w[:, 1:].ravel().tolist()) == list(range(100))


def test_too_little_text_says_how_much_is_needed():
    t = text.Text("", "small.txt", "0")
    with pytest.raises(JoulesmithError, match=r"small.txt: 160 tokens needed .* 150 there"):
        text.split(t, np.arange(150), 16, {"a": 6, "b": 4})
    with pytest.raises(JoulesmithError, match="too short"):
        text.split(t, np.arange(150), 1, {"a": 6})


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "empty text"),
        (b" \n\t ", "empty text"),
        (b"\x89PNG\r\n\x1a\n\x00", "not UTF-8"),
        ("žluť".encode("latin2"), "not UTF-8"),
        (b"GGUF\0\0\0\3", "binary"),
    ],
)
def test_files_that_are_no_text_are_one_line(tmp_path, raw, match):
    path = tmp_path / "t.txt"
    path.write_bytes(raw)
    with pytest.raises(JoulesmithError, match=match) as found:
        text.read(path)
    assert "\n" not in str(found.value)


def test_files(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("\ufeffhello žluť".encode())
    found = text.read(str(path))
    assert found.text == "hello žluť" and found.source == "t.txt"
    for bad in (tmp_path, tmp_path / "none"):
        with pytest.raises(JoulesmithError):
            text.read_text(bad)


def test_datasets_need_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match="datasets is not installed"):
        text.read("hf:wikitext")


def test_dataset_names(monkeypatch):
    asked = []

    class Fake:
        @staticmethod
        def load_dataset(name, config, split):
            asked.append((name, config, split))
            if name == "gone":
                raise ConnectionError("no\nnetwork")
            return {"text": ["one", "two", None]}

    monkeypatch.setitem(sys.modules, "datasets", Fake)
    assert text.read("hf:org/name:conf:test").text == "one\ntwo"
    assert text.read("hf:name").text == "one\ntwo"
    assert asked == [("org/name", "conf", "test"), ("name", None, "train")]
    with pytest.raises(JoulesmithError, match="ConnectionError: no: give"):
        text.read("hf:gone")
    with pytest.raises(JoulesmithError, match="not a dataset name"):
        text.read("hf:a b")


class Tiny:
    """A model's outside, as text.py sees it."""

    name = "tiny"

    def __init__(self, module, bos=3, add_bos=False):
        self.module = module
        self.tokenizer = self
        self.bos, self.eos, self.add_bos = bos, 5, add_bos

    def encode(self, t):
        return [ord(c) % 50 for c in t]


@pytest.fixture(scope="module")
def tiny():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    module = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        # A strong bigram structure, so that the sampled distribution can be checked.
        module.lm_head.weight.mul_(60)
    return Tiny(module)


def test_self_samples_follow_the_models_distribution(tiny):
    import torch

    told = []
    w = text.self_samples(tiny, 1500, 3, seed=1, progress=told.append)
    assert w.tokens.shape == (1500, 3) and w.tokens.dtype == np.int32
    assert (w.tokens[:, 0] == 3).all()
    assert told == sorted(told) and told[-1] == 1.0
    with torch.no_grad():
        p = tiny.module(torch.tensor([[3]])).logits[0, -1].softmax(-1).numpy()
    seen = np.bincount(w.tokens[:, 1], minlength=50) / 1500
    # Standard error of each share, five of them; bfloat16 weights add a little.
    assert (np.abs(seen - p) < 5 * np.sqrt(p * (1 - p) / 1500) + 0.01).all()


def test_self_samples_are_seeded_and_keep_the_cache_right(tiny):
    import torch

    a, b = (text.self_samples(tiny, 4, 20, seed=2) for _ in range(2))
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert a.sha256 == b.sha256 and "own samples" in a.source
    assert a.sha256 != text.self_samples(tiny, 4, 20, seed=3).sha256
    # Likely under the model without a cache too: far above what random tokens reach.
    with torch.no_grad():
        logp = tiny.module(torch.from_numpy(a.tokens.astype(np.int64))).logits.log_softmax(-1)
    rng = np.random.default_rng(0)
    picked = np.take_along_axis(logp.numpy()[:, :-1], a.tokens[:, 1:, None].astype(int), -1).mean()
    random = np.take_along_axis(logp.numpy()[:, :-1], rng.integers(0, 50, (4, 19, 1)), -1).mean()
    assert picked > random + 0.5


def test_self_samples_go_on_after_the_batches_that_are_kept(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_BATCHES", (2, 2))
    whole = text.self_samples(tiny, 6, 8, seed=4)
    keep, told = tmp_path / "kept.npz", []

    def killed(share):
        told.append(share)
        if len(told) == 18:  # in the third batch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        text.self_samples(tiny, 6, 8, seed=4, progress=killed, keep=keep)
    again = []
    found = text.self_samples(tiny, 6, 8, seed=4, progress=again.append, keep=keep)
    assert len(again) == 7, "one batch of three"
    np.testing.assert_array_equal(found.tokens, whole.tokens)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.npz"]


@pytest.mark.parametrize(
    ("layers", "heads", "width", "n", "expected"),
    [
        (30, 3, 64, 300, 100),  # small: three batches of one size
        (30, 3, 64, 20, 20),
        (32, 8, 128, 300, 30),  # 33 MB a text: ten of up to 32
        (12, 32, 64, 300, 38),  # 25 MB a text, 42 of them in 1 GiB
    ],
)
def test_more_texts_side_by_side_where_their_cache_is_small(layers, heads, width, n, expected):
    config = SimpleNamespace(
        num_hidden_layers=layers, num_attention_heads=2 * heads, num_key_value_heads=heads,
        head_dim=width, hidden_size=2 * heads * width,
    )  # fmt: skip
    assert text._side_by_side(config, n, 256) == expected


def test_attention_of_one_query_is_torchs(tiny):
    import torch

    torch.manual_seed(1)
    q, k, v = torch.randn(2, 6, 1, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    for n in (5, 3):  # a cache that is full, and one with room behind
        got, _ = text._attend([n], None, q, k, v, None, 8**-0.5)
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k[:, :, :n], v[:, :, :n], enable_gqa=True
        )
        torch.testing.assert_close(got, expected.transpose(1, 2))
    before = tiny.module.config._attn_implementation
    text.self_samples(tiny, 1, 3)
    assert tiny.module.config._attn_implementation == before


def test_self_samples_refuse_what_cannot_be(tiny):
    with pytest.raises(JoulesmithError, match="exceed the model's context of 64"):
        text.self_samples(tiny, 2, 65)
    with pytest.raises(JoulesmithError, match="cannot sample"):
        text.self_samples(tiny, 0, 8)


def test_windows_put_bos_where_the_engine_does(tiny):
    t = text.Text("hello " * 50, "test", "0")
    without = text.windows(Tiny(tiny.module), t, 16, {"a": 2})["a"].tokens
    with_bos = text.windows(Tiny(tiny.module, add_bos=True), t, 16, {"a": 2})["a"].tokens
    assert (with_bos[:, 0] == 3).all() and not (without[:, 0] == 3).all()
