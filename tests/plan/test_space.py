"""Joules and damage side by side: what a token costs, in the matrices and beside them."""

from __future__ import annotations

import pytest

from joulesmith.architectures import TensorRef
from joulesmith.energy.reading import Reading
from joulesmith.engines.base import Bench
from joulesmith.plan.space import (
    fast_types,
    make_space,
    price_rest,
    token_joules,
    totals,
    worthwhile,
)

UP = TensorRef("blk.0.ffn_up.weight", "layers.0.up", "ffn_up", 0, (64, 32))
EMBEDDING = TensorRef("token_embd.weight", "embed", "token_embd", None, (96, 32))
HEAD = TensorRef("output.weight", "head", "output", None, (96, 32))
COST = {"BF16": 4.0, "Q8_0": 2.0, "Q4_0": 1.0}
WORKLOAD = (8, 32)


def price(rows: int, columns: int, kind: str) -> tuple[float, float]:
    """Prefill of a token costs half of decode."""
    decode = rows * columns * COST[kind]
    return decode, decode / 2


def bench(decode: float, prefill: float, energy: bool = True) -> Bench:
    """A run of WORKLOAD at these joules (or seconds) a token."""

    def reading(each: float, tokens: int) -> Reading:
        return Reading(each * tokens, 1.0) if energy else Reading(None, each * tokens)

    p, d = WORKLOAD
    return Bench(p, d, reading(prefill, p), reading(decode, d), 1)


def test_a_token_of_a_tied_model_by_hand() -> None:
    found = totals([UP, EMBEDDING], {UP.name: "Q4_0"}, "BF16", price, {"decode": 5, "prefill": 3}, WORKLOAD)  # fmt: skip
    decode = 5 + 64 * 32 + 96 * 32 * 4
    prefill = 3 + 64 * 32 / 2 + 96 * 32 * 4 / 8  # the head once for 8 tokens of a prompt
    assert found["decode"] == decode
    assert found["prefill"] == prefill
    assert found["workload"] == pytest.approx((8 * prefill + 32 * decode) / 40)


def test_an_embedding_beside_a_head_costs_nothing() -> None:
    none = {"decode": 0.0, "prefill": 0.0}
    both = totals([EMBEDDING, HEAD], {HEAD.name: "Q4_0"}, "BF16", price, none, WORKLOAD)
    assert both["decode"] == 96 * 32


@pytest.mark.parametrize("energy", [True, False])
def test_rest_and_table_give_back_the_run(energy: bool) -> None:
    types = {UP.name: "Q8_0", EMBEDDING.name: "Q8_0"}
    runs = [bench(20_000 + d, 9_000 + d, energy) for d in (-1, 0, 900)]
    rest = price_rest([UP, EMBEDDING], types, "BF16", price, runs)
    again = totals([UP, EMBEDDING], types, "BF16", price, rest, WORKLOAD)
    assert again == pytest.approx(token_joules(runs, WORKLOAD))
    assert again["decode"] == pytest.approx(20_000), "the median run"


def test_a_looked_up_embedding_keeps_eight_bits() -> None:
    damage = {n: {"Q8_0": 0.1, "Q4_0": 1.0} for n in (UP.name, EMBEDDING.name, HEAD.name)}
    space = make_space([UP, EMBEDDING, HEAD], damage, damage, price, WORKLOAD, "BF16")
    assert set(space.damage[EMBEDDING.name]) == {"Q8_0"}
    assert set(space.damage[HEAD.name]) == {"Q8_0", "Q4_0", "BF16"}
    assert space.damage[UP.name]["BF16"] == space.activation[UP.name]["BF16"] == 0
    assert space.sizes[UP.name]["Q4_0"] < space.sizes[UP.name]["Q8_0"]
    assert fast_types(space) == ["Q4_0"]


def test_a_coarser_type_must_be_cheaper_somewhere() -> None:
    noise = {"fine": 0.1, "coarse": 0.2, "coarser": 0.3}
    cost = {
        (1, 1): {"fine": 10.0, "coarse": 9.5, "coarser": 12.0},
        (2, 2): {"fine": 10.0, "coarse": 9.9, "coarser": None},
    }

    def of(rows: int, columns: int, kind: str) -> float | None:
        return cost[rows, columns][kind]

    assert worthwhile(noise, cost, of, noise) == ["fine"], "5 % is the table's noise"
    assert worthwhile(noise, cost, of, noise, slack=0.01) == ["fine", "coarse"]
    cost[2, 2]["coarser"] = 5.0
    assert worthwhile(noise, cost, of, noise) == ["fine", "coarser"]
