"""Recovery: what trains and nothing else; zeros stay; what comes out is what was trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed import Killed, killed_at
from torch import Tensor, nn

from joulesmith import models, text
from joulesmith.compress.quantize.grids import Grid, grid
from joulesmith.errors import JoulesmithError
from joulesmith.train import adapters, losses, quantized
from joulesmith.train.loop import train
from joulesmith.train.recover import from_gguf, prepared, recover, to_gguf
from joulesmith.train.recover_settings import DistilSettings, RecoverSettings
from joulesmith.train.settings import TrainSettings
from joulesmith.train.teacher import cache_top
from small_modules import language
from tiny import write_tiny

VOCAB = 50
WINDOWS = np.random.default_rng(0).integers(0, VOCAB, (16, 10)).astype(np.int32)
MODES: tuple[dict[str, Any], ...] = (
    {"mode": "full"},
    {"mode": "lora", "rank": 4},
    {"mode": "norms"},
    {"mode": "quantized", "types": "INT4-G8"},
    {"mode": "quantized", "types": "INT3-G8-ZP"},
    {"mode": "quantized", "types": "TERNARY-G8"},
    {"mode": "quantized", "types": "NF4-G8"},
)
IDS = [str(m.get("types", m["mode"])) for m in MODES]


def model(seed: int = 0) -> nn.Module:
    """With biases, and half of the weights of the MLP zero."""
    import transformers as t

    torch.manual_seed(seed)
    made: nn.Module = t.LlamaForCausalLM(
        t.LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
            tie_word_embeddings=True, attention_bias=True,
        )
    )  # fmt: skip
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5)
            elif not p.any():
                p.copy_(0.1 * torch.randn_like(p))
    return made.eval()


def pruned(seed: int = 0) -> nn.Module:
    made = model(seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in made.named_parameters():
            if "mlp" in n:
                p[torch.rand(p.shape, generator=g) < 0.5] = 0
            if n.endswith("0.self_attn.q_proj.weight"):
                p[3] = 0
    return made


TEACHER = model()


def settings(**given: Any) -> TrainSettings:
    return TrainSettings(
        **{"steps": 6, "batch": 8, "micro": 4, "rate": 1e-2, "decay": 0.1, **given}
    )


def judge(module: nn.Module) -> float:
    rows = torch.from_numpy(WINDOWS.astype(np.int64))
    with torch.no_grad():
        return float(losses.soft(module(rows).logits, TEACHER(rows).logits))


def state(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters()}


@pytest.mark.parametrize("given", MODES, ids=IDS)
def test_only_what_is_meant_moves_and_it_helps(given: dict[str, Any]) -> None:
    module = pruned()
    for p in module.parameters():
        p.requires_grad_(False)
    module.model.norm.weight.requires_grad_(True)  # type: ignore[union-attr, operator]
    before, classes = state(module), [type(m) for m in module.modules()]
    seen: list[float] = []
    found = recover(
        module, WINDOWS, settings(steps=40, decay=0.0), RecoverSettings(**given), teacher=TEACHER,
        judge=judge, progress=seen.append,
    )  # fmt: skip
    after = state(module)
    assert list(after) == list(before), "no parameter is left over"
    assert [type(m) for m in module.modules()] == classes
    assert [n for n, p in module.named_parameters() if p.requires_grad] == ["model.norm.weight"]
    assert not module.training and all(p.grad is None for p in module.parameters())
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    matrices = {n for n in after if "proj.weight" in n}
    vectors = {n for n, p in after.items() if p.ndim == 1}
    # a key's bias shifts all scores of a query alike: it has no gradient but rounding's
    still = {n for n in vectors if "k_proj.bias" in n}
    meant = {
        "full": set(after), "lora": matrices, "norms": vectors, "quantized": matrices | vectors,
    }[given["mode"]]  # fmt: skip
    assert moved - still == meant - still
    assert found.trained.curve[-1][1] < found.trained.curve[0][1] - 0.02
    assert judge(module) == pytest.approx(found.trained.curve[-1][1], rel=1e-4)
    assert seen[-1] == 1.0 and bool(found.packed) == (given["mode"] == "quantized")


@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "adafactor", "muon"])
@pytest.mark.parametrize("given", MODES, ids=IDS)
def test_zeros_stay(given: dict[str, Any], optimizer: str) -> None:
    module = pruned()
    before = state(module)
    how = settings(optimizer=optimizer, rate=0.05, steps=3)
    recover(module, WINDOWS, how, RecoverSettings(**given), teacher=TEACHER)
    zeros = 0
    for n, p in module.named_parameters():
        zero = before[n] == 0
        zeros += int(zero.sum())
        assert not bool(p[zero].any()), n
        if p.ndim == 2 and given["mode"] in ("full", "lora") and "embed" not in n:
            assert int((p == 0).sum()) == int(zero.sum()), n
    assert zeros > 1000


def test_zeros_of_rounding_may_move() -> None:
    for given in ({"mode": "full"}, {"mode": "lora"}):
        module = pruned()
        how = RecoverSettings(keep_zeros=False, **given)  # type: ignore[arg-type]
        recover(module, WINDOWS, settings(), how, teacher=TEACHER)
        weight = module.model.layers[0].mlp.up_proj.weight  # type: ignore[union-attr, index]
        assert bool((weight != 0).all())


# -- adapters -----------------------------------------------------------------


@pytest.mark.parametrize("keep_zeros", [False, True])
def test_an_adapter_merged_is_the_adapter(keep_zeros: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 9).double()
    with torch.no_grad():
        layer.weight[torch.rand(9, 12) < 0.3] = 0
    x = torch.randn(5, 12, dtype=torch.float64)
    first = layer(x).detach()
    w = layer.weight.detach().clone()
    lora = adapters.adapt(layer, 3, 6.0, torch.Generator().manual_seed(0), keep_zeros=keep_zeros)
    assert lora is layer and lora.lora_a.dtype == torch.float64
    torch.testing.assert_close(lora(x), first, rtol=0, atol=1e-15)
    with torch.no_grad():
        lora.lora_b.normal_()
    with_it = lora(x).detach()
    change = 2 * (lora.lora_b @ lora.lora_a).detach()
    change = change * (w != 0) if keep_zeros else change
    torch.testing.assert_close(with_it, first + x @ change.T)
    merged = adapters.merge(lora)
    assert type(merged) is nn.Linear and sorted(n for n, _ in merged.named_parameters()) == [
        "bias", "weight",
    ]  # fmt: skip
    torch.testing.assert_close(merged(x), with_it)
    torch.testing.assert_close(merged.weight, w + change)
    assert bool((merged.weight[w == 0] == 0).all()) == keep_zeros


def test_adapters_are_those_of_peft() -> None:
    peft = pytest.importorskip("peft")
    ours, base = model(), model()
    how = RecoverSettings(mode="lora", rank=3, alpha=5.0)
    config = peft.LoraConfig(r=3, lora_alpha=5.0, target_modules="all-linear", lora_dropout=0.0)
    theirs = peft.get_peft_model(base, config)
    rows = torch.from_numpy(WINDOWS.astype(np.int64))
    with prepared(ours, how):
        mine = {n: m for n, m in ours.named_modules() if isinstance(m, adapters.LoraLinear)}
        other = {
            n.removeprefix("base_model.model."): m
            for n, m in theirs.named_modules()
            if isinstance(m, peft.tuners.lora.Linear)
        }
        assert set(mine) == set(other) and len(mine) == 14
        up = "model.layers.0.mlp.up_proj"
        spread = other[up].lora_A["default"].weight.detach().std()
        assert float(mine[up].lora_a.detach().std()) == pytest.approx(float(spread), rel=0.3)
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for n, m in mine.items():
                m.lora_b.normal_(generator=g)
                other[n].lora_A["default"].weight.copy_(m.lora_a)
                other[n].lora_B["default"].weight.copy_(m.lora_b)
        x, y = ours(rows).logits, theirs(rows).logits
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
        for out in (x, y):
            out.square().mean().backward()
        for n, m in mine.items():
            for p, q in (
                (m.lora_a, other[n].lora_A["default"].weight),
                (m.lora_b, other[n].lora_B["default"].weight),
            ):
                assert p.grad is not None
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)
        trained = {n for n, p in ours.named_parameters() if p.requires_grad}
        assert len(trained) == 28 == sum(p.requires_grad for p in theirs.parameters())
    merged = theirs.merge_and_unload()
    for (n, p), (m, q) in zip(ours.named_parameters(), merged.named_parameters(), strict=True):
        assert n == m
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# -- on the grid --------------------------------------------------------------


@pytest.mark.parametrize("given", [m for m in MODES if m["mode"] == "quantized"], ids=IDS[3:])
def test_the_module_holds_what_is_packed(given: dict[str, Any]) -> None:
    module = pruned()
    found = recover(module, WINDOWS, settings(), RecoverSettings(**given), teacher=TEACHER)
    assert len(found.packed) == 14 and "lm_head" not in found.packed
    for name, (kind, raw) in found.packed.items():
        linear = module.get_submodule(name)
        assert type(linear) is nn.Linear and kind == given["types"]
        back = grid(kind).unpack(raw, linear.in_features)
        assert np.array_equal(back, linear.weight.detach().numpy())


def test_from_what_is_packed_already() -> None:
    module = pruned()
    name, g = "model.layers.1.mlp.down_proj", grid("INT3-G8")
    w = module.get_submodule(name).weight.detach()
    assert isinstance(w, Tensor)
    raw = g.pack(w * 1.25)  # other scales than a search would find
    how = RecoverSettings(mode="quantized")
    with prepared(module, how, {name: ("INT3-G8", raw)}) as parts:
        layer = module.get_submodule(name)
        assert isinstance(layer, quantized.QuantizedLinear)
        assert isinstance(g, Grid)
        assert torch.equal(layer.first, g.read(raw, 24)[1].step.flatten())
    assert list(parts.packed) == [name]
    types = {name: "INT4-G8"}
    with prepared(module, RecoverSettings(mode="quantized", types=types)) as parts:
        pass
    assert {n: k for n, (k, _) in parts.packed.items()} == types


def test_grids_that_do_not_train() -> None:
    how = {"mode": "quantized", "keep_zeros": False}
    for kind, why in (
        ("Q4_K", "does not train"),
        ("Q4_1", "does not train"),
        ("BF16", "does not train"),
        ("INT4-G32", "do not cut into INT4-G32 blocks"),
        ("INT9-G8", "unknown tensor type"),
    ):
        module = model()
        before = state(module)
        with (
            pytest.raises(JoulesmithError, match=why),
            prepared(module, RecoverSettings(types=kind, **how)),  # type: ignore[arg-type]
        ):
            pass
        assert {n: type(m) for n, m in module.named_modules()} == {
            n: type(m) for n, m in model().named_modules()
        }
        assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    with (
        pytest.raises(JoulesmithError, match="no linear layer with a matrix of its own is called"),
        prepared(model(), RecoverSettings(types={"lm_head": "INT4-G8"}, **how)),  # type: ignore[arg-type]
    ):
        pass
    raw = grid("INT4-G8").pack(torch.randn(5, 16))
    with (
        pytest.raises(JoulesmithError, match="5 packed rows"),
        prepared(
            model(),
            RecoverSettings(**how),  # type: ignore[arg-type]
            {"model.layers.0.mlp.up_proj": ("INT4-G8", raw)},
        ),
    ):
        pass


# -- the whole ----------------------------------------------------------------


@pytest.mark.parametrize("given", MODES[:4], ids=IDS[:4])
@pytest.mark.parametrize("stop", [1, 4])
def test_a_killed_recovery_goes_on(tmp_path: Path, given: dict[str, Any], stop: int) -> None:
    how = RecoverSettings(**given)

    def go(module: nn.Module, **more: Any) -> Any:
        return recover(module, WINDOWS, settings(), how, teacher=TEACHER, judge=judge, **more)

    one = go(whole := pruned())
    with pytest.raises(Killed):
        go(pruned(), folder=tmp_path, progress=killed_at(stop + 1), save_seconds=0.0)
    two = go(again := pruned(), folder=tmp_path)
    assert two.trained.losses == one.trained.losses
    for (n, p), q in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), n
    for n, (_, raw) in one.packed.items():
        assert np.array_equal(raw, two.packed[n][1])
    with pytest.raises(JoulesmithError, match="checkpoints of another training"):
        go(pruned(1), folder=tmp_path)


def test_from_a_cache(tmp_path: Path) -> None:
    cache = cache_top(TEACHER, WINDOWS, 12, tmp_path / "top")
    module = pruned()
    how = RecoverSettings()
    found = recover(
        module, WINDOWS, settings(steps=30), how, cache=cache, judge=judge, folder=tmp_path / "run"
    )
    assert found.trained.curve[-1][1] < 0.7 * found.trained.curve[0][1]


def test_with_attention_matched() -> None:
    module = pruned()
    wanted = DistilSettings(attention=1.0, hidden=1.0)
    recover(module, WINDOWS, settings(), RecoverSettings(), wanted, teacher=TEACHER)
    for m in (module, TEACHER):
        assert m.config._attn_implementation == "sdpa"  # type: ignore[union-attr]


@pytest.mark.parametrize("given", MODES, ids=IDS)
def test_after_an_error_the_module_is_whole(given: dict[str, Any]) -> None:
    module = pruned()
    before = state(module)
    with pytest.raises(RuntimeError, match="here"), prepared(module, RecoverSettings(**given)):
        with torch.no_grad():
            for n, p in module.named_parameters():
                if "lora_b" in n:
                    p.normal_()
        raise RuntimeError("here")
    assert all(type(m) in (nn.Linear,) for m in module.modules() if isinstance(m, nn.Linear))
    assert all(p.requires_grad for p in module.parameters())
    for n, p in module.named_parameters():
        assert torch.equal(p, before[n])


def test_modules_that_share_a_matrix() -> None:
    module = nn.ModuleDict({n: nn.Linear(8, 8) for n in "abc"})
    module["b"].weight = module["a"].weight
    with prepared(module, RecoverSettings(mode="lora", rank=2)):
        assert [n for n, m in module.items() if isinstance(m, adapters.LoraLinear)] == ["c"]


@pytest.mark.parametrize("mode", ["full", "norms"])
def test_gpt2_whose_layers_are_no_linear_ones(mode: str) -> None:
    found = recover(
        language("gpt2", 1), WINDOWS, settings(steps=20), RecoverSettings(mode=mode),  # type: ignore[arg-type]
        teacher=language("gpt2", 0),
    )  # fmt: skip
    assert np.mean(found.trained.losses[-4:]) < np.mean(found.trained.losses[:4])


def test_nothing_to_train() -> None:
    with (
        pytest.raises(JoulesmithError, match=r"has no torch\.nn\.Linear"),
        prepared(language("gpt2"), RecoverSettings(mode="lora")),
    ):
        pass
    with (
        pytest.raises(JoulesmithError, match="nothing trains in this mode"),
        prepared(nn.Linear(3, 3, bias=False), RecoverSettings(mode="norms")),
    ):
        pass
    half = copy.deepcopy(TEACHER).bfloat16()
    for mode in ("full", "norms", "lora", "quantized"):
        with (
            pytest.raises(JoulesmithError, match="is bfloat16, too coarse"),
            prepared(half, RecoverSettings(mode=mode, types="INT4-G8")),  # type: ignore[arg-type]
        ):
            pass


@pytest.mark.parametrize("given", MODES[:4], ids=IDS[:4])
def test_recomputed_activations_change_nothing(given: dict[str, Any]) -> None:
    wanted = DistilSettings(hidden=0.5, attention=0.5, on_policy=0.5)
    found = []
    for recompute in (False, True):
        how = settings(recompute=recompute, steps=4)
        got = recover(
            pruned(), WINDOWS, how, RecoverSettings(**given), wanted, teacher=TEACHER, eos=3
        )
        found.append(got.trained.losses)
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_adapters_in_bfloat16_products() -> None:
    """Autocast leaves the sum of weights and adapters in float32."""
    module = pruned()
    found = recover(
        module, WINDOWS, settings(precision="bfloat16", steps=20), RecoverSettings(mode="lora"),
        teacher=TEACHER, judge=judge,
    )  # fmt: skip
    assert found.trained.curve[-1][1] < found.trained.curve[0][1]
    assert judge(module) == pytest.approx(found.trained.curve[-1][1], rel=1e-4)


def test_what_stays_zero_does_not_count_in_the_clip() -> None:
    def objective(module: nn.Module, tokens: Tensor, places: Any) -> Tensor:
        return losses.hard(module(tokens[:, :-1]).logits, tokens[:, 1:])

    module = pruned()
    before = state(module)
    with prepared(module, RecoverSettings()) as parts:
        assert len(parts.hook.zeros()) == 7
        for p, zero in parts.hook.zeros().items():
            assert torch.equal(zero, p == 0)
        how = settings(
            steps=1, clip=1e-3, optimizer="sgd", rate=1.0, warmup=0, schedule="constant", decay=0.0
        )
        train(module, WINDOWS, objective, how, hook=parts.hook)
    moved = [(p.detach() - before[n]).square().sum() for n, p in module.named_parameters()]
    assert float(torch.stack(moved).sum().sqrt()) == pytest.approx(1e-3, rel=1e-2)


# -- a model that knows some English ------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("given", MODES[:4], ids=IDS[:4])
def test_better_on_text_never_seen(folder: Path, given: dict[str, Any]) -> None:
    teacher, student = models.load(folder), models.load(folder)
    found = text.windows(teacher, text.english(), 48, {"fit": 96, "judge": 24}, 0)
    rows = torch.from_numpy(found["judge"].tokens.astype(np.int64))
    quantized_ = given["mode"] == "quantized"
    with torch.no_grad():
        for r in student.matrices():
            w = models.gguf_weight(student, r.name)
            if r.layer is not None and not quantized_:
                small = w.abs() < w.abs().flatten().quantile(0.5)
                models.set_gguf_weight(student, r.name, w.masked_fill(small, 0))

    def far(module: nn.Module) -> float:
        with torch.no_grad():
            return float(losses.soft(module(rows).logits, teacher.module(rows).logits))

    how = RecoverSettings(**{**given, **({"types": "INT2-G16"} if quantized_ else {})})
    begin = far(student.module)
    if quantized_:
        rounded = copy.deepcopy(student.module)
        with prepared(rounded, how):
            pass
        begin = far(rounded)
    got = recover(
        student.module, found["fit"].tokens, settings(steps=24, rate=2e-3, decay=0.0), how,
        teacher=teacher.module, vocab=len(teacher.tokenizer),
    )  # fmt: skip
    assert far(student.module) < (0.95 if given["mode"] == "norms" else 0.8) * begin
    named = to_gguf(student, got.packed)
    for name, (kind, raw) in named.items():
        ref = student.ref(name)
        back = torch.as_tensor(grid(kind).unpack(raw, ref.shape[1]))
        assert torch.equal(back, models.gguf_weight(student, name))
    again = from_gguf(student, named)
    assert again.keys() == got.packed.keys()
    assert all(np.array_equal(raw, got.packed[n][1]) for n, (_, raw) in again.items())
    assert len(named) == (14 if quantized_ else 0)
    with pytest.raises(JoulesmithError, match="no name for lm"):
        to_gguf(student, {"lm": ("INT4-G8", np.empty((1, 1), np.uint8))})
