"""The llama.cpp engine against transformers' float32 forward and plain numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax

from joulesmith.engines import ENGINES, get_engine
from joulesmith.engines.base import Engine, Session
from joulesmith.engines.llamacpp import LlamaCpp, LlamaSession, available_threads
from joulesmith.engines.torch_engine import TorchSession
from joulesmith.errors import EngineError, JoulesmithError

VOCAB = 128


def log_probabilities(session: Session, windows: np.ndarray) -> np.ndarray:
    every = [log_softmax(session.logits(w)[:-1].astype(np.float64), axis=1) for w in windows]
    return np.stack(every)


def test_logits_are_those_of_transformers(
    session: LlamaSession, module: Any, tokens: np.ndarray
) -> None:
    with TorchSession(module) as torch_session:
        want = torch_session.logits(tokens)
    got = session.logits(tokens)
    assert got.shape == (tokens.size, VOCAB) and got.dtype == np.float32
    assert want.std() > 0.3  # otherwise the comparison would say little
    # keys and values are kept in float16
    np.testing.assert_allclose(got, want, atol=0.01 * want.std())


def test_a_prompt_longer_than_a_micro_batch_continues_its_context(
    session: LlamaSession, module: Any
) -> None:
    tokens = np.random.default_rng(3).integers(0, VOCAB, 700, dtype=np.int32)
    with TorchSession(module) as torch_session:
        want = torch_session.logits(tokens)
    np.testing.assert_allclose(session.logits(tokens), want, atol=0.02 * want.std())


def test_context_is_empty_at_each_call(session: LlamaSession, tokens: np.ndarray) -> None:
    first = session.logits(tokens)
    session.generate(tokens[:9], 5)
    np.testing.assert_array_equal(first, session.logits(tokens))


def test_score_without_reference(session: LlamaSession, windows: np.ndarray) -> None:
    scores = session.score(windows)
    lp = log_probabilities(session, windows)
    want = -np.take_along_axis(lp, windows[:, 1:, None].astype(int), 2)[..., 0]
    np.testing.assert_allclose(scores.nll, want, atol=1e-4)
    assert scores.kl is None and scores.agree is None


def test_score_against_a_reference(
    session: LlamaSession, windows: np.ndarray, tmp_path: Path
) -> None:
    lq = log_probabilities(session, windows)
    rng = np.random.default_rng(5)
    lp = log_softmax(lq + rng.normal(0, 0.5, lq.shape), axis=-1)
    np.save(tmp_path / "ref.npy", lp.astype(np.float16))
    shares: list[float] = []
    scores = session.score(windows, tmp_path / "ref.npy", shares.append)
    rounded = lp.astype(np.float16).astype(np.float64)
    rounded -= np.log(np.exp(rounded).sum(-1, keepdims=True))
    assert scores.kl is not None and scores.agree is not None
    np.testing.assert_allclose(scores.kl, (np.exp(rounded) * (rounded - lq)).sum(-1), atol=1e-4)
    same = np.take_along_axis(lp.astype(np.float16), lq.argmax(-1)[..., None], 2)[..., 0]
    np.testing.assert_array_equal(scores.agree, same >= lp.astype(np.float16).max(-1))
    assert 0.2 < scores.agree.mean() < 0.98
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_score_of_a_model_against_itself_is_nothing(
    session: LlamaSession, windows: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "ref.npy", log_probabilities(session, windows).astype(np.float16))
    scores = session.score(windows, tmp_path / "ref.npy")
    assert scores.kl is not None and scores.agree is not None
    assert abs(scores.kl).max() < 1e-5 and scores.agree.all()


def test_impossible_tokens_of_the_reference_have_no_weight(
    session: LlamaSession, windows: np.ndarray, tmp_path: Path
) -> None:
    lp = log_probabilities(session, windows)
    lp[..., 7] = -np.inf
    np.save(tmp_path / "ref.npy", log_softmax(lp, axis=-1).astype(np.float16))
    scores = session.score(windows, tmp_path / "ref.npy")
    assert scores.kl is not None and np.isfinite(scores.kl).all()


def test_engines_agree_on_scores(
    session: LlamaSession, module: Any, windows: np.ndarray, tmp_path: Path
) -> None:
    lp = log_probabilities(session, windows)
    noisy = lp + np.random.default_rng(6).normal(0, 0.3, lp.shape)
    np.save(tmp_path / "ref.npy", log_softmax(noisy, axis=-1).astype(np.float16))
    ours = session.score(windows, tmp_path / "ref.npy")
    theirs = TorchSession(module).score(windows, tmp_path / "ref.npy")
    np.testing.assert_allclose(ours.nll, theirs.nll, atol=0.02)
    np.testing.assert_allclose(ours.kl, theirs.kl, atol=0.01)
    assert ours.agree is not None and theirs.agree is not None
    assert (ours.agree == theirs.agree).mean() > 0.97


@pytest.mark.parametrize("shape", [(2, 69, VOCAB), (3, 69, VOCAB + 1), (3, 70, VOCAB)])
def test_reference_of_another_shape(
    session: LlamaSession, windows: np.ndarray, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    np.save(tmp_path / "ref.npy", np.zeros(shape, np.float16))
    with pytest.raises(EngineError, match="belongs to another model") as e:
        session.score(windows, tmp_path / "ref.npy")
    assert "\n" not in str(e.value)


def test_reference_that_is_absent_or_no_array(
    session: LlamaSession, windows: np.ndarray, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match="cannot read the reference"):
        session.score(windows, tmp_path / "none.npy")
    (tmp_path / "bad.npy").write_bytes(b"not numpy")
    with pytest.raises(EngineError, match="cannot read the reference"):
        session.score(windows, tmp_path / "bad.npy")


def test_generate_takes_the_most_likely(session: LlamaSession, tokens: np.ndarray) -> None:
    out = session.generate(tokens, 6)
    grown = np.concatenate([tokens, np.array(out, np.int32)])
    every = session.logits(grown)
    assert out == [int(every[tokens.size - 1 + i].argmax()) for i in range(6)]
    assert session.generate(tokens, 0) == []


def test_bench(session: LlamaSession) -> None:
    bench = session.bench(32, 8, seed=1)
    assert (bench.prefill_tokens, bench.decode_tokens) == (32, 8)
    for reading in (bench.prefill, bench.decode):
        assert 0 < reading.seconds < 30
        assert reading.joules is None or reading.joules > 0
        assert all(type(p).__name__ == "Part" for p in reading.parts)
    assert bench.peak_rss is None or 5e6 < bench.peak_rss < 5e9


@pytest.mark.parametrize("prefill, decode", [(0, 4), (4, 0), (1020, 5)])
def test_bench_that_does_not_fit(session: LlamaSession, prefill: int, decode: int) -> None:
    with pytest.raises(EngineError, match=r"at least 1|do not fit"):
        session.bench(prefill, decode)


def test_tokens_that_cannot_be(session: LlamaSession) -> None:
    for bad, words in [
        (np.zeros(1025, np.int32), "do not fit the context"),
        (np.array([VOCAB], np.int32), "outside the vocabulary"),
        (np.array([-1], np.int32), "outside the vocabulary"),
        (np.zeros(0, np.int32), "no tokens"),
        (np.zeros((2, 2), np.int32), "dimension"),
    ]:
        with pytest.raises(EngineError, match=words):
            session.logits(bad)
    with pytest.raises(EngineError, match="length >= 2"):
        session.score(np.zeros((2, 1), np.int32))
    with pytest.raises(EngineError, match="do not fit"):
        session.score(np.zeros((1, 2000), np.int32))


def test_a_small_context(engine: LlamaCpp, model_file: Path) -> None:
    with engine.load(model_file, context=16, threads=1) as small:
        assert small.logits(np.arange(16, dtype=np.int32)).shape == (16, VOCAB)
        small.bench(12, 4)
        with pytest.raises(EngineError, match="do not fit the context of 16"):
            small.bench(13, 4)


def test_settings_that_make_no_sense(engine: LlamaCpp, model_file: Path) -> None:
    with pytest.raises(EngineError, match="threads"):
        engine.load(model_file, threads=0)
    with pytest.raises(EngineError, match="context"):
        engine.load(model_file, context=0)


def test_identity(engine: LlamaCpp) -> None:
    assert engine.name in ENGINES
    assert "llama.cpp" in engine.version and "b11549" in engine.version
    assert engine.version == LlamaCpp().version
    assert "CPU" in engine.system_info
    assert 1 <= available_threads() == engine.threads


def test_get_engine() -> None:
    engine: Engine = get_engine("llama.cpp")
    assert engine.name == "llama.cpp"
    with pytest.raises(JoulesmithError, match=r"unknown engine 'vllm': one of llama\.cpp"):
        get_engine("vllm")


def test_a_cache_type_changes_what_attention_reads(
    engine: LlamaCpp, model_file: Path, session: LlamaSession, tokens: np.ndarray
) -> None:
    plain = session.logits(tokens)
    with engine.load(model_file, context=64, threads=1, cache_type="BF16") as coarse:
        off = np.abs(coarse.logits(tokens) - plain)
    assert 0 < off.max() < 0.2 * plain.std()
    # heads of 16 channels hold no block of 32: llama.cpp says so
    with pytest.raises(EngineError, match="q8_0"):
        engine.load(model_file, context=64, threads=1, cache_type="Q8_0")
    with pytest.raises(EngineError, match="no key-value cache of type Q4_K"):
        engine.load(model_file, context=64, threads=1, cache_type="Q4_K")
