"""Which inputs of a static type keep a scale by token: by what the whole model loses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.compress.quantize.activations import quantized_inputs
from joulesmith.compress.quantize.input_types import SCHEMES, bounded_inputs, fewest
from joulesmith.compress.quantize.sites import INPUTS

STATIC = SCHEMES["W8A8-STATIC"]
SPIKE = "model.layers.1.mlp.down_proj"


@given(st.integers(0, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_fewest_is_the_least_that_is_within(case: tuple[int, int]) -> None:
    most, wanted = case
    asked: list[int] = []

    def within(n: int) -> bool:
        asked.append(n)
        return n >= wanted

    assert fewest(most, within) == wanted
    assert all(0 <= n < max(1, most) for n in asked) and len(asked) == len(set(asked))
    assert len(asked) <= 2 * (wanted + 1).bit_length() + 1


@pytest.fixture(scope="module")
def model() -> Any:
    """Two layers; at the first position of a text one input of a down projection is huge."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        max_position_embeddings=64,
    )  # fmt: skip
    module: Any = LlamaForCausalLM(config).eval()

    def spike(_: object, args: tuple[torch.Tensor, ...]) -> Any:
        x = args[0].clone()
        x[:, 0, 3] = 3000.0
        return (x,)

    down = module.model.layers[1].mlp.down_proj
    down.register_forward_pre_hook(spike)
    with torch.no_grad():
        down.weight[:, 3] *= 0.01
    return type("Model", (), {"module": module})


def cost(model: Any, windows: np.ndarray, inputs: Any) -> float:
    ids = torch.from_numpy(windows).long()
    with torch.no_grad():
        p = model.module(ids).logits.double().log_softmax(-1)
        with quantized_inputs(model.module, inputs):
            q = model.module(ids).logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_only_what_cannot_be_static_keeps_scales_by_token(model: Any) -> None:
    windows = np.random.default_rng(0).integers(0, 60, (8, 24)).astype(np.int32)
    held = windows[3::4]
    names = [f"model.layers.{i}.{group[0]}" for i in range(2) for group in INPUTS]
    right = {n: 0.01 * k for k, n in enumerate(names)} | {SPIKE: 1.0}
    chosen = {}
    for allowance in (1e9, 0.01, 0.0):
        chosen[allowance] = bounded_inputs(model, windows, STATIC, right, allowance=allowance)
    loose, close, none = chosen.values()
    assert not any(q.scheme.dynamic for q in loose.values())
    assert [n for n, q in close.items() if q.scheme.dynamic] == [SPIKE]
    dynamic = {n: none[n] if none[n].scheme.dynamic else close[SPIKE] for n in none}
    least = cost(model, held, dynamic)
    assert cost(model, held, close) - least <= 0.01 < cost(model, held, loose) - least
    assert cost(model, held, none) - least <= 1e-9
    # where the prediction is wrong, more of them go by token, and the bound still holds
    wrong = bounded_inputs(model, windows, STATIC, {SPIKE: -1.0}, allowance=0.01)
    assert cost(model, held, wrong) - least <= 0.01
    assert sum(q.scheme.dynamic for q in wrong.values()) > 1


def test_the_way_to_choose_ranges_that_loses_less_serves(model: Any) -> None:
    windows = np.random.default_rng(2).integers(0, 60, (8, 24)).astype(np.int32)
    fixed: dict[Any, Any] = {
        m: bounded_inputs(model, windows, STATIC, {SPIKE: 1.0}, allowance=1e9, methods=m)
        for m in (("mse",), ("absmax",), ("mse", "absmax"))
    }
    lost = {m: cost(model, windows[3::4], inputs) for m, inputs in fixed.items()}
    assert fixed["mse",] != fixed["absmax",]
    assert lost["mse", "absmax"] == min(lost.values())


def test_a_single_window_fixes_ranges_and_measures(model: Any) -> None:
    window = np.random.default_rng(1).integers(0, 60, (1, 24)).astype(np.int32)
    found = bounded_inputs(model, window, STATIC, {SPIKE: 1.0}, allowance=0.01)
    assert found[SPIKE].scheme.dynamic and len(found) == 14
