"""What is sent arrives, whatever the sizes of the reads."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from joulesmith.engines import wire

values = st.dictionaries(
    st.text(max_size=5).filter(lambda k: k != "arrays"),
    st.none() | st.integers(-(2**40), 2**40) | st.text() | st.floats(allow_nan=False),
)
arrays = st.lists(
    hnp.arrays(
        st.sampled_from([np.int32, np.float32, np.bool_, np.float16]),
        hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4),
    ),
    max_size=3,
)


@settings(deadline=None, max_examples=40)
@given(values, arrays)
def test_round_trip(message: dict[str, object], sent: list[np.ndarray]) -> None:
    stream = io.BytesIO()
    wire.send(stream.write, message, sent)
    stream.seek(0)
    got, received = wire.receive(stream.readline, lambda view: _fill(stream, view))
    assert got == message
    assert len(received) == len(sent)
    for a, b in zip(received, sent, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def _fill(stream: io.BytesIO, view: memoryview) -> None:
    assert stream.readinto(view) == len(view)


@pytest.mark.parametrize(
    "line", [b"", b"{", b"[]\n", b"{}\n", b'{"arrays": [["x", [1]]]}\n', b"\xff\n"]
)
def test_foreign_bytes(line: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.receive(lambda: line, lambda view: None)
