"""The torch session against direct calls of the module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from joulesmith.engines.torch_engine import TorchSession
from joulesmith.errors import EngineError


def test_logits_and_generation(module: Any, tokens: np.ndarray) -> None:
    import torch

    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad():
        want = module(input_ids=ids).logits[0].numpy()
        grown = module.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )[0, tokens.size :]  # fmt: skip
    with TorchSession(module) as session:
        np.testing.assert_allclose(session.logits(tokens), want, atol=1e-5)
        assert session.generate(tokens, 5) == grown.tolist()


def test_score(module: Any, windows: np.ndarray, tmp_path: Path) -> None:
    import torch

    ids = torch.from_numpy(windows.astype(np.int64))
    with torch.no_grad():
        lq = torch.log_softmax(module(input_ids=ids).logits[:, :-1], -1)
    np.save(tmp_path / "ref.npy", lq.numpy().astype(np.float16))
    shares: list[float] = []
    scores = TorchSession(module).score(windows, tmp_path / "ref.npy", shares.append)
    want = -lq.gather(2, ids[:, 1:, None])[..., 0].numpy()
    np.testing.assert_allclose(scores.nll, want, atol=1e-5)
    assert scores.kl is not None and np.abs(scores.kl).max() < 1e-5
    assert scores.agree is not None and scores.agree.all()
    assert shares[-1] == 1.0


def test_bench_and_mode(module: Any) -> None:
    module.train()
    try:
        bench = TorchSession(module).bench(16, 4)
        assert module.training
    finally:
        module.eval()
    assert bench.prefill.seconds > 0 and bench.decode.seconds > 0
    assert bench.peak_rss is None or bench.peak_rss > 1e7


def test_refusals(module: Any) -> None:
    session = TorchSession(module)
    for bad in (np.zeros(0, np.int32), np.array([128], np.int32), np.zeros((2, 2), np.int32)):
        with pytest.raises(EngineError):
            session.logits(bad)
    with pytest.raises(EngineError, match="at least 1"):
        session.bench(4, 0)
    session.close()
    with pytest.raises(EngineError, match="closed"):
        session.logits(np.zeros(2, np.int32))
