"""Parallel plans: communication against closed forms, speed and joules against what cannot be."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.errors import JoulesmithError
from joulesmith.estimate.devices import find
from joulesmith.estimate.model.plain import of_numbers
from joulesmith.estimate.training.parallel import (
    Links,
    Plan,
    check,
    links_of,
    microbatches,
    step,
    volumes,
)

H100 = find("H100 SXM 80GB")
DENSE = of_numbers(8e9, layers=32, hidden=4096, heads=32, vocab=128256, name="dense")
SPARSE = of_numbers(47e9, active=13e9, layers=32, hidden=4096, experts=8, experts_per_token=2)
LINKS = Links(node=8, inside=300e9, between=40e9)
BATCH = 4096 * 1024.0
RANKS = st.sampled_from([1, 2, 4, 8])


def test_one_device_sends_nothing() -> None:
    for shape in (DENSE, SPARSE):
        v = volumes(shape, Plan(), BATCH, LINKS)
        assert v.total == v.network == 0
        assert step(shape, Plan(), BATCH, 100.0, LINKS).seconds == 100


@pytest.mark.parametrize("kind", ["data", "tensor", "pipeline", "expert"])
def test_a_kind_with_one_rank_sends_nothing(kind: str) -> None:
    ranks = {"data": 8, "tensor": 4, "pipeline": 2, "expert": 4} | {kind: 1}
    if kind == "data":
        ranks["expert"] = 1
    v = volumes(SPARSE, Plan(**ranks), BATCH, LINKS)
    assert getattr(v, kind) == 0


def test_a_ring_sends_what_the_closed_forms_say() -> None:
    whole = 2.0 * DENSE.parameters
    for d in (2, 7, 64):
        plain = volumes(DENSE, Plan(data=d, sharding="none"), BATCH, LINKS).data
        sharded = volumes(DENSE, Plan(data=d), BATCH, LINKS).data
        assert plain == pytest.approx(2 * (d - 1) / d * whole)
        assert sharded == pytest.approx(1.5 * plain)  # ZeRO, section 7
    # 4 all-reduces of 2 bytes x tokens x hidden a layer, 2 (t - 1) / t of each
    t = volumes(DENSE, Plan(tensor=4), BATCH, LINKS).tensor
    assert t == pytest.approx(4 * 32 * 1.5 * 2 * BATCH * 4096)
    p = volumes(DENSE, Plan(pipeline=4), BATCH, LINKS).pipeline
    assert p == pytest.approx(2 * 0.75 * 2 * BATCH * 4096)
    e = volumes(SPARSE, Plan(data=8, expert=8), BATCH, LINKS).expert
    assert e == pytest.approx(4 * 7 / 8 * 2 * BATCH / 8 * 4096 * 2 * 32)


def test_experts_spread_over_ranks_are_not_reduced_there() -> None:
    together = volumes(SPARSE, Plan(data=8), BATCH, LINKS).data
    apart = volumes(SPARSE, Plan(data=8, expert=8), BATCH, LINKS).data
    dense = 3 * 7 / 8 * 2 * (SPARSE.parameters - SPARSE.expert_weights)
    assert apart == pytest.approx(dense) and together > apart


def test_a_bubble_is_p_minus_1_over_m() -> None:
    s = step(DENSE, Plan(pipeline=4, microbatches=12), BATCH, 40.0, LINKS)
    assert s.bubble == pytest.approx(10 * 3 / 12)
    # as a share of compute and bubble: (p - 1) / (m + p - 1)
    assert s.bubble / (s.bubble + s.compute) == pytest.approx(3 / 15)


def test_microbatches_are_no_more_than_sequences() -> None:
    plan = Plan(data=4, pipeline=8, microbatches=1000)
    assert microbatches(plan, BATCH, 4096) == 256
    assert microbatches(plan, 1.0, 4096) == 1


def test_what_stays_in_a_node_does_not_use_the_network() -> None:
    assert volumes(DENSE, Plan(data=8), BATCH, LINKS).network == 0
    v = volumes(DENSE, Plan(data=64), BATCH, LINKS)
    assert v.network == pytest.approx(v.data / 8)  # one hop in eight of a ring
    inside = step(DENSE, Plan(tensor=8), BATCH, 1.0, LINKS).tensor
    across = step(DENSE, Plan(tensor=16), BATCH, 1.0, LINKS).tensor
    assert across > inside


def test_links_follow_the_device_and_the_user() -> None:
    own = links_of(H100, node=4, network_gb_s=100)
    assert own.node == 4 and own.between > links_of(H100).between
    assert links_of(find("TPU v4")).node > 1000
    assert links_of(find("RTX 4090")).inside <= links_of(H100).inside


@given(d=st.integers(1, 4096), batch=st.floats(1e4, 1e9))
def test_a_step_is_never_shorter_than_its_compute(d: int, batch: float) -> None:
    s = step(DENSE, Plan(data=d), batch, 50.0, LINKS)
    assert s.seconds >= s.compute == 50 / d
    assert 0 < s.efficiency <= 1


@pytest.mark.parametrize(
    ("ranks", "told"),
    [
        ({"data": 0}, "data is 0"),
        ({"tensor": 1.5}, "tensor is 1.5"),
        ({"data": 6, "expert": 4}, "4 expert ranks do not divide 6"),
        ({"sharding": "some"}, "sharding"),
        ({"microbatches": -1}, "microbatches is -1"),
    ],
)
def test_plans_that_are_none_are_refused_in_one_line(ranks: dict, told: str) -> None:
    with pytest.raises(JoulesmithError, match=told) as e:
        Plan(**ranks)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", ["tensor", "pipeline", "expert"])
def test_a_model_has_to_have_what_is_divided(kind: str) -> None:
    ranks = {"data": 64, kind: 64} if kind == "expert" else {kind: 64}
    with pytest.raises(JoulesmithError, match="give at most"):
        check(SPARSE, Plan(**ranks))
    check(SPARSE, Plan(data=8, tensor=8, pipeline=32, expert=8))
    assert math.prod((8, 8, 32)) == Plan(data=8, tensor=8, pipeline=32).devices
