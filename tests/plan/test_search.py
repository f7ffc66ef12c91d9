"""The search against a synthetic model whose true loss is known."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from joulesmith.plan.damage import Correction, group
from joulesmith.plan.search import (
    Space,
    best_types,
    bolder,
    correct,
    expected_loss,
    front,
    loss_bound,
    safer,
    search,
)
from joulesmith.quality import Quality

TYPES = {"Q8_0": (1.0, 1e-5, 34), "Q5_0": (1.05, 1e-4, 22), "Q4_0": (0.6, 4e-3, 18)}
ROLES = ["attn_q", "attn_v", "ffn_up", "ffn_down"]


def space(seed: int = 0, rounding: float = 0.0) -> Space:
    rng = np.random.default_rng(seed)
    names = [f"blk.{i}.{r}.weight" for i in range(6) for r in ROLES]
    weight = dict(zip(names, rng.lognormal(0, 1, len(names)), strict=True))
    inputs = dict(zip(names, rng.lognormal(0, 2, len(names)) * rounding, strict=True))
    return Space(
        joules={n: {t: j for t, (j, _, _) in TYPES.items()} for n in names},
        sizes={n: {t: s for t, (_, _, s) in TYPES.items()} for n in names},
        damage={n: {t: d * weight[n] for t, (_, d, _) in TYPES.items()} for n in names},
        activation={n: dict.fromkeys(TYPES, 0.002 * inputs[n]) for n in names},
        roles={n: n.split(".")[2] for n in names},
    )


def quality(kl: float, tokens: int = 4000, noise: float = 1e-4) -> Quality:
    return Quality(
        kept=math.exp(-kl),
        kept_low=math.exp(-kl - noise),
        perplexity=10,
        reference_perplexity=10,
        kl=kl,
        kl_stderr=0,
        top1=1,
        tokens=tokens,
        windows=16,
        text="",
    )


TRUTH = {"attn_qk": 0.5, "attn_vo": 2.0, "ffn_in": 1.0, "ffn_down": 3.0}


def judge_of(s: Space, calls: list[Mapping[str, str]] | None = None):  # type: ignore[no-untyped-def]
    def judge(types: Mapping[str, str]) -> Quality:
        if calls is not None:
            calls.append(types)
        weights = sum(s.damage[t][k] * TRUTH[group(s.roles[t])] for t, k in types.items())
        inputs = sum(s.activation[t][k] * 0.05 for t, k in types.items())
        return quality(weights + inputs)

    return judge


def test_correction_finds_the_true_factors() -> None:
    s = space()
    c = correct(s, judge_of(s), ["Q4_0"])
    for g, true in TRUTH.items():
        assert c.factor(g, "Q4_0") == pytest.approx(true, rel=0.05)


def test_rounded_inputs_are_told_from_rounded_weights() -> None:
    s = space(rounding=1.0)
    for n in s.damage:
        s.damage[n]["BF16"] = s.activation[n]["BF16"] = 0.0  # type: ignore[index]
        s.joules[n]["BF16"] = 2.0  # type: ignore[index]
        s.sizes[n]["BF16"] = 64  # type: ignore[index]
    assert best_types(s) == dict.fromkeys(s.damage, "BF16")
    c = correct(s, judge_of(s), ["Q4_0"])
    for g, true in TRUTH.items():
        assert c.factor(g, "inputs") == pytest.approx(0.05, rel=0.05)
        assert c.factor(g, "Q4_0") == pytest.approx(true, rel=0.05)


@pytest.mark.parametrize("seed", range(4))
def test_search_gets_near_the_best_possible(seed: int) -> None:
    s = space(seed)
    truth = judge_of(s)
    calls: list[Mapping[str, str]] = []
    c = correct(s, truth, ["Q4_0"])
    found = search(s, c, judge_of(s, calls), 0.99, final_tokens=4000)
    best = found[0]
    assert loss_bound(best.quality, 4000) <= -math.log(0.99)
    assert len(calls) <= 7
    # With exact corrections the optimum is the solver's at the exact budget.
    from joulesmith.plan.solve import solve

    exact = solve(
        s.options(Correction({(g, t): f for g, f in TRUTH.items() for t in TYPES})),
        -math.log(0.99) - 1e-4,
    )
    assert best.joules <= exact.joules * 1.02


def test_hopeless_floor_gives_the_nearest_miss() -> None:
    s = space()
    c = correct(s, judge_of(s), ["Q4_0"])
    found = search(s, c, judge_of(s), 1.0, final_tokens=4000)
    assert found and all(loss_bound(t.quality, 4000) > 0 for t in found)
    assert found[0].quality.kept_low == max(t.quality.kept_low for t in found)


def test_generous_floor_takes_the_cheapest_types() -> None:
    s = space()
    found = search(s, Correction(), judge_of(s), 0.5, final_tokens=4000)
    assert set(found[0].types.values()) == {"Q4_0"}


def test_front_is_monotone_and_safer_is_safer() -> None:
    s = space()
    c = Correction()
    points = front(s, c)
    joules = [p.joules for p in points]
    assert joules == sorted(joules, reverse=True)
    trial = search(s, c, judge_of(s), 0.99, final_tokens=4000)[0]
    next_plan = safer(s, c, trial, quality(0.015), 0.99)
    assert next_plan is not None and 0.4 * trial.damage < next_plan.damage <= 0.7 * trial.damage
    assert safer(s, c, trial, quality(1.0), 0.999999) is None
    assert best_types(s) == dict.fromkeys(s.damage, "Q8_0")


def test_a_pass_with_room_to_spare_is_followed_by_a_bolder_plan() -> None:
    s = space()
    c = correct(s, judge_of(s), ["Q4_0"])
    trial = search(s, c, judge_of(s), 0.99, final_tokens=4000)[0]
    wider = bolder(s, c, trial, quality(0.006), 0.99)
    assert wider is not None and wider.joules < trial.joules
    assert trial.damage < wider.damage <= 2 * trial.damage
    assert bolder(s, c, trial, quality(0.0095), 0.99) is None, "no room"
    free = bolder(s, c, trial, quality(1e-6), 0.99)
    assert free is not None and free.damage <= 2 * trial.damage


def test_a_noisy_mean_is_drawn_towards_the_kl() -> None:
    from dataclasses import replace

    def seen(loss: float, noise: float) -> Quality:
        q = quality(0.01)
        return replace(q, kept=math.exp(-loss), kept_low=math.exp(-loss - noise))

    # Known well: believed. Not known at all: the KL. In between: in between.
    assert expected_loss(seen(0.004, 1e-9)) == pytest.approx(0.004, rel=1e-3)
    assert expected_loss(seen(0.004, 1.0)) == pytest.approx(0.01, rel=1e-3)
    assert expected_loss(seen(0.004, 1.7 * 0.0025)) == pytest.approx(0.007, rel=1e-3)
    assert loss_bound(replace(quality(0.01), kept_low=0.0), 4000) == math.inf


def test_bound_shrinks_with_more_tokens() -> None:
    q = quality(0.01, tokens=4000, noise=2e-3)
    assert loss_bound(q, 16000) == pytest.approx(0.01 + 1e-3)
