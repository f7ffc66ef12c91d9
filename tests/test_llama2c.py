"""llama2.c checkpoints as models: what run.c computes, and files that are not what they say."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from joulesmith import models
from joulesmith.errors import JoulesmithError

DIM, HIDDEN, LAYERS, HEADS, KV, VOCAB, LENGTH = 16, 20, 2, 4, 2, 11, 8
HEAD = DIM // HEADS


def tensors_of(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)

    def t(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / shape[-1] ** 0.5).astype("<f4")

    def norm(*shape: int) -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(shape)).astype("<f4")

    kv = KV * HEAD
    return [
        t(VOCAB, DIM), norm(LAYERS, DIM), t(LAYERS, DIM, DIM), t(LAYERS, kv, DIM),
        t(LAYERS, kv, DIM), t(LAYERS, DIM, DIM), norm(LAYERS, DIM), t(LAYERS, HIDDEN, DIM),
        t(LAYERS, DIM, HIDDEN), t(LAYERS, HIDDEN, DIM), norm(DIM), t(2, LENGTH, HEAD // 2),
    ]  # fmt: skip


def write(path: Path, tensors: list[np.ndarray]) -> Path:
    header = struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, KV, VOCAB, LENGTH)
    path.write_bytes(header + b"".join(t.tobytes() for t in tensors))
    return path


def forward(
    tensors: list[np.ndarray], ids: list[int], head: np.ndarray | None = None
) -> np.ndarray:
    """What run.c computes, in float64: rotary pairs are neighbours."""
    emb, n1, q, k, v, o, n2, w1, w2, w3, n3, _ = (t.astype(np.float64) for t in tensors)

    def norm(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        return w * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    def turn(x: np.ndarray) -> np.ndarray:
        y = x.copy()
        for pos in range(x.shape[0]):
            for i in range(0, HEAD, 2):
                angle = pos / 10000.0 ** (i / HEAD)
                a, b = x[pos, :, i], x[pos, :, i + 1]
                y[pos, :, i] = a * np.cos(angle) - b * np.sin(angle)
                y[pos, :, i + 1] = a * np.sin(angle) + b * np.cos(angle)
        return y

    x, n = emb[ids], len(ids)
    for layer in range(LAYERS):
        h = norm(x, n1[layer])
        query = turn((h @ q[layer].T).reshape(n, HEADS, HEAD))
        key = turn((h @ k[layer].T).reshape(n, KV, HEAD)).repeat(HEADS // KV, 1)
        value = (h @ v[layer].T).reshape(n, KV, HEAD).repeat(HEADS // KV, 1)
        out = np.zeros((n, HEADS, HEAD))
        for i in range(n):
            score = np.einsum("hd,jhd->hj", query[i], key[: i + 1]) / HEAD**0.5
            share = np.exp(score - score.max(-1, keepdims=True))
            share /= share.sum(-1, keepdims=True)
            out[i] = np.einsum("hj,jhd->hd", share, value[: i + 1])
        x = x + out.reshape(n, DIM) @ o[layer].T
        h = norm(x, n2[layer])
        gate = h @ w1[layer].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w3[layer].T)) @ w2[layer].T
    return norm(x, n3) @ (emb if head is None else head.astype(np.float64)).T


def field(number: int, value: bytes | int | float) -> bytes:
    """One protocol buffer field; numbers and lengths below 128."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + np.float32(value).tobytes()
    return bytes([number << 3 | 2, len(value)]) + value


def vocabulary(path: Path, pieces: int = VOCAB) -> Path:
    """A SentencePiece model of single letters."""
    raw = b""
    for i in range(pieces):
        text = ["<unk>", "<s>", "</s>", "▁"][i] if i < 4 else chr(93 + i)
        kind = 2 if i == 0 else 3 if i < 3 else 1
        raw += field(1, field(1, text.encode()) + field(2, float(-i)) + field(3, kind))
    path.write_bytes(raw + field(2, field(3, 2)) + field(3, field(3, 1)))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    vocabulary(tmp_path / "tok11.model")
    return write(tmp_path / "m.bin", tensors_of())


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_computes_what_run_c_does(file: Path, tied: bool) -> None:
    tensors = tensors_of()
    if not tied:
        head = tensors_of(1)[0]
        raw = bytearray(write(file, tensors).read_bytes() + head.tobytes())
        raw[20:24] = struct.pack("<i", -VOCAB)
        file.write_bytes(raw)
    model = models.load(file)
    assert model.tied == tied and model.architecture == "llama"
    ids = [3, 1, 7, 0, 10, 5]
    with torch.no_grad():
        found = model.module(input_ids=torch.tensor([ids])).logits[0].numpy()
    wanted = forward(tensors, ids, None if tied else head)
    assert np.abs(found - wanted).max() < 1e-5
    assert model.tokenizer.bos == 1 and model.tokenizer.add_bos
    assert model.tokenizer.decode(model.tokenizer.encode("ab c")) == "ab c"


def test_saved_and_as_gguf_it_says_the_same(file: Path, tmp_path: Path) -> None:
    from joulesmith.export.gguf import write_float_gguf

    model = models.load(file)
    models.save(model, tmp_path / "folder")
    write_float_gguf(model, tmp_path / "m.gguf", "F32")
    ids = torch.tensor([[1, 4, 9, 2]])
    with torch.no_grad():
        wanted = model.module(ids).logits
        for path in ("folder", "m.gguf"):
            again = models.load(tmp_path / path)
            assert torch.allclose(again.module(ids).logits, wanted, atol=1e-5)
            assert again.tokenizer.encode("ab c") == model.tokenizer.encode("ab c")


def test_files_that_are_not_what_they_say(file: Path) -> None:
    raw = file.read_bytes()
    poisoned = bytearray(raw)
    poisoned[28:32] = np.float32("nan").tobytes()
    for bad, match in (
        (raw[:-4], "not a .gguf file"),
        (raw + bytes(4), "not a .gguf file"),
        (raw[:10], "not a .gguf file"),
        (struct.pack("<7i", 16, 20, 2, 3, 2, 11, 8), "not a .gguf file"),
        (struct.pack("<7i", 1 << 16, 1 << 18, 4096, 4, 2, 1 << 22, 1 << 23), "not a .gguf file"),
        (bytes(poisoned), "token_embd.weight .* NaN"),
    ):
        file.write_bytes(bad)
        with pytest.raises(JoulesmithError, match=match):
            models.load(file)


@given(st.binary(max_size=64), st.integers(0, 27))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_header_is_a_model_or_one_line(file: Path, noise: bytes, at: int) -> None:
    raw = bytearray(write(file, tensors_of()).read_bytes())
    raw[at : at + len(noise)] = noise
    file.write_bytes(raw)
    try:
        models.load(file)
    except JoulesmithError as e:
        assert "\n" not in str(e)


def test_the_tokenizer_lies_beside_it(file: Path, tmp_path: Path) -> None:
    vocabulary(tmp_path / "other.model")
    with pytest.raises(JoulesmithError, match=r"several .*model files beside .*: name the right"):
        models.load(file)
    vocabulary(tmp_path / "m.model")
    assert len(models.load(file).tokenizer) == VOCAB
    vocabulary(tmp_path / "m.model", VOCAB + 1)
    with pytest.raises(JoulesmithError, match="12 tokens but 11 embedding rows"):
        models.load(file)
    for path in tmp_path.glob("*.model"):
        path.unlink()
    with pytest.raises(JoulesmithError, match="no SentencePiece tokenizer"):
        models.load(file)
