"""Memory of a training plan against ZeRO's table; the fit of the constants against planted ones;
the docs against what is shipped."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.estimate.devices import find
from joulesmith.estimate.model.plain import of_numbers
from joulesmith.estimate.training import utilisation
from joulesmith.estimate.training.constants import shipped
from joulesmith.estimate.training.parallel import Plan, links_of
from joulesmith.estimate.training.plans import Settings, device_bytes, fitting, usual_plan

ROOT = Path(__file__).parents[3]
H100 = find("H100 SXM 80GB")
SHAPE = of_numbers(7.5e9, layers=32, hidden=4096, vocab=32000, name="7.5B")
SHORT = Settings(sequence=1)


@pytest.mark.parametrize(
    ("sharding", "gigabytes"), [("none", 120), ("optimizer", 31.4), ("full", 1.9)]
)
def test_states_are_those_of_zero(sharding: str, gigabytes: float) -> None:
    """Rajbhandari et al. 2019 (arXiv:1910.02054), figure 1: 7.5B weights on 64 devices; sharding
    the optimizer alone, K = 12 of the 16 bytes."""
    plan = Plan(data=64, sharding=sharding)  # type: ignore[arg-type]
    held = device_bytes(SHAPE, plan, SHORT, "full") / 1e9
    gathered = 2 * 2 * 7.5 / 32 if sharding == "full" else 0  # two layers at a time, ours
    assert held - gathered == pytest.approx(gigabytes, rel=0.02, abs=0.05)


@given(
    data=st.sampled_from([1, 2, 8, 64]), tensor=st.sampled_from([1, 2, 8]),
    pipeline=st.sampled_from([1, 2, 8]), sequence=st.sampled_from([512, 4096, 32768]),
)  # fmt: skip
def test_more_sharding_never_needs_more(data, tensor, pipeline, sequence) -> None:
    settings = Settings(sequence=sequence)

    def held(**ranks) -> float:
        words = {"data": data, "tensor": tensor, "pipeline": pipeline} | ranks
        return device_bytes(SHAPE, Plan(**words), settings, "selective")

    assert held(sharding="optimizer") <= held(sharding="none")
    assert held(tensor=2 * tensor) < held()
    assert held(pipeline=2 * pipeline) <= held()
    assert held(data=2 * data, sharding="none") == held(sharding="none")


def test_a_teacher_and_a_lora_count() -> None:
    plan = Plan()
    teacher = replace(SHORT, teacher=SHAPE)
    more = device_bytes(SHAPE, plan, teacher, "full") - device_bytes(SHAPE, plan, SHORT, "full")
    assert more == pytest.approx(2 * SHAPE.parameters)
    lora = device_bytes(SHAPE, plan, replace(SHORT, lora_rank=8), "full")
    assert lora == pytest.approx(2 * SHAPE.parameters, rel=0.05)


def test_the_usual_plan_fits_and_uses_every_device() -> None:
    settings = Settings(sequence=4096)
    for n in (1, 2, 3, 8, 24, 512):
        shape = of_numbers(1e9) if n < 8 else SHAPE
        plan = usual_plan(shape, n, H100, settings, links_of(H100), 4e6, 1000.0)
        assert plan.devices == n and fitting(shape, plan, H100, settings) is not None


def test_memory_that_is_unknown_fits_everything() -> None:
    found = fitting(SHAPE, Plan(), replace(H100, memory_gib=None), Settings(sequence=4096))
    assert found is not None and found[0] == "selective"


# ---- the fit


@pytest.fixture
def fitter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import fit_training

    yield fit_training
    sys.modules.pop("fit_training", None)


def test_the_fit_finds_planted_factors(fitter) -> None:
    rng = np.random.default_rng(0)
    truth = replace(
        utilisation.fitted(), base=0.4, half_size=1e8, exponent=1.0, devices=0.93, run=0.8,
        mixture=0.8, generations={"Hopper": 0.9, "Ampere": 1.1},
    )  # fmt: skip
    runs = []
    for i in range(120):
        r = fitter.Run(
            model=str(i), family=str(i % 40), device=H100 if i % 2 else find("a100"),
            active=10 ** rng.uniform(8, 11.5), tokens=1e12, devices=10 ** rng.uniform(0, 4),
            hours=None, mfu=0.0, mixture=i % 3 == 0, steady=i % 5 == 0, precision="bf16",
            inside=True,
        )  # fmt: skip
        runs.append(replace(r, mfu=fitter.centre(truth, r)[0] * np.exp(rng.normal(0, 0.05))))
    found = fitter.fit(runs)
    assert found.devices == pytest.approx(0.93, abs=0.02)
    assert found.run == pytest.approx(0.8, abs=0.05)
    assert found.mixture == pytest.approx(0.8, abs=0.05)
    assert found.generations["Ampere"] / found.generations["Hopper"] == pytest.approx(1.22, abs=0.1)
    errors = [abs(fitter.centre(found, r)[0] / fitter.centre(truth, r)[0] - 1) for r in runs]
    assert np.mean(errors) < 0.06


def test_published_runs_are_read_and_plausible(fitter) -> None:
    runs = fitter.outside_runs()
    assert len(runs) > 50
    assert all(0.03 < r.mfu < 0.75 and r.devices >= 1 for r in runs)
    inside = {"llama1", "llama2", "llama3", "llama3.1", "pythia", "patterson"}
    assert not inside & {r.family for r in runs}


# ---- the docs

DOCS = (ROOT / "docs" / "estimate_training.md").read_text(encoding="utf-8")


def test_python_of_the_docs_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for block in re.findall(r"```python\n(.*?)```", DOCS, re.S):
        exec(compile(block, "estimate_training.md", "exec"), {})
    assert "Figure" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("utilisation", "| base (share of the 16-bit peak) | {:.3f} |"),
        ("exponent of size", "| exponent of size | {:.2f} |"),
        ("ten times the devices", "| ten times the devices | {:.3f} |"),
        ("mixture of experts", "| mixture of experts | {:.3f} |"),
        ("whole run", "| whole run, against steady steps | {:.3f} |"),
        ("fp8", "| fp8, against bf16 | {:.2f} |"),
        ("exponent of power", "MFU^{:.2f}"),
        ("host", "host = {:.2f} x sustained"),
    ],
)
def test_constants_of_the_docs_are_those_shipped(name: str, told: str) -> None:
    assert told.format(shipped()[name].value) in DOCS


def test_errors_of_the_docs_are_those_of_the_results() -> None:
    results = (ROOT / "benchmarks/results/estimate_training.md").read_text(encoding="utf-8")
    for line in re.findall(r"^\| (?:the row's|and Llama|every family|all \d).*", DOCS, re.M):
        figures = re.findall(r"\d+\.?\d*(?= %)", line)
        assert len(figures) == 4 or "fixed" in line
        point, median, fixed, covered = figures[:4] if "fixed" not in line else figures[-4:]
        assert f"| {point} | {median} | {fixed} | {covered} |" in results
