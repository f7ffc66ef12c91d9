from __future__ import annotations

import re
import urllib.error
import urllib.request
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.energy.prometheus import (
    CONTENT_TYPE,
    Metric,
    PrometheusEndpoint,
    meter_metrics,
    render,
)
from joulesmith.energy.reading import Part, Reading
from joulesmith.errors import JoulesmithError

SAMPLE = re.compile(r"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"(?:,|$)')


def parse(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The samples of an exposition, read by the letter of the format."""
    assert text == "" or text.endswith("\n")
    out: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    typed = ""
    for line in text.split("\n")[:-1]:
        if line.startswith("# "):
            if line.startswith("# TYPE "):
                typed = line.split(" ")[2]
            continue
        m = SAMPLE.fullmatch(line)
        assert m is not None and m["name"] == typed, line
        inside, at, labels = m["labels"] or "", 0, []
        while at < len(inside):
            label = LABEL.match(inside, at)
            assert label is not None, line
            value = re.sub(r"\\(.)", lambda e: {"n": "\n"}.get(e[1], e[1]), label[2])
            labels.append((label[1], value))
            at = label.end()
        key = (m["name"], frozenset(labels))
        assert key not in out
        out[key] = float(m["value"])
    return out


def one(text: str, name: str, **labels: str) -> float | None:
    return parse(text).get((f"joulesmith_{name}", frozenset(labels.items())))


def test_counters_of_a_meter() -> None:
    part = Part("cpu", 10.0, 5.0, 15.0, "modelled", "x")
    core = Part("core", 9.0, 5.0, 15.0, "modelled", "x", within="cpu")
    readings = {
        "train": [
            Reading(10.0, 2.0, 5.0, 15.0, "modelled", 4.0, parts=(part, core)),
            Reading(20.0, 2.0, 15.0, 25.0, "modelled", 4.0, parts=(part,)),
            Reading(None, 1.0, peak_memory_bytes=7, device_memory_bytes=None),
        ],
        "blind": [Reading(None, 1.0)],
    }
    text = render(meter_metrics(readings, {"job": "a"}))
    assert one(text, "energy_joules_total", job="a", window="train") == 30
    assert one(text, "energy_low_joules_total", job="a", window="train") == 20
    assert one(text, "energy_high_joules_total", job="a", window="train") == 40
    assert one(text, "energy_marginal_joules_total", job="a", window="train") == 8
    assert one(text, "power_watts", job="a", window="train") == 10
    assert one(text, "window_seconds_total", job="a", window="train") == 5
    assert one(text, "windows_unknown_total", job="a", window="train") == 1
    device = {"device": "cpu", "pedigree": "modelled"}
    assert one(text, "device_energy_joules_total", job="a", window="train", **device) == 20
    assert 'device="core"' not in text  # it lies within the cpu
    assert one(text, "peak_memory_bytes", job="a", window="train", kind="resident") == 7
    assert one(text, "peak_memory_bytes", job="a", window="train", kind="device") is None
    # Unknown is absent, not 0.
    assert one(text, "energy_joules_total", job="a", window="blind") is None
    assert one(text, "windows_total", job="a", window="blind") == 1
    assert "# TYPE joulesmith_energy_joules_total counter\n" in text
    assert "# TYPE joulesmith_power_watts gauge\n" in text
    assert render(meter_metrics({})) == ""


@given(
    st.dictionaries(st.sampled_from(["a", "b_1", "_c"]), st.text(max_size=30)),
    st.floats(),
    st.text(max_size=30),
)
def test_any_text_and_number_comes_back(labels: dict[str, str], value: float, text: str) -> None:
    said = render([Metric("m_joules_total", "counter", text, [(labels, value)])])
    ((key, back),) = parse(said).items()
    assert key == ("m_joules_total", frozenset(labels.items()))
    assert back == value or (back != back and value != value)
    assert said.count("\n") == 3


def test_prometheus_own_parser_agrees() -> None:
    client: Any = pytest.importorskip("prometheus_client.parser")
    awkward = 'C:\\dir\n"x"'
    metrics = [
        Metric("j_joules_total", "counter", "a\\b\nc", [({"w": awkward}, 1.5), ({}, 2.0)]),
        Metric("p_watts", "gauge", "", [({}, float("inf")), ({"w": "ü"}, None)]),
    ]
    families = list(client.text_string_to_metric_families(render(metrics)))
    assert [(f.name, f.type) for f in families] == [("j_joules", "counter"), ("p_watts", "gauge")]
    assert families[0].documentation == "a\\b\nc"
    assert [(s.name, s.labels, s.value) for s in families[0].samples] == [
        ("j_joules_total", {"w": awkward}, 1.5),
        ("j_joules_total", {}, 2.0),
    ]
    assert families[1].samples[0].value == float("inf") and len(families[1].samples) == 1


@pytest.mark.parametrize(
    "bad",
    [
        Metric("1x_total", "counter", "", [({}, 1.0)]),
        Metric("x-y", "gauge", "", [({}, 1.0)]),
        Metric("joules", "counter", "", [({}, 1.0)]),
        Metric("x", "histogram", "", [({}, 1.0)]),
        Metric("x", "gauge", "", [({"a-b": ""}, 1.0)]),
        Metric("x", "gauge", "", [({"__a": ""}, 1.0)]),
        Metric("x", "gauge", "", [({}, 1.0), ({}, 2.0)]),
    ],
)
def test_what_the_format_forbids(bad: Metric) -> None:
    with pytest.raises(ValueError):
        render([bad])
    with pytest.raises(ValueError):
        render([Metric("x", "gauge", ""), Metric("x", "gauge", "")])


def test_endpoint() -> None:
    fail = [False]

    def text() -> str:
        if fail[0]:
            raise OSError("no driver")
        return render([Metric("x_total", "counter", "help", [({}, 1.0)])])

    with PrometheusEndpoint(text, port=0) as served:
        assert served.url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(served.url, timeout=10) as answer:
            assert answer.headers["Content-Type"] == CONTENT_TYPE
            assert parse(answer.read().decode()) == {("x_total", frozenset()): 1.0}
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(served.url + "/other", timeout=10)
        fail[0] = True
        with pytest.raises(urllib.error.HTTPError, match="500"):
            urllib.request.urlopen(served.url, timeout=10)
        fail[0] = False
        with urllib.request.urlopen(served.url, timeout=10) as answer:
            assert answer.status == 200
        port = int(served.url.rsplit(":", 1)[1].split("/")[0])
        with pytest.raises(JoulesmithError, match="cannot listen"):
            PrometheusEndpoint(text, port=port)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(served.url, timeout=2)
    with pytest.raises(JoulesmithError, match="cannot listen"):
        PrometheusEndpoint(text, port=70000)
