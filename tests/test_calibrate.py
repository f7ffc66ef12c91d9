"""Streamed moments against a plain forward and backward of the whole model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from joulesmith.calibrate import calibrate  # noqa: E402
from joulesmith.errors import JoulesmithError  # noqa: E402
from joulesmith.moments import HeadMoments, Moments, drawn_from  # noqa: E402


@pytest.fixture(scope="module")
def tiny() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def run(
    module: torch.nn.Module, windows: np.ndarray, **settings: object
) -> tuple[dict[str, Moments], HeadMoments]:
    found: dict[str, Moments] = {}

    def visit(i: int, moments: object) -> None:
        for name, m in moments.items():  # type: ignore[attr-defined]
            found[f"{i}.{name}"] = m

    return found, calibrate(module, windows, visit, **settings)  # type: ignore[arg-type]


def test_input_moments_equal_a_plain_forward(tiny: torch.nn.Module, tmp_path: Path) -> None:
    windows = np.random.default_rng(0).integers(0, 50, (5, 12)).astype(np.int32)
    found, head = run(tiny, windows, batch=2, scratch=tmp_path)
    assert len(found) == 3 * 7
    seen: dict[str, list[torch.Tensor]] = {}
    handles = []
    for i, layer in enumerate(tiny.model.layers):
        for name, m in layer.named_modules():
            if isinstance(m, torch.nn.Linear):
                handles.append(
                    m.register_forward_hook(
                        lambda _m, a, _o, key=f"{i}.{name}": seen.setdefault(key, []).append(a[0])
                    )
                )
    handles.append(
        tiny.lm_head.register_forward_hook(lambda _m, a, _o: seen.setdefault("h", []).append(a[0]))
    )
    with torch.no_grad():
        logits = tiny(torch.from_numpy(windows).long()).logits
    for h in handles:
        h.remove()
    loose = {"rtol": 1e-3, "atol": 1e-5}  # products may be bfloat16's
    for key, m in found.items():
        x = seen[key][0].reshape(-1, m.hessian.shape[0])
        torch.testing.assert_close(m.squares, x.square().mean(0), rtol=1e-4, atol=1e-6)
        assert m.tokens == 60 and m.ends is not None
        torch.testing.assert_close(m.ends, torch.stack([x.amin(0), x.amax(0)]), **loose)
    x = seen["h"][0].reshape(-1, 16)
    p = torch.softmax(logits, -1).reshape(-1, 50)
    s = (p * (1 - p)).mean(1, keepdim=True)
    expected = (x * s).T @ x / s.sum()
    torch.testing.assert_close(head.head.hessian, expected, rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(head.head.fisher, (p * (1 - p)).mean(0), rtol=2e-2, atol=1e-5)
    assert float(head.token_share.sum()) == pytest.approx(1)
    assert not list(tmp_path.iterdir()), "scratch files stay behind"


def test_hessian_weighs_tokens_by_their_gradient(tiny: torch.nn.Module) -> None:
    """With the sampled labels known, the weighted moments equal plain autograd's."""
    windows = np.random.default_rng(3).integers(0, 50, (2, 10)).astype(np.int32)
    found, _ = run(tiny, windows, batch=2, seed=5)
    tokens = torch.from_numpy(windows).long()
    layer = tiny.model.layers[1].mlp.up_proj
    kept: dict[str, torch.Tensor] = {}

    def hook(_m: object, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        kept["x"] = args[0].detach().reshape(-1, 16)
        out.requires_grad_(True).register_hook(lambda g: kept.__setitem__("g", g.reshape(-1, 24)))

    handle = layer.register_forward_hook(hook)
    logits = tiny(tokens).logits.reshape(-1, 50)
    p = torch.softmax(logits.detach(), -1)
    drawn, _ = drawn_from(p, torch.Generator().manual_seed(5))
    torch.nn.functional.cross_entropy(logits, drawn[:, 0], reduction="sum").backward()
    handle.remove()
    tiny.zero_grad()
    x, g = kept["x"], kept["g"]
    s = g.square().mean(1, keepdim=True)
    s = s / s.mean() + 1
    m = found["1.mlp.up_proj"]
    torch.testing.assert_close(m.hessian, (x * s).T @ x / s.sum(), rtol=3e-2, atol=3e-3)
    torch.testing.assert_close(m.fisher, g.square().mean(0), rtol=3e-2, atol=1e-8)


def test_fisher_predicts_the_kl_of_a_small_change(tiny: torch.nn.Module) -> None:
    """Second-order damage of a random change agrees with the true KL to within a factor of 2."""
    from joulesmith.plan.damage import linear_damage

    windows = np.random.default_rng(1).integers(0, 50, (64, 16)).astype(np.int32)
    found, _ = run(tiny, windows, batch=16)
    tokens = torch.from_numpy(windows).long()
    with torch.no_grad():
        before = torch.log_softmax(tiny(tokens).logits, -1)
    for key in ("0.mlp.down_proj", "2.mlp.up_proj", "1.self_attn.v_proj"):
        index, _, name = key.partition(".")
        weight = tiny.model.layers[int(index)].get_submodule(name).weight
        true, predicted = 0.0, 0.0
        for seed in range(6):
            change = 3e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            kept = weight.data.clone()
            with torch.no_grad():
                weight.add_(change)
                after = torch.log_softmax(tiny(tokens).logits, -1)
                weight.copy_(kept)
            true += float((before.exp() * (before - after)).sum(-1).double().mean())
            predicted += linear_damage(lambda a, b, c=change: c[a:b], len(change), found[key])
        assert 0.5 < predicted / true < 2.0, (key, predicted, true)


def test_kl_of_rounded_inputs_is_predicted(tiny: torch.nn.Module) -> None:
    """Damage of 8-bit inputs, one layer at a time, against the true KL, within a factor of 2."""
    from joulesmith.plan.damage import activation_damage, round_activations

    windows = np.random.default_rng(4).integers(0, 50, (96, 16)).astype(np.int32)
    found, _ = run(tiny, windows, batch=16)
    tokens = torch.from_numpy(windows).long()
    with torch.no_grad():
        before = torch.log_softmax(tiny(tokens).logits.double(), -1)
    for key in ("0.mlp.down_proj", "1.mlp.gate_proj", "2.self_attn.o_proj"):
        index, _, name = key.partition(".")
        layer = tiny.model.layers[int(index)].get_submodule(name)
        block = 8

        def coarse(_: object, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            x = args[0]
            return (round_activations(x.reshape(-1, x.shape[-1]), 8).reshape(x.shape),)

        handle = layer.register_forward_pre_hook(coarse)
        with torch.no_grad():
            after = torch.log_softmax(tiny(tokens).logits.double(), -1)
        handle.remove()
        true = float((before.exp() * (before - after)).sum(-1).mean())
        predicted = activation_damage(layer.weight.detach(), found[key], block)
        assert 0.5 < predicted / true < 2.0, (key, predicted, true)


def test_damage_of_directions_without_gradient_is_nothing() -> None:
    """What the product of separate moments cannot see: a change along which no gradient lies."""
    from joulesmith.moments import Sample
    from joulesmith.plan.damage import linear_damage

    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(200, 6, generator=generator), torch.randn(200, 4, generator=generator)
    outward = torch.randn(4, generator=generator)
    outward /= outward.norm()
    g -= (g @ outward)[:, None] * outward
    hessian, fisher = x.T @ x / 200, g.square().mean(0)
    change = outward[:, None] * torch.randn(6, generator=generator)
    apart = Moments(hessian, hessian.diagonal(), fisher, 200)
    whole = Moments(hessian, hessian.diagonal(), fisher, 200, Sample(x, g))
    assert linear_damage(lambda a, b: change[a:b], 4, apart) > 0.01
    assert linear_damage(lambda a, b: change[a:b], 4, whole) < 1e-9
    other = torch.randn(4, 6, generator=generator)
    expected = 0.5 * torch.einsum("tr,rc,tc->t", g, other, x).square().mean()
    found = linear_damage(lambda a, b: other[a:b], 4, whole)
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_unknown_structure_is_refused() -> None:
    with pytest.raises(JoulesmithError, match="structure of Linear"):
        run(torch.nn.Linear(2, 2), np.zeros((1, 4), np.int32))


def test_visitors_multiply_at_full_precision(tiny: torch.nn.Module) -> None:
    seen = []
    before = torch.get_float32_matmul_precision()

    def visit(*_: object) -> None:
        seen.append(torch.get_float32_matmul_precision())

    calibrate(tiny, np.zeros((2, 4), np.int32), visit)
    assert seen == [before] * 3 and torch.get_float32_matmul_precision() == before


def test_same_seed_same_moments(tiny: torch.nn.Module) -> None:
    windows = np.random.default_rng(2).integers(0, 50, (4, 8)).astype(np.int32)
    a, _ = run(tiny, windows, seed=1)
    b, _ = run(tiny, windows, seed=1)
    assert all(torch.equal(a[k].hessian, b[k].hessian) for k in a)


def test_words_are_drawn_as_often_as_they_are_likely() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0]).expand(40_000, -1)
    drawn, sums = drawn_from(p, torch.Generator().manual_seed(1))
    share = torch.bincount(drawn[:, 0], minlength=6) / len(p)
    torch.testing.assert_close(share, p[0], rtol=0, atol=0.01)  # four standard errors
    assert not share[p[0] == 0].any()
    torch.testing.assert_close(sums[0], p[0].cumsum(0))


def test_gradients_of_the_sample_alone(
    tiny: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without gradients elsewhere: plain second moments of all text, gradients of the sample."""
    monkeypatch.setattr("joulesmith.calibrate.SAMPLE", 48)  # two windows of the five
    windows = np.random.default_rng(0).integers(0, 50, (5, 12)).astype(np.int32)
    ticks: list[float] = []
    found, head = run(tiny, windows, batch=2, scratch=tmp_path, graded=False, progress=ticks.append)
    whole, _ = run(tiny, windows, batch=2)
    part, part_head = run(tiny, windows[[0, 2]], batch=1)
    loose = {"rtol": 2e-2, "atol": 1e-3}  # products may be bfloat16's
    seen: dict[str, torch.Tensor] = {}
    handles = [
        m.register_forward_pre_hook(lambda _m, a, key=name: seen.__setitem__(key, a[0]))
        for name, m in tiny.model.named_modules()
        if isinstance(m, torch.nn.Linear)
    ]
    with torch.no_grad():
        normed = tiny.model(torch.from_numpy(windows).long()).last_hidden_state
    for h in handles:
        h.remove()
    for key, m in found.items():
        x = seen[f"layers.{key}"].flatten(0, 1)
        torch.testing.assert_close(m.hessian, x.T @ x / 60, **loose)
        torch.testing.assert_close(m.squares, x.square().mean(0), rtol=1e-3, atol=1e-5)
        assert m.tokens == 60 and m.ends is not None and whole[key].ends is not None
        torch.testing.assert_close(m.ends, whole[key].ends, **loose)
        assert m.sample is not None and part[key].sample is not None
        torch.testing.assert_close(m.sample.x, part[key].sample.x, **loose)
        torch.testing.assert_close(m.sample.g, part[key].sample.g, rtol=3e-2, atol=1e-5)
        torch.testing.assert_close(m.fisher, part[key].fisher, rtol=5e-2, atol=1e-8)
    assert found["0.self_attn.q_proj"].hessian is found["0.self_attn.v_proj"].hessian
    assert found["0.mlp.gate_proj"].hessian is found["0.mlp.up_proj"].hessian
    assert found["0.self_attn.q_proj"].hessian is not found["1.self_attn.q_proj"].hessian
    x = normed.flatten(0, 1)
    torch.testing.assert_close(head.head.hessian, x.T @ x / 60, **loose)
    torch.testing.assert_close(head.head.fisher, part_head.head.fisher, rtol=2e-2, atol=1e-5)
    torch.testing.assert_close(head.input_fisher, part_head.input_fisher, rtol=5e-2, atol=1e-8)
    assert ticks == sorted(ticks) and ticks[-1] == pytest.approx(1)
    assert not list(tmp_path.iterdir())


def test_layers_share_sums_only_while_they_read_the_same() -> None:
    from types import SimpleNamespace

    from joulesmith.calibrate import _SharedSums

    def taps(**inputs: torch.Tensor) -> dict[str, object]:
        return {n: SimpleNamespace(x=x) for n, x in inputs.items()}

    g = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(5, 8, generator=g) for _ in range(3))
    sums = _SharedSums()
    batches = [
        taps(q=a, k=a, part=a[:, :4], idle=a[:0]),
        taps(q=a, k=a, late=a, part=b[:, :4]),
        taps(q=b, k=c),
        taps(k=a, idle=b),
    ]
    for batch in batches:
        sums.add(batch)  # type: ignore[arg-type]
    for name in ("q", "k", "part", "late", "idle"):
        seen = [batch[name].x for batch in batches if name in batch]  # type: ignore[attr-defined]
        x = torch.cat(seen)
        assert sums[name].tokens == len(x)
        torch.testing.assert_close(sums[name].weighted, x.T @ x)
    both = _SharedSums()
    both.add(batches[0])  # type: ignore[arg-type]
    assert both["q"] is both["k"] and both["part"] is not both["q"] and "idle" not in both
