"""Faster training passes: the same gradients, and nothing of it left behind."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from joulesmith.train import losses, outputs

TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, 40, (2, 9)))


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa",
        )
    )  # fmt: skip


def gradients(module: nn.Module) -> list[torch.Tensor]:
    loss = losses.hard(outputs.run(module, TOKENS[:, :-1]).logits, TOKENS[:, 1:])
    loss.backward()  # type: ignore[no-untyped-call]
    found = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad(set_to_none=True)
    return found


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_fused_gradients_are_the_same() -> None:
    module = model()
    plain = gradients(module)
    with outputs.fused(module, "aot_eager") as compiled:  # inductor takes a minute
        assert compiled
        assert module.config._attn_implementation == "eager"
        found = gradients(module)
        with outputs.plainly(), torch.no_grad():
            here = outputs.run(module, TOKENS).logits
    assert len(found) == len(plain)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert module.config._attn_implementation == "sdpa"
    assert all(m._compiled_call_impl is None for m in module.modules())
    with torch.no_grad():
        torch.testing.assert_close(here, outputs.run(module, TOKENS).logits)


def test_fused_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    module = model()
    plain = gradients(module)
    with outputs.fused(module) as compiled:
        assert not compiled
        for a, b in zip(gradients(module), plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_fused_of_what_has_no_blocks() -> None:
    with outputs.fused(nn.Linear(2, 2)) as compiled:
        assert not compiled
