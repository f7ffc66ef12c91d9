"""Bytes and FLOPs agree with brute force, torch's own counter and the papers' formulas."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from published import (
    DEEPSEEK_V3,
    EXACT,
    GEMMA3_4B,
    GPT2,
    GPT_OSS_20B,
    LLAMA_8B,
    LLAMA_70B,
    MIXTRAL,
    QWEN3_30B,
    QWEN3_NEXT,
    SMOLLM2,
    llama,
)

from joulesmith.errors import JoulesmithError
from joulesmith.estimate.model import work
from joulesmith.estimate.model.hub_config import of_config
from joulesmith.estimate.model.peak import activation_bytes, serving_memory, training_memory
from joulesmith.estimate.model.plain import of_numbers
from joulesmith.estimate.model.shape import Shape

LLAMA_405B = llama(16384, 126, 128, 8, 53248, 128256)
QWEN25_72B = {**llama(8192, 80, 64, 8, 29568, 152064), "model_type": "qwen2"}
GPT3 = {"model_type": "gpt2", "n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048,
        "vocab_size": 51200}  # fmt: skip
SHAPES = {
    name: of_config(config)
    for name, config in {
        "dense": LLAMA_8B, "tied": SMOLLM2, "mixture": MIXTRAL, "small experts": QWEN3_30B,
        "latent": DEEPSEEK_V3, "windows": GEMMA3_4B, "short windows": GPT_OSS_20B,
        "linear": QWEN3_NEXT, "old": GPT2,
    }.items()
}  # fmt: skip
SHAPES["plain"] = of_numbers(30e9, active=3e9)
any_shape = st.sampled_from(list(SHAPES.values()))
contexts = st.integers(1, 200_000)


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    ("config", "kilobytes"),
    # "Insights into DeepSeek-V3" (arXiv 2505.09343), table 1: BF16, per token
    [(DEEPSEEK_V3, 70.272), (QWEN25_72B, 327.680), (LLAMA_405B, 516.096)],
)
def test_cache_per_token_is_the_papers(config: dict[str, Any], kilobytes: float) -> None:
    assert work.cache_bytes_per_token(of_config(config)) == kilobytes * 1000


def test_windows_hold_no_more_than_they_reach() -> None:
    shape = SHAPES["windows"]  # 5 of 34 layers reach everything, 29 the last 1024
    each = 2 * 4 * 256 * 2
    for context in (1, 1000, 1024, 1025, 100_000):
        want = each * (5 * context + 29 * min(context, 1024))
        assert work.cache_bytes(shape, context) == want
    assert work.cache_bytes(shape, 5000, 8) == work.cache_bytes(shape, 5000) / 2


def test_a_recurrent_state_is_as_large_at_any_context() -> None:
    shape = SHAPES["linear"]  # 36 of 48 layers; 32 heads of 128 x 128, 8192 channels of 4 tokens
    state = 36 * (32 * 128 * 128 + 8192 * 3) * 4
    assert work.state_bytes(shape) == work.cache_bytes(shape, 0) == state
    assert work.cache_bytes(shape, 1000) == state + 12 * 2 * 2 * 256 * 1000 * 2


def test_weights_at_a_precision() -> None:
    shape = SHAPES["dense"]
    assert work.weight_bytes(shape, 16) == work.weight_bytes(shape) == 2 * shape.parameters
    small = 2 * shape.small
    assert work.weight_bytes(shape, 8) == shape.parameters - shape.small + small
    assert work.weight_bytes(shape, 32) == 4 * shape.parameters
    # what is looked up is not read whole
    assert work.step_bytes(shape) == 2 * (shape.parameters - shape.embedding)
    tied = SHAPES["tied"]
    assert work.step_bytes(tied) == 2 * tied.parameters
    old = SHAPES["old"]
    assert work.step_bytes(old) == 2 * (old.parameters - 1024 * 768)


def test_experts_met_is_the_mean_of_many_draws() -> None:
    rng = random.Random(0)
    for experts, chosen, tokens in ((8, 2, 1), (8, 2, 5), (128, 8, 16), (32, 4, 3)):
        draws = [
            len({e for _ in range(tokens) for e in rng.sample(range(experts), chosen)})
            for _ in range(4000)
        ]
        mean = sum(draws) / len(draws)
        assert work.experts_met(experts, chosen, tokens) == pytest.approx(mean, rel=0.02)
    assert work.experts_met(8, 2, 1) == pytest.approx(2)
    assert work.experts_met(8, 8, 1) == 8
    assert work.experts_met(0, 0, 5) == 0


def test_a_step_of_one_token_reads_what_the_token_uses() -> None:
    for name in ("mixture", "small experts", "latent", "plain"):
        shape = SHAPES[name]
        one = work.step_bytes(shape, 1, 16) / 2
        assert one == pytest.approx(shape.active - shape.embedding, rel=1e-3)
        many = work.step_bytes(shape, 100_000, 16) / 2
        assert many == pytest.approx(shape.parameters - shape.embedding, rel=1e-6)


def test_stored_experts_are_read_at_their_own_bits() -> None:
    shape = SHAPES["short windows"]  # experts in MXFP4
    assert shape.stored is not None
    rest = shape.stored.head + shape.stored.matrices + shape.stored.vectors
    assert work.step_bytes(shape, 1) == pytest.approx(rest + shape.stored.experts * 4 / 32)


# ---------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("name", [n for n in SHAPES if n != "latent"])
def test_prefill_is_the_sum_of_its_tokens(name: str) -> None:
    shape = SHAPES[name]
    n = 1300  # beyond the shortest windows
    brute = sum(work.decode_flops(shape, i) for i in range(1, n + 1))
    assert work.prefill_flops(shape, n, logits=None) == brute
    first = work.prefill_flops(shape, 700, logits=None)
    assert first + work.prefill_flops(shape, 600, 700, logits=None) == brute
    last = work.prefill_flops(shape, n)
    assert brute - last == 2 * shape.head * (n - 1)


def test_latent_attention_in_decode_meets_the_latent() -> None:
    shape = SHAPES["latent"]
    step = work.decode_flops(shape, 1001) - work.decode_flops(shape, 1000)
    assert step == 61 * 2 * 128 * (2 * 512 + 64)
    one = work.prefill_flops(shape, 1, 1000) - work.prefill_flops(shape, 1, 999)
    assert one == 61 * 2 * 128 * (192 + 128)


def test_decode_of_a_known_model() -> None:
    shape = SHAPES["dense"]
    # 2 N plus 4 layers hidden context
    want = 2 * (8_030_261_248 - 128256 * 4096 - shape.small) + 4 * 32 * 4096 * 2048
    assert work.decode_flops(shape, 2048) == want


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", **TINY},
        {"model_type": "qwen3", **TINY, "head_dim": 16},
        {"model_type": "gemma2", **TINY, "head_dim": 16, "sliding_window": 8},
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64,
         "n_positions": 64},
        {"model_type": "deepseek_v3", **TINY, "num_key_value_heads": 4, "kv_lora_rank": 16,
         "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12,
         "first_k_dense_replace": 2},
    ],
    ids=lambda c: c["model_type"],
)  # fmt: skip
@pytest.mark.parametrize("train", [False, True])
def test_flops_are_those_that_torch_counts(config: dict[str, Any], train: bool) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    rest = {k: v for k, v in config.items() if k != "model_type"}
    made = transformers.AutoConfig.for_model(config["model_type"], **rest)
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager")
    batch, n = 3, 24
    tokens = torch.arange(batch * n).reshape(batch, n) % 64
    with FlopCounterMode(display=False) as counter:
        loss = model(tokens, labels=tokens, use_cache=False).loss
        if train:
            loss.backward()
    shape = of_config(config)
    # eager attention computes every pair, masked or not
    full = 2 * shape.multiplied * n + sum(b.mixer.pair * n * n for b in shape.blocks)
    counted = counter.get_total_flops()
    small = batch * n * 2 * 64 * 8 * (6 if train else 2)  # rotary angles are products, too
    assert 0 <= counted - batch * full * (3 if train else 1) <= small
    if all(b.mixer.window is None for b in shape.blocks):
        make = work.training_flops if train else work.forward_flops
        assert make(shape, batch * n, n, causal=False) == batch * full * (3 if train else 1)


def test_training_is_the_formula_of_megatron() -> None:
    """Narayanan et al. 2021, eq. 3: 96 B s l h^2 (1 + s / 6h + V / 16 l h), with every block
    recomputed and every pair counted."""
    shape = of_config(GPT3)
    b, s, l, h, v = 1536, 2048, 96, 12288, 51200  # noqa: E741
    paper = 96 * b * s * l * h**2 * (1 + s / (6 * h) + v / (16 * l * h))
    ours = work.training_flops(shape, b * s, s, recompute="full", causal=False)
    assert ours == pytest.approx(paper, rel=1e-12)
    # Korthikanti et al. 2022, eq. 8 and 9: 72 B L s h^2 (1 + s / 6h + v / 12 h L), and s / 3h
    model = 72 * b * s * l * h**2 * (1 + s / (6 * h) + v / (12 * h * l))
    assert work.training_flops(shape, b * s, s, causal=False) == pytest.approx(model, rel=1e-12)
    paper = 72 * b * s * l * h**2 * (1 + s / (6 * h) + s / (18 * h) + v / (12 * h * l))
    ours = work.training_flops(shape, b * s, s, recompute="selective", causal=False)
    assert ours == pytest.approx(paper, rel=1e-12)


def test_training_of_gpt3_is_near_the_published_total() -> None:
    # Brown et al. 2020, table D.1: 3.14e23 FLOPs on 300 billion tokens, 6 N D
    shape = of_config({**GPT3, "vocab_size": 50257})
    assert work.training_flops(shape, 300e9, 2048) == pytest.approx(3.14e23, rel=0.03)
    # Llama 3.1 405B: 3.8e25 on 15.6e12 tokens (arXiv 2407.21783, section 1), without attention
    shape = of_config(LLAMA_405B)
    attention = 3 * work.attention_flops(shape, 8192) * 15.6e12 / 8192
    total = work.training_flops(shape, 15.6e12, 8192)
    assert total - attention == pytest.approx(3.8e25, rel=0.01)
    assert 0.01 < attention / total < 0.1


def test_lora_and_distillation() -> None:
    shape, teacher = SHAPES["dense"], of_config(LLAMA_70B)
    tokens, s = 1e6, 2048
    adapters = work.adapter_weights(shape, 16)
    assert adapters == 41_943_040  # peft's own count at rank 16 on all seven matrices
    assert work.adapter_weights(shape, 16, "attention") == 13_631_488
    attention = work.attention_flops(shape, s) * tokens / s
    want = (4 * shape.multiplied + 6 * adapters) * tokens + 3 * attention
    assert work.lora_flops(shape, tokens, s) == pytest.approx(want)
    again = work.lora_flops(shape, tokens, s, recompute="full") - want
    forward = 2 * (shape.multiplied - shape.head + adapters) * tokens + attention
    assert again == pytest.approx(forward)
    both = work.distillation_flops(shape, teacher, tokens, s)
    assert both - work.training_flops(shape, tokens, s) == pytest.approx(
        work.forward_flops(teacher, tokens, s)
    )
    mixed = SHAPES["mixture"]
    one = work.adapter_weights(mixed, 8, active=True)
    assert one < work.adapter_weights(mixed, 8)


# ---------------------------------------------------------------- memory


def test_activations_are_equation_2_of_korthikanti() -> None:
    shape = of_config(GPT3)
    s, b, h, a, l = 2048, 4, 12288, 96, 96  # noqa: E741
    given = {"sequence": s, "batch": b, "dropout": True}
    layer = s * b * h * (34 + 5 * a * s / h)
    assert activation_bytes(shape, **given) == l * layer
    assert activation_bytes(shape, **given, recompute="selective") == l * 34 * s * b * h
    full = activation_bytes(shape, **given, recompute="full")
    assert full - 34 * s * b * h == 2 * s * b * h * l  # one block's insides on top


def test_training_memory_of_adamw_is_16_bytes_a_weight() -> None:
    shape = SHAPES["dense"]
    found = training_memory(shape, sequence=2048, recompute="full")
    states = found.weights + found.gradients + found.optimizer
    assert states == 16 * shape.parameters  # ZeRO, section 3.1
    assert found.total == states + found.activations + found.logits
    single = training_memory(shape, sequence=2048, recompute="full", bits=32)
    assert single.weights + single.gradients + single.optimizer == 16 * shape.parameters
    lora = training_memory(shape, sequence=2048, lora_rank=16, bits=4)
    assert lora.optimizer == 12 * work.adapter_weights(shape, 16)
    assert lora.weights < 0.3 * found.weights


def test_serving_memory() -> None:
    shape = SHAPES["dense"]
    found = serving_memory(shape, batch=32, context=8192)
    assert found.weights == 16_060_522_496
    assert found.cache == 32 * 8192 * 131072  # 128 KiB a token
    assert 0 < found.activations < 0.1 * found.weights
    assert serving_memory(shape, batch=64, context=8192).total > found.total


# ---------------------------------------------------------------- properties


@given(any_shape, contexts, contexts)
def test_more_context_never_costs_less(shape: Shape, a: int, b: int) -> None:
    a, b = sorted((a, b))
    assert work.cache_bytes(shape, a) <= work.cache_bytes(shape, b)
    assert work.decode_flops(shape, a) <= work.decode_flops(shape, b)
    assert work.prefill_flops(shape, a) <= work.prefill_flops(shape, b)
    assert work.prefill_flops(shape, 10, a) <= work.prefill_flops(shape, 10, b)
    assert work.decode_bytes(shape, 4, a) <= work.decode_bytes(shape, 4, b)
    for again in ("none", "selective", "full"):
        low = work.training_flops(shape, 1e9, a, recompute=again)
        assert low <= work.training_flops(shape, 1e9, b, recompute=again) * (1 + 1e-12)


@given(any_shape, st.floats(1, 1e5), st.floats(1, 1e5), contexts)
def test_a_bigger_batch_reads_more_but_less_per_sequence(
    shape: Shape, a: float, b: float, context: int
) -> None:
    a, b = sorted((a, b))
    low, high = work.step_bytes(shape, a), work.step_bytes(shape, b)
    assert 0 < low <= high * (1 + 1e-12)
    assert high / b <= low / a * (1 + 1e-12)
    assert high <= work.weight_bytes(shape) * (1 + 1e-12)
    assert work.decode_bytes(shape, a, context) <= work.decode_bytes(shape, b, context) * (
        1 + 1e-12
    )
    small, big = (serving_memory(shape, batch=n, context=context).total for n in (a, b))
    assert small <= big


@given(any_shape, st.floats(1, 16), st.floats(1, 1000))
def test_half_the_bits_halve_the_matrices(shape: Shape, bits: float, batch: float) -> None:
    low, high = max(1.0, bits / 2), 2 * max(1.0, bits / 2)
    if high > 16:
        return
    vectors = 2 * shape.small
    for count in (work.weight_bytes, lambda s, b: work.step_bytes(s, batch, b)):
        assert (count(shape, low) - vectors) * 2 == pytest.approx(
            count(shape, high) - vectors, rel=1e-6
        )


@given(any_shape, st.integers(1, 8192), st.floats(1, 64))
def test_recomputing_trades_memory_for_flops(shape: Shape, sequence: int, batch: float) -> None:
    ways = ("none", "selective", "full")
    flops = [work.training_flops(shape, 1e6, sequence, recompute=w) for w in ways]
    assert flops == sorted(flops)
    kept = [activation_bytes(shape, sequence=sequence, batch=batch, recompute=w) for w in ways]
    assert kept[0] >= kept[1] > 0 and kept[2] > 0
    lora = work.lora_flops(shape, 1e6, sequence)
    assert 0 < lora < flops[0] * 1.2


@given(any_shape)
def test_counts_are_positive_and_add_up(shape: Shape) -> None:
    assert 0 < shape.active <= shape.parameters
    assert 0 < shape.multiplied <= shape.parameters + shape.head
    head = 0 if shape.tied else shape.head
    parts = shape.embedding + head + shape.matrices + shape.expert_weights + shape.small
    assert parts == shape.parameters
    assert work.cache_bytes_per_token(shape) > 0


def test_names_of_precisions() -> None:
    assert work.bits_of("bf16") == work.bits_of(16) == work.bits_of("16") == 16
    assert work.bits_of(" Q4_K ") == 4.5
    for wrong in ("", "four", 0, -4, 100, math.nan, True, "nan", "inf"):
        with pytest.raises(JoulesmithError, match="give bits per weight") as found:
            work.bits_of(wrong)
        assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda s: work.decode_flops(s, 0),
        lambda s: work.decode_flops(s, math.nan),
        lambda s: work.cache_bytes(s, -1),
        lambda s: work.prefill_flops(s, True),
        lambda s: work.prefill_flops(s, math.inf),
        lambda s: work.step_bytes(s, 0),
        lambda s: work.training_flops(s, 0, 2048),
        lambda s: work.training_flops(s, 1e9, 0),
        lambda s: work.training_flops(s, 1e9, 2048, recompute="some"),
        lambda s: work.lora_flops(s, 1e9, 2048, rank=0),
        lambda s: work.lora_flops(s, 1e9, 2048, targets="mlp"),
        lambda s: training_memory(s, sequence=2048, optimizer="lion2"),
        lambda s: training_memory(s, sequence=2048, recompute="some"),
        lambda s: training_memory(s, sequence=0),
        lambda s: serving_memory(s, batch=0, context=10),
        lambda s: work.lora_flops(s, -1, 2048),
    ],
)
def test_wrong_arguments_cost_one_line(call: Any) -> None:
    for shape in (SHAPES["dense"], SHAPES["mixture"]):
        with pytest.raises(JoulesmithError) as found:
            call(shape)
        assert "\n" not in str(found.value)


def test_counting_is_quick() -> None:
    import time

    start = time.perf_counter()
    for config, _ in EXACT.values():
        of_config(config)
    shape = SHAPES["latent"]
    for _ in range(1000):
        work.step_bytes(shape, 32)
        work.decode_flops(shape, 4096)
    assert time.perf_counter() - start < 10  # about 0.1; a fit calls these many times
