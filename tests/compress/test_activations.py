"""Rounded inputs against the compressed-tensors library and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from joulesmith.compress.quantize import ranges
from joulesmith.compress.quantize.activations import (
    BINS,
    FP8_MAX,
    RATIOS,
    InputQuantizer,
    Method,
    Scheme,
    levels_of,
    observe,
    quantized_inputs,
    round_to,
    scale_of,
    static_quantizer,
    token_scale,
)
from joulesmith.compress.quantize.floats import FloatGrid
from joulesmith.compress.quantize.gptq import gptq, output_error
from joulesmith.compress.quantize.grids import grid
from joulesmith.compress.quantize.histograms import Histogram
from joulesmith.errors import JoulesmithError

SCHEMES = [Scheme(), Scheme(symmetric=False), Scheme("fp8")]
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E4M3 = E4M3[E4M3.isfinite()].unique()


def drawn(seed: int, rows: int = 7, columns: int = 40) -> torch.Tensor:
    """Heavy-tailed, off centre, with a row of zeros."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g) * torch.randn(rows, 1, generator=g).exp() + 0.3
    x[0] = 0
    x[1, 3] *= 1000
    return x


@pytest.mark.parametrize("scheme", SCHEMES)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_tokens_are_rounded_as_the_library_rounds_them(scheme: Scheme, seed: int) -> None:
    lib = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    args = lib.QuantizationArgs(
        num_bits=8,
        type="float" if scheme.kind == "fp8" else "int",
        symmetric=scheme.symmetric,
        strategy="token",
        dynamic=True,
    )
    x = drawn(seed)[None]
    scale, zero = helpers.compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1))
    want = forward.fake_quantize(x, scale, zero, args)
    torch.testing.assert_close(InputQuantizer(scheme)(x), want, rtol=0, atol=0)


def test_fp8_is_the_nearest_of_all_its_values() -> None:
    x = torch.linspace(-500, 500, 4001)
    got = round_to(x, torch.tensor(1.0), None, "fp8").double()
    distance = (x.double().clamp(-FP8_MAX, FP8_MAX)[:, None] - E4M3).abs()
    best = distance.min(1).values
    torch.testing.assert_close((x.double().clamp(-FP8_MAX, FP8_MAX) - got).abs(), best)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_least_squares_range_is_near_the_best_of_all(scheme: Scheme) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(20000, generator=g, dtype=torch.float64) + 0.5
    x[:3] *= 30  # so far out that covering them costs the rest
    static = Scheme(scheme.kind, False, scheme.symmetric)
    seen = Histogram(bins=BINS)
    seen.observe(x)

    def error(low: float, high: float) -> float:
        ends = torch.tensor([low, high], dtype=torch.float64)
        rounded = round_to(x, *scale_of(ends[0], ends[1], static), scheme.kind)
        return float((x - rounded).square().sum())

    def found(method: Method) -> float:
        return float((x - static_quantizer(seen, static, method)(x)).square().sum())

    every = np.geomspace(1, float(x.abs().max()), 200)
    if scheme.symmetric:
        best = min(error(-c, c) for c in every)
    else:
        best = min(error(-a, b) for a in every[::4] for b in every[::4])
    assert found("mse") <= 1.05 * best
    if scheme.kind == "int8":
        assert best < found("absmax")
        # the usual values inside, the outliers outside
        reached = static_quantizer(seen, static, "kl")(torch.tensor([-1e6, 1e6])).tolist()
        assert reached[0] < -1.5 and reached[1] > 2
        whole = static_quantizer(seen, static, "absmax")(torch.tensor([-1e6, 1e6])).tolist()
        assert reached[1] - reached[0] < 0.9 * (whole[1] - whole[0])


def test_percentiles_are_those_of_the_values() -> None:
    x = torch.randn(50000, generator=torch.Generator().manual_seed(0)) * 3 + 1
    seen = Histogram(bins=BINS)
    seen.observe(x)
    q = static_quantizer(seen, Scheme(dynamic=False), "percentile", 0.99)
    assert q(torch.tensor([1e3])).item() == pytest.approx(float(x.abs().quantile(0.99)), rel=0.03)
    q = static_quantizer(seen, Scheme(dynamic=False, symmetric=False), "percentile", 0.99)
    low, high = q(torch.tensor([-1e3, 1e3])).tolist()
    assert low == pytest.approx(float(x.quantile(0.005)), rel=0.03)
    assert high == pytest.approx(float(x.quantile(0.995)), rel=0.03)


def test_usual_values_are_seen_beside_huge_ones() -> None:
    # An opening token a thousand times the usual, which may be clipped: the range that is
    # chosen from the histogram is as good as the one chosen from the values themselves.
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    x[0] = 1000.0
    seen = Histogram(bins=BINS)
    seen.observe(x)
    static = Scheme(dynamic=False, symmetric=False)
    clipped = static_quantizer(seen, static)
    exact = ranges.mse_grid(x[None], levels_of(static), ratios=RATIOS)
    assert clipped.scale == pytest.approx(float(exact.step), rel=0.1)
    usual = (x - clipped(x))[1:].square().mean(), (x - exact.fake(x[None])[0])[1:].square().mean()
    assert usual[0] <= 1.1 * usual[1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_static_scale_is_a_float16_that_covers_the_range(scheme: Scheme) -> None:
    x = drawn(5)
    seen = Histogram(bins=BINS)
    seen.observe(x)
    static = Scheme(scheme.kind, False, scheme.symmetric)
    q = static_quantizer(seen, static, "absmax")
    assert q.scale is not None and q.scale == float(torch.tensor(q.scale).half())
    step = q.scale if scheme.kind == "int8" else 448 * q.scale / 16
    assert (q(x) - x).abs().max() <= 1.1 * step


def test_hooks_round_what_layers_read_and_go_away() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    x = torch.randn(5, 8)
    plain = module(x)
    q = InputQuantizer(Scheme())
    with quantized_inputs(module, {"0": q, "2": q}):
        got = module(x)
    want = module[2](q(torch.relu(module[0](q(x)))))
    assert torch.equal(got, want) and not torch.equal(got, plain)
    assert torch.equal(module(x), plain)
    with (
        pytest.raises(JoulesmithError, match="no linear layer"),
        quantized_inputs(module, {"0": q, "1": q}),
    ):
        pass
    assert torch.equal(module(x), plain)


def test_bad_settings_are_one_line() -> None:
    for make, match in (
        (lambda: Scheme("fp8", symmetric=False), "no zero point"),
        (lambda: InputQuantizer(Scheme(), 1.0), "dynamic ones have none"),
        (lambda: InputQuantizer(Scheme(dynamic=False)), "need a scale"),
        (lambda: InputQuantizer(Scheme(dynamic=False), float("nan")), "not above 0"),
        (lambda: InputQuantizer(Scheme(dynamic=False), 1.0, 3.0), "zero point"),
        (lambda: static_quantizer(Histogram(), Scheme(dynamic=False)), "nothing was observed"),
    ):
        with pytest.raises(JoulesmithError, match=match):
            make()


def test_observe_sees_every_input() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)
            self.seen: list[torch.Tensor] = []

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            x = torch.nn.functional.one_hot(input_ids % 4, 4).float() * (input_ids[..., None] - 2)
            self.seen.append(x)
            return self.layer(x)

    model = Model()
    found = observe(model, ["layer"], [torch.arange(6)[None], torch.arange(9)[None]])
    every = torch.cat([x.flatten() for x in model.seen])
    assert found["layer"].counts.sum() == every.numel()
    assert (found["layer"].low, found["layer"].high) == (every.min(), every.max())
    assert not model.layer._forward_pre_hooks


def test_a_token_of_zeros_stays_zero() -> None:
    for scheme in SCHEMES:
        assert not InputQuantizer(scheme)(torch.zeros(2, 8)).any()
        assert (token_scale(torch.zeros(2, 8), scheme)[0] > 0).all()


# -- FP8 weights ------------------------------------------------------------------


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 5), columns=st.integers(1, 70))
@settings(max_examples=25, deadline=None)
def test_fp8_rows_are_the_nearest_values_in_torchs_own_bytes(
    seed: int, rows: int, columns: int
) -> None:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05
    g = grid(f"FP8-G{columns}")
    assert isinstance(g, FloatGrid)
    packed = g.pack(w)
    raw, scale = g.stored(packed, columns)
    back = torch.from_numpy(g.unpack(packed, columns))
    assert raw.dtype == torch.float8_e4m3fn and bool(raw.float().isfinite().all())
    torch.testing.assert_close(raw.float() * scale, back, rtol=0, atol=0)
    nearest = (w.double()[..., None] - scale.double()[..., None] * E4M3).abs().min(-1).values
    torch.testing.assert_close((w.double() - back.double()).abs(), nearest, rtol=1e-5, atol=1e-8)
    assert (g.write(*g.read(packed, columns)) == packed).all()


def test_fp8_feedback_lowers_the_output_error() -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(24, 48, generator=g)
    x = torch.randn(300, 48, generator=g) @ torch.randn(48, 48, generator=g)
    h, fp8 = x.T @ x, grid("FP8-G48")
    near, fed = output_error(w, fp8.pack(w), h, fp8), output_error(w, gptq(w, h, fp8), h, fp8)
    assert fed < 0.7 * near
