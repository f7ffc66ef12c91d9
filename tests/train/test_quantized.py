"""Linear layers on the grid that they will be stored in: rounding, gradients, packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from joulesmith.compress.quantize.grids import Grid, grid
from joulesmith.errors import JoulesmithError
from joulesmith.train import quantized

GRIDS = ("INT8-G8", "INT4-G8", "INT2-G4", "TERNARY-G8", "INT4-G8-ZP", "INT2-G16-ZP", "NF4-G8")
OTHERS = (
    "Q8_0", "Q4_0", "Q5_0", "TQ1_0", "TQ2_0", "NVFP4", "FP8-E4M3-G32", "FP6-E2M3-G32", "NF4-G64",
)  # fmt: skip


def rounded_layer(kind: str, *, seed: int = 0) -> quantized.QuantizedLinear:
    torch.manual_seed(seed)
    layer = nn.Linear(16, 6)
    with torch.no_grad():
        layer.weight[torch.rand(6, 16) < 0.2] = 0
        layer.weight[2] = 0
    return quantized.quantize(layer, kind)


@pytest.mark.parametrize("kind", GRIDS)
def test_at_first_it_is_the_grid(kind: str) -> None:
    g = grid(kind)
    layer = rounded_layer(kind)
    w = layer.weight.detach().clone()
    raw = g.pack(w)
    assert np.array_equal(g.unpack(layer.packed(), 16), g.unpack(raw, 16))
    assert np.array_equal(layer.rounded().detach().numpy(), g.unpack(raw, 16))
    again = nn.Linear(16, 6)
    with torch.no_grad():
        again.weight.copy_(w)
    other = quantized.quantize(again, kind, raw)
    assert np.array_equal(other.packed(), layer.packed())


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("seed", range(3))
def test_what_was_trained_is_what_is_packed(kind: str, seed: int) -> None:
    """After any move of weights and steps, far ones and float16's smallest included."""
    g = grid(kind)
    layer = rounded_layer(kind, seed=seed)
    with torch.no_grad():
        layer.weight.add_(0.3 * torch.randn_like(layer.weight))
        layer.log_step.add_(torch.randn_like(layer.log_step))
        layer.log_step[:2] = torch.tensor([-40.0, -14.0])
    x = torch.randn(7, 16)
    wanted, y = layer.rounded().detach().clone(), layer(x).detach()
    raw = quantized.settle(layer)
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, wanted)
    assert np.array_equal(g.unpack(raw, 16), layer.weight.detach().numpy())
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_grids_that_train(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(256, 8)
    with torch.no_grad():
        layer.weight[torch.rand(8, 256) < 0.3] = 0
        layer.weight[3] = 0
    made = quantized.quantize(layer, kind)
    with torch.no_grad():
        made.weight.add_(0.02 * torch.randn_like(made.weight))
        made.log_step.add_(0.5 * torch.randn_like(made.log_step))
        made.log_step[0] = -40
    wanted = made.rounded().detach().clone()
    raw = quantized.settle(made)
    assert torch.equal(layer.weight, wanted)
    assert np.array_equal(grid(kind).unpack(raw, 256), wanted.numpy())


@pytest.mark.parametrize("kind", ["INT4-G8", "INT3-G4", "INT3-G8-ZP"])
def test_gradients_are_those_of_learned_step_size(kind: str) -> None:
    """Esser et al. 2020, equations 3 and 5, and section 2.2's scale, written out by element; with
    a zero z, of ``s (q - z)``."""
    g = grid(kind)
    assert isinstance(g, Grid)
    layer = rounded_layer(kind)
    with torch.no_grad():
        layer.weight.mul_(1.7)  # some beyond the ends
        layer.log_step.add_(0.1 * torch.randn_like(layer.log_step))
    upstream = torch.randn(6, 16)
    layer.rounded().backward(upstream)
    step, _ = layer.steps()
    low, high = g.levels[0], g.levels[-1]
    groups = 16 // g.group
    to_step = torch.zeros(6 * groups, dtype=torch.float64)
    outside = 0
    assert layer.weight.grad is not None and layer.log_step.grad is not None
    for r in range(6):
        for c in range(16):
            t = r * groups + c // g.group
            z = 0.0 if layer.zero is None else float(layer.zero[t])
            v = float(layer.weight[r, c].detach()) / float(step[t].detach()) + z
            up = float(upstream[r, c])
            inside = low < v < high
            outside += not inside
            slope = round(v) - v if inside else (low if v <= low else high) - z
            to_step[t] += up * slope
            assert float(layer.weight.grad[r, c]) == pytest.approx(up if inside else 0.0)
    assert outside
    wanted = to_step / (g.group * high) ** 0.5
    # by the logarithm: times the step before it is stored
    wanted = wanted * (layer.first * layer.log_step.exp()).detach().double()
    torch.testing.assert_close(layer.log_step.grad.double(), wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", [*OTHERS, "FP8-E4M3-MX", "FP6-E2M3-MX", "IQ4_NL", "INT4-G32-ZP"])
def test_on_a_gpu_nothing_stays_on_the_processor(kind: str) -> None:
    """torch's fake tensors of a CUDA device refuse what mixes devices, as real ones do. Autograd
    asks for a real one: forward alone."""
    layer = quantized.quantize(nn.Linear(256, 8), kind)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for part in (layer._parameters, layer._buffers):
            for name, t in part.items():
                if t is not None:
                    moved = torch.empty(t.shape, dtype=t.dtype, device="cuda")
                    part[name] = nn.Parameter(moved) if isinstance(t, nn.Parameter) else moved
        assert layer(torch.empty(2, 256, device="cuda")).device.type == "cuda"
        assert isinstance(layer.grid, Grid)
        assert layer.grid.nearest_code(torch.empty(3, 4, device="cuda")).device.type == "cuda"


def test_a_grid_without_zero_cannot_keep_zeros() -> None:
    layer = nn.Linear(32, 4)
    with torch.no_grad():
        layer.weight[0, :3] = 0
    with pytest.raises(JoulesmithError, match="IQ4_NL has no zero"):
        quantized.quantize(layer, "IQ4_NL")
    assert type(layer) is nn.Linear and len(list(layer.parameters())) == 2
    quantized.quantize(layer, "IQ4_NL", keep_zeros=False)
