"""Serving: what no model of a device may say, our own measured rows, and one line for bad input."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published import LLAMA_8B, LLAMA_70B, QWEN3_30B

from joulesmith.errors import JoulesmithError
from joulesmith.estimate.devices import Device, all_devices, find
from joulesmith.estimate.model import work
from joulesmith.estimate.model.hub_config import of_config
from joulesmith.estimate.model.plain import of_numbers
from joulesmith.estimate.model.shape import Shape
from joulesmith.estimate.serving import serve as serving
from joulesmith.estimate.serving import setup as serving_setup
from joulesmith.estimate.serving.roofline import cost
from joulesmith.estimate.serving.serve import serve, steady
from joulesmith.estimate.serving.setup import Setup, Traffic

EIGHT, SEVENTY = of_config(LLAMA_8B, name="8B"), of_config(LLAMA_70B, name="70B")
MIXTURE = of_config(QWEN3_30B, name="30B-A3B")
H100 = find("H100")
# all whose serving can be told
KNOWN = tuple(
    d for d in all_devices()
    if d.tdp_w is not None and d.bandwidth is not None and d.peak("bf16") is not None
)  # fmt: skip
devices = st.sampled_from(KNOWN)
SHAPES = {
    "8B": EIGHT, "70B": SEVENTY, "30B-A3B": MIXTURE, "130M": of_numbers(1.3e8),
    "400B": of_numbers(4e11),
}  # fmt: skip
names = st.sampled_from(list(SHAPES))  # by name: a shape of 126 layers is long to print
setups = st.builds(
    Setup,
    device=devices,
    devices=st.sampled_from([1, 2, 3, 8]),
    weights=st.sampled_from([None, "bf16", "fp8", "int8", "q4_k", 4.5, 2.0]),
    cache_bits=st.sampled_from([8, 16]),
    engine=st.sampled_from([None, *serving_setup.engines()]),
)
traffics = st.builds(
    Traffic,
    batch=st.integers(1, 2000),
    prompt=st.integers(0, 20_000),
    output=st.integers(1, 20_000),
    reach=st.sampled_from([None, 0.5, 1.0]),
)


def free(shape: Shape, setup: Setup, traffic: Traffic) -> serving.Served:
    """Without the question of memory."""
    return serve(shape, setup, traffic, check=False)


def not_less(a: float, b: float) -> bool:
    return a >= b * (1 - 1e-9)


@given(names, setups, traffics, st.floats(1.01, 20))
def test_more_output_costs_no_less_a_request(
    name: str, setup: Setup, traffic: Traffic, x: float
) -> None:
    shape = SHAPES[name]
    more = replace(traffic, output=traffic.output * x)
    a, b = free(shape, setup, traffic), free(shape, setup, more)
    assert not_less(b.joules_per_request.value, a.joules_per_request.value)


@given(names, setups, traffics, st.integers(1, 10_000))
def test_a_longer_prompt_costs_no_less(name: str, setup: Setup, traffic: Traffic, n: int) -> None:
    shape = SHAPES[name]
    a = free(shape, setup, traffic)
    b = free(shape, setup, replace(traffic, prompt=traffic.prompt + n))
    assert not_less(b.joules_per_request.value, a.joules_per_request.value)
    assert not_less(b.decode.value, a.decode.value)
    assert not_less(b.seconds.value, a.seconds.value)


@given(names, setups, traffics, st.integers(1, 1000))
def test_a_bigger_batch_costs_no_more_a_token_and_takes_no_less_a_step(
    name: str, setup: Setup, traffic: Traffic, n: int
) -> None:
    shape = SHAPES[name]
    a = free(shape, setup, traffic)
    b = free(shape, setup, replace(traffic, batch=traffic.batch + n))
    assert not_less(a.joules_per_token.value, b.joules_per_token.value)
    assert not_less(b.seconds.value, a.seconds.value)
    assert not_less(b.tokens_per_second.value, a.tokens_per_second.value)


@given(names, setups, traffics, st.floats(2, 32))
def test_half_the_bits_never_raise_the_energy_of_decode(
    name: str, setup: Setup, traffic: Traffic, bits: float
) -> None:
    shape = SHAPES[name]
    a = free(shape, replace(setup, weights=bits), traffic)
    b = free(shape, replace(setup, weights=bits / 2), traffic)
    assert not_less(a.decode.value, b.decode.value)
    assert not_less(a.joules_per_token.value, b.joules_per_token.value)
    assert not_less(a.seconds.value, b.seconds.value)


@given(names, setups, traffics)
def test_fp8_never_costs_more_than_bf16(name: str, setup: Setup, traffic: Traffic) -> None:
    shape = SHAPES[name]
    a = free(shape, replace(setup, weights="bf16"), traffic)
    b = free(shape, replace(setup, weights="fp8"), traffic)
    assert not_less(a.decode.value, b.decode.value)


@pytest.mark.parametrize("device", KNOWN, ids=lambda d: d.name)
@pytest.mark.parametrize("narrow", ["fp8", "int8", "fp4"])
def test_narrow_products_are_no_slower_where_their_units_are(device: Device, narrow: str) -> None:
    """Also where the data sheet has one rate for both, and where little but products takes time."""
    for shape in (EIGHT, MIXTURE):
        for traffic in (Traffic(512), Traffic(32, 8000, 200)):
            a = free(shape, Setup(device, weights="bf16"), traffic)
            b = free(shape, Setup(device, weights=narrow), traffic)
            assert not_less(a.decode.value, b.decode.value)
            assert not_less(a.joules_per_token.value, b.joules_per_token.value)
            assert not_less(a.seconds.value, b.seconds.value)


@given(names, setups, traffics)
def test_power_is_never_above_tdp_and_figures_agree(
    name: str, setup: Setup, traffic: Traffic
) -> None:
    shape = SHAPES[name]
    found = free(shape, setup, traffic)
    most = setup.devices * float(setup.device.tdp_w or 0)
    assert found.watts.high <= most * (1 + 1e-9)
    each = found.joules_per_token
    assert each.low < each.value < each.high
    # joules are watts times seconds, whatever they are told by
    told = found.watts.value * found.seconds.value / traffic.batch
    assert told == pytest.approx(each.value, rel=1e-6)
    assert found.tokens_per_second.value == pytest.approx(traffic.batch / found.seconds.value)
    assert sum(found.split.values()) == pytest.approx(each.value)
    assert found.joules_per_request.value == pytest.approx(each.value * traffic.output)
    whole = found.joules_per_token_and_parameter.times(shape.parameters)
    assert whole.value == pytest.approx(each.value)
    assert found.joules_per_token_whole.value >= each.value


@given(names, setups, traffics, st.floats(1, 3), st.floats(0, 2000))
def test_the_building_and_the_host_only_add(
    name: str, setup: Setup, traffic: Traffic, pue: float, host: float
) -> None:
    shape = SHAPES[name]
    found = serve(shape, setup, traffic, pue=pue, host_w=host, check=False)
    beside = host * setup.devices * found.seconds.value / traffic.batch
    expected = (found.joules_per_token.value + beside) * pue
    assert found.joules_per_token_whole.value == pytest.approx(expected)


@settings(max_examples=25)
@given(
    names,
    st.sampled_from(["H100", "B200", "L4", "Jetson AGX Orin"]),
    st.sampled_from(["bf16", 4.5]),
    st.sampled_from([0, 100, 4000]),
    st.sampled_from([20, 1000]),
    st.floats(5e-3, 0.3),
)
def test_best_batch_is_that_of_a_search_over_all(
    name: str, device: str, weights: str | float, prompt: int, output: int, latency: float
) -> None:
    shape = SHAPES[name]
    setup, traffic = Setup(find(device), 2, weights), Traffic(1, prompt, output)
    most = serving.most_sequences(shape, setup, traffic)
    assert most is not None
    found = serving.best_batch(shape, setup, traffic, latency)
    sizes = sorted({*range(1, min(most, 400) + 1), *([most] if most else [])})
    fast = [
        s for s in (serve(shape, setup, replace(traffic, batch=b)) for b in sizes)
        if s.seconds.value <= latency
    ]  # fmt: skip
    if not fast:
        assert found is None
        return
    assert found is not None and found.seconds.value <= latency and found.fits
    best = min(s.joules_per_token.value for s in fast)
    if found.traffic.batch <= 400 or found.traffic.batch == most:
        assert found.joules_per_token.value == pytest.approx(best, rel=1e-9)
    else:
        assert found.joules_per_token.value <= best


@given(names, setups, traffics)
def test_most_sequences_fill_the_memory(name: str, setup: Setup, traffic: Traffic) -> None:
    shape = SHAPES[name]
    most = serving.most_sequences(shape, setup, traffic)
    if most is None:
        assert setup.device.memory_bytes is None
        return
    full = replace(traffic, batch=most + 1)
    with pytest.raises(JoulesmithError, match="GiB that"):
        serve(shape, setup, full)
    if most:
        assert serve(shape, setup, replace(traffic, batch=most)).fits


def test_fewest_devices_are_the_fewest() -> None:
    for shape, count in ((EIGHT, 1), (SEVENTY, 2), (of_numbers(4.05e11), 16)):
        n = serving.fewest_devices(shape, Setup(H100, weights="bf16"), Traffic(1))
        assert n == count
        assert serve(shape, Setup(H100, n, "bf16"), Traffic(1)).fits
    with pytest.raises(JoulesmithError, match="has no memory in the table"):
        serving.fewest_devices(EIGHT, Setup(find("EPYC 9654")), Traffic(1))
    with pytest.raises(JoulesmithError, match="give 131072 devices"):
        serving.fewest_devices(of_numbers(1e15), Setup(find("L4")), Traffic(1))


def test_a_curve_ends_where_memory_is_full() -> None:
    setup, traffic = Setup(H100, 1, "bf16"), Traffic(1, 2000, 500)
    found = serving.curve(EIGHT, setup, traffic)
    assert found[0].traffic.batch == 1
    assert found[-1].traffic.batch == serving.most_sequences(EIGHT, setup, traffic)
    joules = [s.joules_per_token.value for s in found]
    assert joules == sorted(joules, reverse=True)
    assert [s.traffic.batch for s in serving.curve(EIGHT, setup, traffic, [3, 5])] == [3, 5]
    assert serving.batches(10) == [1, 2, 3, 4, 6, 8, 10]


# ---- measured


def own_rows() -> list[dict[str, str]]:
    """Our own measurements of kernels without an engine, on one H200."""
    file = Path(__file__).parents[3] / "benchmarks/results/gpu_serving.csv"
    return list(csv.DictReader(file.open(encoding="utf-8")))


def predicted(r: dict[str, str]) -> tuple[float, float]:
    """Joules a token and tokens a second of a measured row."""
    n = {k: int(r[k]) for k in ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab")}
    shape = of_numbers(int(r["params"]), tied=r["model"] == "135M", **n)
    setup = Setup(find(r["device"]), 1, "bf16", engine=serving_setup.BARE)
    batch, context = int(r["batch"]), int(r["context"])
    c, own = serving_setup.constants_of(setup)
    assert own
    if r["phase"] == "prefill":
        found, tokens = cost(serving.reading(shape, setup, batch, context), c), batch * context
    else:
        traffic = Traffic(batch, context - 1, 1, reach=1)
        found, tokens = cost(steady(shape, setup, traffic, prompts=False), c), batch
    return float(found.joules) / tokens, tokens / float(found.seconds)


def test_shipped_constants_say_what_our_own_gpu_drew() -> None:
    rows = own_rows()
    assert len(rows) == 24
    joules = [predicted(r)[0] / float(r["joules_per_token"]) - 1 for r in rows]
    rates = [predicted(r)[1] / float(r["tokens_per_second"]) - 1 for r in rows]
    assert sum(map(abs, joules)) / 24 < 0.15
    assert sum(map(abs, rates)) / 24 < 0.25
    factor = serving_setup.fitted()["intervals"]["measured"]["joules"]
    held = sum(abs(math.log(1 + x)) <= math.log(factor) for x in joules)
    assert held >= 0.85 * 24


# ---- one line for what is wrong


def refused(match: str, call: Any) -> None:
    with pytest.raises(JoulesmithError, match=match) as e:
        call()
    assert "\n" not in str(e.value)


def test_a_checkpoint_in_fp8_multiplies_in_fp8() -> None:
    config = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "vocab_size": 128256,
    }  # fmt: skip

    def products(told: dict[str, Any] | None, **given: Any) -> str:
        shape = of_config(config if told is None else {**config, "quantization_config": told})
        served = serve(shape, Setup(H100, **given), Traffic(64, 4000, 100))
        p = steady(shape, Setup(H100, **given), served.traffic)
        assert bool(p.narrow) == (served.setup.precision != "bf16")
        return served.setup.precision

    def tensors(**inputs: Any) -> dict[str, Any]:
        group = {"weights": {"num_bits": 8, "type": "int"}, "input_activations": inputs or None}
        return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}

    assert products(None) == "bf16"
    assert products({"quant_method": "fp8"}) == "fp8"
    assert products({"quant_method": "fp8"}, weights="bf16") == "bf16"
    assert products({"quant_method": "fp8"}, products="bf16") == "bf16"
    assert products(tensors(num_bits=8, type="int")) == "int8"
    assert products(tensors(num_bits=8, type="float")) == "fp8"
    assert products(tensors()) == "bf16"
    assert products({"quant_method": "awq", "bits": 4, "group_size": 128}) == "bf16"


def test_bad_input_is_one_line() -> None:
    one = Traffic(1)
    refused(
        "70B needs .* GiB .* of weights.*: give 2 devices or fewer bits",
        lambda: serve(SEVENTY, Setup(H100), one),
    )
    refused("give a batch of at most", lambda: serve(EIGHT, Setup(H100), Traffic(1e6)))
    refused("no engine 'steam': known are", lambda: serve(EIGHT, Setup(H100, engine="steam"), one))
    refused("TPU v5e has no tdp_w", lambda: serve(EIGHT, Setup(find("TPU v5e"), 4), one))
    alveo = Setup(find("Alveo U280"), 8, weights="int8")
    refused("U280 has no bf16_tflops: add", lambda: free(EIGHT, alveo, one))
    refused("a PUE of 0.5", lambda: serve(EIGHT, Setup(H100), one, pue=0.5))
    refused("a PUE of nan", lambda: serve(EIGHT, Setup(H100), one, pue=math.nan))
    refused("a host of -1 W", lambda: serve(EIGHT, Setup(H100), one, host_w=-1))
    refused("0 devices", lambda: Setup(H100, 0))
    refused("a cache of 5 bits", lambda: Setup(H100, cache_bits=5))
    refused("precision q9", lambda: Setup(H100, weights="q9"))
    refused("unknown precision", lambda: Setup(H100, products="q9").precision)
    for field, value in (
        ("batch", 0), ("batch", math.nan), ("batch", True), ("prompt", -1), ("output", 0),
        ("output", "many"), ("reach", 0), ("reach", 3),
    ):  # fmt: skip
        refused(field, lambda field=field, value=value: Traffic(**{field: value}))


def test_constants_are_told_with_their_sources() -> None:
    own = serve(EIGHT, Setup(H100), Traffic(8))
    other = serve(EIGHT, Setup(find("MI300X")), Traffic(8))
    assert own.fitted and not other.fitted
    assert {c.basis for c in own.constants} == {"published", "fitted", "assumed"}
    by = {c.name: c for c in other.constants}
    assert by["device.static"].basis == "assumed" and "mean of" in by["device.static"].source
    assert by["host"].value == serving_setup.HOST_W
    assert any("nobody's measurements of MI300X" in n for n in other.notes)
    assert other.joules_per_token.high / other.joules_per_token.value > (
        own.joules_per_token.high / own.joules_per_token.value
    )
    edge = serve(EIGHT, Setup(find("Jetson AGX Orin"), weights=4.5), Traffic(1))
    assert {c.name: c for c in edge.constants}["host"].value == 0


def test_a_token_read_costs_less_than_one_written_alone() -> None:
    found = serve(EIGHT, Setup(H100), Traffic(1, 2048, 256))
    assert found.prefill is not None and found.prefill.value < found.decode.value / 10
    assert serve(EIGHT, Setup(H100), Traffic(1, 0, 256)).prefill is None
    assert work.decode_flops(EIGHT, 1) > 2 * 7e9


@pytest.mark.parametrize(
    ("device", "engine"),
    [("h100", "vLLM 0.11"), ("b200", "vLLM 0.11"), ("a100", "vLLM 2024"), ("v100", "vLLM 2024"),
     ("mi300x", "vLLM 0.11"), ("raspberry pi 5", "no engine")],
)  # fmt: skip
def test_the_engine_is_the_newest_that_such_devices_were_measured_with(device, engine) -> None:
    setup = Setup(find(device), weights="bf16")
    assert serving_setup.engine_of(setup) == engine
    got = serve(EIGHT, setup, Traffic(8), check=False)
    told = any("newest engine measured" in n for n in got.notes)
    assert told == (engine == "vLLM 2024")
    asked = serve(EIGHT, replace(setup, engine="vLLM 0.11"), Traffic(8), check=False)
    assert not any("newest engine measured" in n for n in asked.notes)
