"""Folding changes no logits; SmoothQuant against its formula; moments follow the fold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from joulesmith.calibrate import calibrate
from joulesmith.compress.quantize.activations import InputQuantizer, Scheme
from joulesmith.compress.quantize.fold import Fold, scale_channels
from joulesmith.compress.quantize.row_walk import moved, walk_rows
from joulesmith.compress.quantize.sites import folds_of
from joulesmith.compress.quantize.smooth import (
    ALPHAS,
    BEARABLE,
    Layer,
    output_damage,
    search,
    smooth_scale,
)
from joulesmith.compress.quantize.smooth_step import (
    Smoothed,
    read_smoothed,
    smooth_block,
    write_smoothed,
)
from joulesmith.compress.step import find
from joulesmith.errors import JoulesmithError
from joulesmith.moments import Moments


def llama(kind: str = "llama", dtype: torch.dtype = torch.float64) -> Any:
    """Two layers with grouped queries; Qwen2's biases on q, k and v where asked for."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(3)
    settings = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
        "max_position_embeddings": 64,
    }  # fmt: skip
    module = (
        LlamaForCausalLM(LlamaConfig(**settings))
        if kind == "llama"
        else Qwen2ForCausalLM(Qwen2Config(**settings))
    )
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "norm" in name or "bias" in name:
                p.copy_(torch.rand_like(p) + 0.5)
    return module.to(dtype).eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_folded_model_says_the_same(kind: str) -> None:
    module = llama(kind)
    ids = torch.arange(50)[None]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = module(ids).logits
        for block in module.model.layers:
            for fold in folds_of(block, module.config):
                rows = block.get_submodule(fold.producer).weight.shape[0]
                scale = torch.randn(rows, generator=generator).exp()
                old = block.get_submodule(fold.consumers[0]).weight.clone()
                scale_channels(block, fold, scale)
                assert not torch.equal(block.get_submodule(fold.consumers[0]).weight, old)
        after = module(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


def test_a_bad_scale_changes_nothing() -> None:
    module = llama(dtype=torch.float16)
    block = module.model.layers[0]
    fold = folds_of(block, module.config)[0]
    before = {n: p.clone() for n, p in block.named_parameters()}
    for scale, match in (
        (torch.zeros(32), "above 0"),
        (torch.full((32,), torch.nan), "finite"),
        (torch.ones(31), "31"),
        (torch.ones(2, 16), "above 0"),
        (torch.full((32,), 1e-9), "beyond"),
    ):
        with pytest.raises(JoulesmithError, match=match):
            scale_channels(block, fold, scale)
    assert all(torch.equal(p, before[n]) for n, p in block.named_parameters())
    with pytest.raises(JoulesmithError, match="knows the blocks of"):
        folds_of(torch.nn.Linear(2, 2), module.config)


def test_shared_channels_take_the_largest_of_their_columns() -> None:
    fold = Fold("v", ("o",), (0, 1, 0, 1, 2, 2))
    assert fold.channels(torch.tensor([1.0, 5, 3, 2, 0, 7])).tolist() == [3, 5, 7]
    assert fold.columns(torch.tensor([10.0, 20, 30])).tolist() == [10, 20, 10, 20, 30, 30]


@given(alpha=st.floats(0, 1), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_equation_4_up_to_a_common_factor(alpha: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = rng.uniform(0.1, 10, 9), rng.uniform(0.1, 10, 9)
    got = smooth_scale(torch.tensor(x), torch.tensor(w), alpha).double().numpy()
    want = x**alpha / w ** (1 - alpha)
    np.testing.assert_allclose(got / got[0], want / want[0], rtol=1e-5)
    assert np.exp(np.log(got).mean()) == pytest.approx(1, rel=1e-5)


def test_dead_channels_keep_their_scale() -> None:
    x = torch.tensor([0.0, 4, 1, 9])
    w = torch.tensor([1.0, 1, 0, 1])
    scale = smooth_scale(x, w, 0.5)
    assert scale[0] == scale[2] == 1 and torch.isfinite(scale).all()
    with pytest.raises(JoulesmithError, match="between 0 and 1"):
        smooth_scale(x, w, 1.5)


def test_smoothing_pays_where_a_channel_stands_out_and_not_elsewhere() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 24, generator=g)
    layer = Layer(torch.randn(16, 24, generator=g), torch.randn(200, 16, generator=g))
    wild = x.clone()
    wild[:, 3] *= 100
    found = search(wild, [layer], Scheme())
    assert found.alpha is not None and found.damage < 0.2 * found.before
    # the prediction is what rounding the smoothed pair costs, worked out by hand
    s = found.scale
    q = InputQuantizer(Scheme())
    peak = (layer.weight * s).abs().amax(1, keepdim=True) / 127.5
    w = ((layer.weight * s / peak).clamp(-128, 127).round() * peak).double()
    assert layer.gradient is not None
    off = q(wild / s).double() @ w.T - wild.double() @ layer.weight.double().T
    want = float((off * layer.gradient).square().sum() / 2 / 200)
    assert found.damage == pytest.approx(want, rel=1e-3)
    calm = search(x.sign(), [Layer(torch.ones(4, 24))], Scheme())
    assert calm.alpha is None and torch.equal(calm.scale, torch.ones(24))
    static = search(wild, [layer], Scheme(dynamic=False))
    assert static.damage >= static.by_token > 0
    # what the sample did not show counts: a static scale covers it
    ends = 10 * torch.stack(torch.aminmax(x, dim=0))
    wider = search(x, [layer], Scheme(dynamic=False), ends=ends, alphas=())
    bare = search(x, [layer], Scheme(dynamic=False), alphas=())
    assert wider.damage > 20 * bare.damage


def test_an_input_that_no_static_scale_serves_gets_the_factors_for_one_by_token() -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(200, 24, generator=g)
    x[:, 5] *= 8
    layer = Layer(torch.randn(16, 24, generator=g), 0.01 * torch.randn(200, 16, generator=g))
    static = search(x, [layer], Scheme(dynamic=False), bearable=BEARABLE)
    assert static.damage - static.by_token < BEARABLE  # it serves here: one for static scales
    best = [search(x, [layer], Scheme(dynamic=False), alphas=(a,)).damage for a in ALPHAS]
    assert static.damage == pytest.approx(min(best))
    huge = x.clone()
    huge[0] *= 300  # a token that opens a text
    token = search(huge, [layer], Scheme())
    static = search(huge, [layer], Scheme(dynamic=False), bearable=BEARABLE)
    assert static.alpha == token.alpha and torch.equal(static.scale, token.scale)
    assert static.by_token == pytest.approx(token.damage)
    assert static.damage - static.by_token > BEARABLE
    # who will have static scales all the same is given the least damage under them
    always = search(huge, [layer], Scheme(dynamic=False))
    assert always.damage < static.damage and always.by_token > static.by_token


def test_gradients_say_which_errors_count() -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    w = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    none = output_damage(x, [Layer(w, torch.zeros(50, 4))], Scheme(), InputQuantizer(Scheme()))
    some = output_damage(x, [Layer(w)], Scheme(), InputQuantizer(Scheme()))
    assert none == 0 < some


def moments_of(module: Any, windows: np.ndarray) -> dict[int, Mapping[str, Moments]]:
    found: dict[int, Mapping[str, Moments]] = {}
    calibrate(module, windows, lambda i, m: found.__setitem__(i, dict(m)))
    return found


def test_moments_of_the_smoothed_block_are_those_measured_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # In full precision both models draw the same labels.
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    module = llama(dtype=torch.float32)
    windows = np.random.default_rng(0).integers(0, 60, (6, 24)).astype(np.int32)
    before = moments_of(module, windows)
    done: dict[int, Smoothed] = {}
    predicted: dict[int, dict[str, Moments]] = {}
    for i, block in enumerate(module.model.layers):
        done[i] = smooth_block(block, module.config, before[i], "int8", True)
        predicted[i] = moved(before[i], block, module.config, done[i])
    assert sum(len(s.scales) for s in done.values()) > 0
    after = moments_of(module, windows)
    for i, layers in after.items():
        for name, m in layers.items():
            p = predicted[i][name]
            # Weights of tokens come from gradients, which a producer's own rows rescale.
            producer = name in ("self_attn.v_proj", "mlp.up_proj")
            for part in ("squares", "fisher", "ends", *(() if producer else ("hessian",))):
                got, want = getattr(p, part), getattr(m, part)
                torch.testing.assert_close(
                    got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max())
                )
            assert p.sample is not None and m.sample is not None
            torch.testing.assert_close(p.sample.x, m.sample.x, rtol=1e-3, atol=1e-3)


def test_what_smoothing_did_is_kept_whole(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    assert read_smoothed(path) is None
    s = Smoothed({"a.b": torch.rand(5)}, {"a.b": 0.5, "c": None}, {"a.b": (2.0, 1.0)}, {"a.b": 0.1})
    write_smoothed(s, path)
    back = read_smoothed(path)
    assert back is not None and torch.equal(back.scales.pop("a.b"), s.scales.pop("a.b"))
    assert back == s


class _Model:
    """What the walk needs of a model."""

    def __init__(self, module: Any) -> None:
        from joulesmith.architectures import TensorRef

        self.module = module
        self.refs = {}
        for name, p in module.named_parameters():
            if p.ndim == 2 and ".layers." in name:
                layer = int(name.split(".")[2])
                self.refs[name] = TensorRef(name, name, name, layer, tuple(p.shape))

    def matrices(self) -> list[Any]:
        return list(self.refs.values())

    def ref(self, name: str) -> Any:
        return self.refs[name]


def test_a_walk_that_was_stopped_gives_the_same_bytes(tmp_path: Path) -> None:
    windows = np.random.default_rng(0).integers(0, 60, (4, 24)).astype(np.int32)
    kept: dict[int, Smoothed] = {}

    def run(known: dict[int, Smoothed], have: dict[str, Any], stop: bool = False) -> Any:
        model = _Model(llama(dtype=torch.float32))

        def emit(block: str, found: list[Any]) -> None:
            have.update({r.ref.name: r for r in found})
            if stop:
                raise KeyboardInterrupt

        walk_rows(
            model,  # type: ignore[arg-type]
            windows,
            Scheme("int8", symmetric=False),
            emit,
            smooth=True,
            keep=known.__setitem__,
            known=known.get,
            skip=lambda names: all(n in have for n in names),
        )
        return model

    whole: dict[str, Any] = {}
    model = run({}, whole)
    assert len(whole) == 14
    parts: dict[str, Any] = {}
    with pytest.raises(KeyboardInterrupt):
        run(kept, parts, stop=True)
    assert len(parts) == 7
    for _ in range(2):  # the second time there is nothing left to round, only to fold
        again = run(kept, parts)
        for name, r in whole.items():
            assert np.array_equal(r.packed, parts[name].packed)
        for a, b in zip(model.module.parameters(), again.module.parameters(), strict=True):
            assert torch.equal(a, b)


def test_steps_are_found_by_name() -> None:
    from joulesmith.compress.step import to_plain

    assert to_plain(find("smooth")(dynamic=False)) == {"step": "smooth", "dynamic": False}
    assert find("round-inputs")(kind="fp8").model_dump()["symmetric"] is True
    model: Any = type("M", (), {"module": llama(), "matrices": _Model(llama()).matrices})
    record = find("kv-cache")(bits=4, keys="channel").apply(model, np.zeros((1, 4), np.int32))
    assert record.cache is not None and record.cache.bits == 4
    inputs = find("round-inputs")().apply(_Model(llama()), np.zeros((1, 4), np.int32)).inputs
    assert len(inputs) == 14 and "model.layers.0.mlp.down_proj" in inputs
    static = find("round-inputs")(dynamic=False, by_token=("model.layers.1.mlp.down_proj",))
    found = static.apply(_Model(llama()), np.arange(40, dtype=np.int32).reshape(2, 20)).inputs
    assert found["model.layers.1.mlp.down_proj"].scheme.dynamic
    assert not found["model.layers.0.mlp.down_proj"].scheme.dynamic
    same = ("q_proj", "k_proj", "v_proj")
    assert len({found[f"model.layers.0.self_attn.{n}"] for n in same}) == 1
