"""The comparison of quantizers: the llama2.c reader, counted bits, nearest rounding, the table."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.quantizers import llama2c, settings, table
from benchmarks.quantizers.peers.nearest import rounded
from benchmarks.quantizers.peers.ours import type_name
from benchmarks.quantizers.runs import read_lines

from joulesmith.compress.quantize.grids import grid

DIM, HIDDEN, LAYERS, HEADS, KV, VOCAB, LENGTH = 16, 20, 2, 4, 2, 11, 8
HEAD = DIM // HEADS


def _tensors(seed: int = 0) -> list[np.ndarray]:
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


def _write(path: Path, tensors: list[np.ndarray]) -> Path:
    header = struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, KV, VOCAB, LENGTH)
    path.write_bytes(header + b"".join(t.tobytes() for t in tensors))
    return path


def _forward(tensors: list[np.ndarray], ids: list[int]) -> np.ndarray:
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
    return norm(x, n3) @ emb.T


@pytest.mark.parametrize("pad_to", [1, 32])
def test_transformers_computes_what_run_c_does(tmp_path: Path, pad_to: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tensors = _tensors()
    config, state = llama2c.read(_write(tmp_path / "m.bin", tensors), pad_to)
    assert config["intermediate_size"] == -(-HIDDEN // pad_to) * pad_to
    module = LlamaForCausalLM(LlamaConfig(**config)).eval()
    loaded = {k: torch.from_numpy(v) for k, v in state.items()}
    loaded["lm_head.weight"] = loaded["model.embed_tokens.weight"]
    module.load_state_dict(loaded)
    ids = [3, 1, 7, 0, 10, 5]
    with torch.no_grad():
        found = module(input_ids=torch.tensor([ids])).logits[0].numpy()
    assert np.abs(found - _forward(tensors, ids)).max() < 1e-5


@pytest.mark.parametrize("change", [-4, 4, None])
def test_a_file_of_another_size_is_refused(tmp_path: Path, change: int | None) -> None:
    path = _write(tmp_path / "m.bin", _tensors())
    raw = path.read_bytes()
    path.write_bytes(raw[:10] if change is None else raw + b"0" * 4 if change > 0 else raw[:change])
    with pytest.raises(ValueError, match=r"m\.bin"):
        llama2c.read(path)


def test_impossible_heads_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(struct.pack("<7i", 16, 20, 2, 3, 2, 11, 8))
    with pytest.raises(ValueError, match="header"):
        llama2c.read(path)


@given(st.sampled_from([2, 3, 4, 8]), st.sampled_from([32, 64, 128]), st.booleans())
def test_bits_are_those_of_the_grid(bits: int, group: int, symmetric: bool) -> None:
    s = settings.Setting(bits, group, symmetric)
    assert settings.by_name(s.name) == s
    assert s.stored_bits() == pytest.approx(grid(type_name(s)).bits_per_weight)


def test_usual_settings_divide_the_rows() -> None:
    for columns in ({576, 1536}, {256, 768}, {64, 192}):
        found = [settings.by_name(n) for n in settings.usual(columns)]
        assert {s.bits for s in found} == {8, 4, 3, 2}
        assert all(c % s.group == 0 for s in found for c in columns)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 3, 4, 8]),
    st.booleans(),
    st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_nearest_is_off_by_half_a_step_at_most(
    seed: int, bits: int, symmetric: bool, size: float
) -> None:
    s = settings.Setting(bits, 32, symmetric)
    w = size * torch.randn(3, 96, generator=torch.Generator().manual_seed(seed))
    r = rounded(w, s)
    groups, back = w.reshape(3, -1, 32), r.reshape(3, -1, 32)
    spread = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
    reach = 2 * groups.abs().amax(-1) if symmetric else spread
    step = reach / (2**bits - 1)
    # Symmetric codes end half a step below the largest weight, hence a whole step there.
    allowed = step * (1.01 if symmetric else 0.51) + 1e-6 * size
    # A rounded zero moves an asymmetric grid by up to half a step, which clips one end.
    allowed = allowed if symmetric else allowed + 0.51 * step
    assert bool(((groups - back).abs() <= allowed[..., None] + 2e-7).all())
    for row in back.reshape(-1, 32):
        assert len(row.unique()) <= 2**bits


def test_the_table_tells_best_spread_and_failures(tmp_path: Path) -> None:
    base = {
        "subject": "s", "setting": "W4-g64", "windows": 8, "layers": None, "threads": 1, "fresh": False,
        "note": "", "origin": "a model", "evaluated_on": "e", "calibrated_on": "c",
        "reference_perplexity": 2.0, "perplexity": 2.1, "top1": 0.9, "seconds": 1.0,
        "cpu_seconds": 1.0, "rss_peak": 2e6, "rss_before": 1e6, "bits_per_weight": 4.25,
        "words": "w", "versions": "v", "forward_check": None,
    }  # fmt: skip
    lines = [
        base | {"peer": p, "variant": "x", "seed": i, "kl": kl}
        for p, kls in (("a", (0.1, 0.12, 0.11)), ("b", (0.2, 0.3, 0.125)))
        for i, kl in enumerate(kls)
    ]
    failed = {
        k: base[k] for k in ("subject", "setting", "windows", "layers", "threads", "fresh", "note")
    }
    lines.append(failed | {"peer": "c", "variant": "x", "seed": 0, "error": "Oops: no | good"})
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"half')
    assert len(read_lines(path)) == 7
    text = table.render(path, "cmd")
    assert "a:x | 4.25 | **0.11 (0.1–0.12)*** |" in text
    assert "b:x | 4.25 | 0.2 (0.125–0.3) |" in text
    assert "| s | c:x | W4-g64 | Oops: no / good |" in text


def test_192_stands_for_128_where_that_does_not_divide() -> None:
    assert "W3-g128" in settings.usual({256, 768})
    assert {"W4-g192", "W4-g64", "W3-g192-zp"} <= set(settings.usual({576, 1536}))
    assert settings.usual({64, 192})[:2] == ["W8-g64", "W8-g64-zp"]
