"""Training where the tensors are: on the processor, and on a GPU where there is one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed import Killed, killed_at
from transformers import LlamaConfig, LlamaForCausalLM

from joulesmith.energy.meter import EnergyMeter
from joulesmith.train import masks
from joulesmith.train.distil import Distil
from joulesmith.train.loop import Trained, train
from joulesmith.train.recover import recover
from joulesmith.train.recover_settings import DistilSettings, RecoverSettings
from joulesmith.train.scores import HeldOut, scores
from joulesmith.train.settings import TrainSettings
from joulesmith.train.sparse import SparseTraining
from joulesmith.train.sparse_settings import SparseSettings
from joulesmith.train.teacher import cache_top

VOCAB = 24
WINDOWS = np.random.default_rng(0).integers(0, VOCAB, (24, 16)).astype(np.int32)
WINDOWS[:, 1::2] = (WINDOWS[:, ::2] + 1) % VOCAB  # something to learn
HARD = DistilSettings(hard=1, soft=0)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
RATES = {"sgd": 0.5, "momentum": 0.1, "adamw": 1e-2, "adafactor": 0.02, "muon": 0.02}


def llama(device: str, seed: int = 0, width: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device)  # type: ignore[arg-type]


def settings(**given: Any) -> TrainSettings:
    return TrainSettings(**{"steps": 10, "batch": 8, "micro": 4, "rate": 1e-2, **given})


def go(module: Any, s: TrainSettings, objective: Any = None, **given: Any) -> Trained:
    found = train(
        module, WINDOWS, objective or Distil(HARD), s, judge=HeldOut(WINDOWS[:8]), **given
    )
    assert all(map(math.isfinite, found.losses))
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", list(RATES))
def test_every_optimizer_learns(device: str, optimizer: str, precision: str) -> None:
    module = llama(device)
    rate = RATES[optimizer]
    with EnergyMeter() as meter:
        s = settings(optimizer=optimizer, rate=rate, precision=precision, steps=30)
        found = go(module, s, meter=meter)
    assert found.curve[-1][1] < found.curve[0][1] - 0.1
    assert {p.device.type for p in module.parameters()} == {device}
    assert found.joules and found.joules > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "adafactor", "muon"])
def test_a_killed_run_goes_on(tmp_path: Path, device: str, optimizer: str) -> None:
    s = settings(optimizer=optimizer, rate=RATES[optimizer], recompute=True)
    one = go(llama(device), s)
    with pytest.raises(Killed):
        go(llama(device), s, folder=tmp_path, save_seconds=0.0, progress=killed_at(6))
    two = go(module := llama(device, 7), s, folder=tmp_path)
    assert two.losses[:5] == pytest.approx(one.losses[:5], rel=1e-3)
    assert two.losses == pytest.approx(one.losses, rel=1e-2)  # sums on a GPU vary in their order
    assert {p.device.type for p in module.parameters()} == {device}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["static", "magnitude", "movement", "set", "rigl"])
def test_sparse_training(tmp_path: Path, device: str, method: str) -> None:
    s = settings(steps=12)
    moves = {} if method == "static" else {"every": 2, "until": 9}
    chosen = SparseSettings.model_validate(
        {"method": method, "sparsity": 0.75, "layers": ("*.layers.*",), **moves}
    )

    def run(seed: int, **given: Any) -> tuple[Trained, SparseTraining]:
        module = llama(device, seed)
        hook = SparseTraining(module, chosen, s)
        return go(module, s, hook=hook, **given), hook

    one, hook = run(0)
    with pytest.raises(Killed):
        run(0, folder=tmp_path, save_seconds=0.0, progress=killed_at(7))
    two, again = run(7, folder=tmp_path)
    assert two.losses == pytest.approx(one.losses, rel=2e-2)
    assert hook.sparsity == again.sparsity == pytest.approx(0.75, abs=1e-3)
    for name, mask in again.layer_masks().items():
        matrix = again.layers[name].matrix
        assert matrix.device.type == mask.device.type == device
        assert not matrix[~mask].any(), "dead weights are zero"


@gpu
def test_first_masks_are_those_of_the_processor() -> None:
    found = []
    for device in ("cpu", "cuda"):
        module = llama(device)
        s = settings(steps=1)
        hook = SparseTraining(module, SparseSettings(method="static", sparsity=0.8), s)
        go(module, s, hook=hook)
        found.append({n: m.cpu() for n, m in hook.layer_masks().items()})
    assert all(torch.equal(m, found[1][n]) for n, m in found[0].items())


@gpu
def test_losses_and_scores_are_those_of_the_processor() -> None:
    s = settings(steps=4, warmup=0)
    one, two = go(llama("cpu"), s), go(module := llama("cuda"), s)
    assert two.losses == pytest.approx(one.losses, rel=1e-3)
    for kind in ("loss", "gradient"):
        here = scores(module.cpu(), WINDOWS, kind)  # type: ignore[arg-type]
        there = scores(module.cuda(), WINDOWS, kind)  # type: ignore[arg-type]
        np.testing.assert_allclose(there, here, rtol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_bits_of_masks(device: str) -> None:
    mask = torch.rand(7, 13, device=device) < 0.3
    bits = masks.pack(mask)
    assert bits.device.type == device
    assert torch.equal(masks.unpack(bits, mask.shape), mask)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "given",
    [
        {"hard": 0.5, "soft": 0.5},
        {"hard": 0, "soft": 1, "divergence": "reverse"},
        {"hidden": 0.5},
        {"on_policy": 0.5, "continuation": 4},
    ],
)
def test_a_teacher_that_is_there(device: str, given: dict[str, Any]) -> None:
    teacher = llama(device, 5).requires_grad_(False)
    found = go(llama(device), settings(), Distil(DistilSettings(**given), teacher=teacher, eos=0))
    assert found.steps == 10


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_teacher_said(tmp_path: Path, device: str) -> None:
    teacher = llama(device, 5, 64).requires_grad_(False)
    cache = cache_top(teacher, WINDOWS, 8, tmp_path / "top", precision="bfloat16")
    found = go(llama(device), settings(), Distil(DistilSettings(hard=0.5, soft=0.5), cache=cache))
    assert found.curve[-1][1] < found.curve[0][1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["full", "norms", "lora", "INT4-G16", "NF4-G16", "FP6-E2M3-MX"])
def test_recovery(tmp_path: Path, device: str, mode: str) -> None:
    named = mode in ("full", "norms", "lora")
    given_mode = {"mode": mode} if named else {"mode": "quantized", "types": mode}
    how = RecoverSettings.model_validate(given_mode)
    given: dict[str, Any] = {"teacher": llama(device, 5).requires_grad_(False)}
    found = recover(
        llama(device), WINDOWS, settings(steps=4), how, folder=tmp_path, save_seconds=0.0, **given
    )
    assert all(map(math.isfinite, found.trained.losses))
