"""The main job from end to end on a tiny model, run as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from runner import FAST, Run

from joulesmith.compress.recipe import read_recipe
from joulesmith.gguf_file import read_gguf
from joulesmith.report.files import load_result


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def finished(
    tiny: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory, request: object
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One undisturbed run."""
    import os
    import sys

    out = tmp_path_factory.mktemp("runs") / "run"
    done = subprocess.run(
        [sys.executable, "-m", "joulesmith", "optimize", str(tiny), "--keep", "0.9",
         "--out", str(out), *FAST],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        check=False,
    )  # fmt: skip
    return out, done


def test_a_run_ends_with_a_model_a_report_and_a_recipe(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tiny: Path
) -> None:
    out, done = finished
    assert done.returncode == 0, done.stderr
    assert f"Report: {out / 'report.html'}" in done.stdout
    assert "left" in done.stderr, "no estimate of the time left was shown"
    result = load_result(out)
    plan = result.run("plan")
    assert result.status == "passed" and plan is not None and plan.quality is not None
    assert plan.quality.kept_low >= 0.9
    assert result.command.startswith("joulesmith optimize")
    assert {r.name for r in result.runs} >= {"BF16 GGUF", "Q8_0", "joulesmith plan"}
    assert result.headline_baseline == "BF16 GGUF"
    assert all(r.pairs >= 3 and r.spread[0] <= r.ratio <= r.spread[1] for r in result.ratios)
    assert sorted(p.name for p in out.iterdir() if p.name != ".lock") == [
        "recipe.yaml",
        "report.html",
        "result.json",
        "run.json",
        "tiny-joulesmith.gguf",
    ]
    stored = {t.name: t.type for t in read_gguf(out / "tiny-joulesmith.gguf").tensors}
    chosen = {t.tensor: t.type for t in result.tensors}
    assert chosen.items() <= stored.items(), "the file is not what the report says"


def test_what_is_exported_is_what_was_judged(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tiny: Path
) -> None:
    """Quality computed anew with transformers on the dequantized export agrees."""
    import torch

    from joulesmith import text
    from joulesmith.job.inputs import LENGTH
    from joulesmith.models import load

    out, _ = finished
    result = load_result(out)
    reference, plan = load(str(tiny)), load(out / "tiny-joulesmith.gguf")
    counts = {"search": 8, "final": 32}
    final = text.windows(reference, text.english(), LENGTH, counts, 0)["final"].tokens
    tokens = torch.from_numpy(final).long()

    def nll(module: torch.nn.Module) -> float:
        with torch.no_grad():
            logits = module(tokens).logits[:, :-1]
        return float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        )

    kept = np.exp(nll(reference.module) - nll(plan.module))
    run = result.run("plan")
    assert run is not None and run.quality is not None
    assert run.quality.tokens == final.size - len(final)
    # The engine rounds activations to 8 bits, which the float copy does not.
    assert run.quality.kept == pytest.approx(kept, abs=5e-3)


def test_again_says_that_it_is_done(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tiny: Path, joulesmith: Run
) -> None:
    out, _ = finished
    before = files(out)
    again = joulesmith("optimize", tiny, "--keep", "0.9", "--out", out, *FAST)
    assert again.returncode == 0
    assert "done before" in again.stdout
    assert files(out) == before
    other = joulesmith("optimize", tiny, "--keep", "0.8", "--out", out, *FAST)
    assert other.returncode == 2 and "other arguments (keep differ" in other.stderr
    assert files(out) == before


def test_the_recipe_makes_the_same_bytes(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tiny: Path, tmp_path: Path
) -> None:
    from joulesmith import text
    from joulesmith.job.inputs import LENGTH
    from joulesmith.job.judge import write_choice
    from joulesmith.models import load

    out, _ = finished
    recipe = read_recipe(out / "recipe.yaml")
    model = load(str(tiny))
    windows = text.self_samples(model, recipe.calibration["windows"][0], LENGTH, 0).tokens
    (record,) = recipe.apply(model, windows)
    exported = read_gguf(out / "tiny-joulesmith.gguf")
    types = {name: kind for name, (kind, _) in record.packed.items()}
    write_choice(model, lambda name, _: record.packed[name][1], types, tmp_path / "again.gguf")
    again = read_gguf(tmp_path / "again.gguf")
    assert [(t.name, t.type) for t in again.tensors] == [(t.name, t.type) for t in exported.tensors]
    for t in again.tensors:
        assert np.array_equal(again.data(t.name), exported.data(t.name)), t.name
    # `joulesmith quantize --recipe` makes the same file.
    from joulesmith.job.quantize import quantize
    from joulesmith.progress import Progress

    with open(os.devnull, "w") as nowhere:
        quantize(
            str(tiny), None, tmp_path / "q.gguf", recipe=out / "recipe.yaml", form="gguf",
            progress=Progress({}, stream=nowhere),
        )  # fmt: skip
    made = read_gguf(tmp_path / "q.gguf")
    assert {t.name: t.type for t in made.tensors} == {t.name: t.type for t in exported.tensors}
    for t in exported.tensors:
        assert np.array_equal(made.data(t.name), exported.data(t.name)), t.name


def test_a_run_killed_in_each_phase_goes_on(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
    tiny: Path,
    tmp_path: Path,
    joulesmith: Run,
) -> None:
    """One run: each kill is of a process that goes on from the last."""
    words = ["optimize", tiny, "--keep", "0.9", "--out", tmp_path / "run", *FAST]
    for moment in ("reference:", "joule table:", "round:", "search:", "judge:"):
        killed = joulesmith(*words, until=moment)
        assert killed.returncode == -signal.SIGKILL, moment
        assert not (tmp_path / "run" / "result.json").exists()
        assert not list((tmp_path / "run").glob("*.gguf"))
    again = joulesmith(*words)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == (
        finished[0] / "recipe.yaml"
    ).read_bytes()
    made = [read_gguf(f / "tiny-joulesmith.gguf") for f in (tmp_path / "run", finished[0])]
    assert [(t.name, t.type) for t in made[0].tensors] == [
        (t.name, t.type) for t in made[1].tensors
    ]
    for t in made[0].tensors:
        assert np.array_equal(made[0].data(t.name), made[1].data(t.name)), t.name


def test_an_interrupted_run_says_how_to_go_on(tiny: Path, tmp_path: Path, joulesmith: Run) -> None:
    words = ["optimize", tiny, "--keep", "0.9", "--out", tmp_path / "run", *FAST]
    stopped = joulesmith(*words, until="reference:", send=signal.SIGINT)
    assert stopped.returncode == 130
    assert "Traceback" not in stopped.stderr
    assert "goes on where it stopped" in stopped.stderr.splitlines()[-1]


def test_a_floor_that_nothing_clears_is_answered_with_none(
    tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Final judgements that all fail: exit code 3, the nearest miss told, nothing exported."""
    import dataclasses

    from joulesmith import FloorNotMetError, optimize
    from joulesmith.job import run

    real, judged = run.score_file, []

    def worse(*given: object) -> object:
        judged.append(given)
        quality = real(*given)  # type: ignore[arg-type]
        return dataclasses.replace(quality, kept=0.6, kept_low=0.5 + 0.01 * len(judged))

    monkeypatch.setattr(run, "score_file", worse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    out = tmp_path / "run"
    with pytest.raises(FloorNotMetError, match="No plan keeps") as error:
        optimize(
            str(tiny), keep=0.9, out=out, workload=(8, 8), time_budget=60.0, pairs=3, torch_pairs=0
        )
    assert error.value.exit_code == 3
    assert 1 <= len(judged) <= 4
    result = load_result(out)
    plan = result.run("plan")
    assert result.status == "none" and plan is not None and plan.quality is not None
    assert plan.quality.kept_low == pytest.approx(0.5 + 0.01 * len(judged)), "not the nearest"
    assert plan.passes is False and plan.file is None
    assert not list(out.glob("*.gguf"))


def test_a_given_gguf_is_its_own_baseline(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, joulesmith: Run
) -> None:
    given = tmp_path / "given.gguf"
    shutil.copy(finished[0] / "tiny-joulesmith.gguf", given)
    before = given.read_bytes()
    done = joulesmith("optimize", given, "--keep", "0.9", "--out", tmp_path / "run", *FAST)
    assert done.returncode == 0, done.stderr
    result = load_result(tmp_path / "run")
    assert result.headline_baseline == "given.gguf"
    assert given.read_bytes() == before


def test_a_full_disk_loses_nothing(tiny: Path, tmp_path: Path, joulesmith: Run) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small disk needs privileges")
    try:
        done = joulesmith("optimize", tiny, "--keep", "0.9", "--out", disk / "run", *FAST)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert "space" in done.stderr.splitlines()[-1]
        assert not (disk / "run" / "result.json").exists()
        assert not list((disk / "run").glob("*.gguf"))
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_result_is_valid_json_with_pedigrees(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    plain = json.loads((finished[0] / "result.json").read_text())
    for run in plain["runs"]:
        for phase in ("prefill", "decode", "workload"):
            energy = run[phase]
            assert energy["joules"] is None or energy["pedigree"] in ("measured", "modelled")
            if energy["joules"] is not None:
                assert energy["low"] <= energy["joules"] <= energy["high"]
