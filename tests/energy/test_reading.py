from __future__ import annotations

import json

import pytest

from joulesmith.energy.reading import Part, Reading

WALL = Part("machine", 90.0, 80.0, 100.0, "measured", "external meter")
READING = Reading(
    90.0,
    3.0,
    80.0,
    100.0,
    "measured",
    30.0,
    1.5,
    (
        Part("cpu", 20.0, 10.0, 30.0, "modelled", "x"),
        Part("core", 5.0, 4.0, 6.0, "measured", "y", "cpu"),
    ),
    ("a note",),
    WALL,
    1000,
    2000,
)


def test_through_json_and_back() -> None:
    assert Reading.from_dict(json.loads(json.dumps(READING.to_dict()))) == READING
    bare = Reading(None, 1.0)
    assert Reading.from_dict(json.loads(json.dumps(bare.to_dict()))) == bare


def test_per_divides_what_is_a_sum_and_nothing_else() -> None:
    each = READING.per(10)
    assert (each.joules, each.low, each.high, each.marginal) == (9.0, 8.0, 10.0, 3.0)
    assert each.machine is not None and each.machine.joules == 9.0
    assert (each.peak_memory_bytes, each.device_memory_bytes) == (1000, 2000)
    assert each.watts == pytest.approx(READING.watts)
    assert each.parts[1].within == "cpu"
    with pytest.raises(ValueError, match="positive"):
        READING.per(0)
