"""`joulesmith estimate`: tables, JSON, pages, one line for bad input; no torch, under a second."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from here import here

SERVE = ["estimate", "serve", "--params", "8B", "--device", "h100", "--weights", "bf16"]
COMPARE = ["estimate", "compare", "--params", "70B", "--device", "h100", "--weights", "bf16"]
TRAIN = ["estimate", "train", "--params", "8B", "--tokens", "1T", "--device", "h100"]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words that are looked for are not broken at the end of a line."""
    monkeypatch.setenv("COLUMNS", "220")


def said(*words: object) -> str:
    done = here(*words)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def told(*words: object) -> dict:  # type: ignore[type-arg]
    found = json.loads(said(*words, "--json"))
    assert isinstance(found, dict) and found["pedigree"] == "modelled"
    return found


@pytest.mark.parametrize("words", [SERVE, [*COMPARE, "--device", "b200"], TRAIN])
def test_it_answers_without_torch(words: list[str]) -> None:
    code = (
        "import sys, time\n"
        "from joulesmith.cli import app\n"
        f"try: app({words!r})\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'transformers', 'scipy', 'gguf', 'altair', 'jinja2'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert time.process_time() < 1.5, time.process_time()"  # 0.6 s where nothing else runs
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_eighty_columns_hold_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = said(*SERVE, "--latency", "50ms")
    assert "<- best" in text and "…" not in text
    both = said(*COMPARE, "--device", "b200", "--weights", "fp8")
    assert "tokens/s" in both and "…" not in both
    assert "…" not in said(*TRAIN, "--devices", "64")


def test_help_names_the_commands() -> None:
    assert "estimate" in said("--help")
    both = said("estimate", "--help")
    for command in ("serve", "compare", "train"):
        assert command in both
        assert "--device" in said("estimate", command, "--help")


def test_serving_is_told_by_batch() -> None:
    text = said(*SERVE, "--latency", "50ms", "--requests", "1e6", "--grid", "DE", "--pue", "1.2")
    for word in (
        "per output token", "J per request", "J per token and parameter", "with host, PUE 1.2",
        "energy goes into", "tokens per second", "limited by", "sequences that fit",
        "1,000,000 a day", "kgCO2e a day", "EUR a day", "<- best", "too slow",
    ):  # fmt: skip
        assert word in text, word
    fixed = said(*SERVE, "--batch", "8")
    assert "<- best" not in fixed and "batch 8" in fixed
    found = told(*SERVE, "--batch", "8", "--prompt", "100", "--output", "50")
    assert found["traffic"]["batch"] == 8 and found["batch_is"] == "given"
    each = found["joules_per_output_token"]["value"]
    assert found["joules_per_request"]["value"] == pytest.approx(50 * each)


def test_batteries_and_other_devices(tmp_path: Path) -> None:
    text = said(
        "estimate", "serve", "--params", "3B", "--device", "jetson orin nano", "--weights", "q4_k",
        "--batch", "1", "--battery", "50",
    )  # fmt: skip
    assert "one prompt read alone" in " ".join(text.split())
    assert "a battery charge" in text and "50 Wh: " in text
    slow = said(
        "estimate",
        "serve",
        "--params",
        "8B",
        "--device",
        "rpi 5",
        "--weights",
        "q4_k",
        "--batch",
        "1",
    )
    assert re.search(r"tokens per second +[\d.]+ \(0\.\d+ to", slow), slow
    assert re.search(r"requests\s+in [\d]+ h [\d]+ min", text), text
    own = tmp_path / "own.csv"
    own.write_text("name,like,tdp_w\nours,h100,350\n")
    words = [*SERVE, "--batch", "64", "--devices-file", own]
    words[5] = "ours"
    assert told(*words)["setup"]["device"] == "ours"


def test_prompts_on_another_kind() -> None:
    words = [*SERVE, "--batch", "8", "--prompt", "2000", "--prefill-device", "b200"]
    text = said(*words)
    assert "prompts on" in text and "B200" in text and "of cache" not in text.split("kept")[0]
    mixed = told(*words)["mix"]
    parts = sum(mixed[k]["value"] for k in ("prompt_joules", "transfer_joules", "output_joules"))
    assert mixed["joules_per_request"]["value"] == pytest.approx(parts)
    assert mixed["prefill"]["engine"] == mixed["decode"]["engine"] == "vLLM 0.11"


def test_side_by_side() -> None:
    words = [*COMPARE, "--device", "b200", "--device", "mi300x", "--device", "epyc 9654"]
    text = said(*words, "--latency", "50ms")
    assert "2 x H100" in text and "1 x B200" in text
    assert "times the joules per token of H100" in text
    assert "within the uncertainty" in text and "EPYC 9654: no:" in text
    rows = told(*words)["rows"]
    assert len(rows) == 4 and rows[3]["answer"] is None and "memory" in rows[3]["why_not"]
    far = said("estimate", "compare", "--params", "1T", "--device", "rpi 5", "--device", "h100")
    assert re.search(r"H100 SXM 80GB: 0\.00\d+ times .* \(0\.00\d+\s+to", far), far
    small = ["estimate", "compare", "--params", "8B", "--device", "h100", "--device", "l4"]
    hosts = " ".join(said(*small, "--batch", "16", "--pue", "1.5").split())
    assert re.search(r"with host and PUE 1.5: [23]\.\d+ times", hosts), hosts
    assert "with host" not in said(*small, "--batch", "16", "--host-watts", "0")
    three = said(*COMPARE, "--weights", "fp8", "--weights", "4.5")
    assert "fp8" in three and "4.5 bits" in three and "share most of the error" in three
    assert said(*COMPARE, "--device", "b200", "--requests", "1e6").count("kgCO2e a day") == 2


def test_training() -> None:
    text = said(*TRAIN, "--devices", "64", "--grid", "FR")
    for word in ("device-hours", "utilisation", "energy", "goes into", "kgCO2e", "speed-up"):
        assert word in text, word
    found = told(*TRAIN, "--devices", "64")
    assert found["setup"]["devices"] == 64 and found["kwh"]["low"] < found["kwh"]["high"]
    split = found["split_joules"]
    assert sum(split.values()) == pytest.approx(found["joules"]["value"], rel=1e-6)
    scaling = found["scaling"]
    own = next(x for x in scaling if x["devices"] == 64)
    assert own["hours"] == pytest.approx(found["hours"]["value"])
    assert own["kwh"] == pytest.approx(found["kwh"]["value"])
    assert [x["hours"] for x in scaling] == sorted((x["hours"] for x in scaling), reverse=True)
    alone = told(*TRAIN, "--devices", "128")
    twice = next(x for x in scaling if x["devices"] == 128)
    assert twice["hours"] == pytest.approx(alone["hours"]["value"])
    assert told(*TRAIN, "--devices", "64", "--utilisation", "0.4")["scaling"] == []
    assert "speed-up" not in said(*TRAIN, "--devices", "64", "--utilisation", "0.4")
    planned = told(*TRAIN, "--plan", "data=8,tensor=4,pipeline=2,sharding=optimizer")
    assert planned["setup"]["devices"] == 64 and planned["setup"]["plan"]["tensor"] == 4
    small = ["estimate", "train", "--params", "1B", "--tokens", "1B", "--device", "a100"]
    lora = told(*small, "--devices", "1", "--mode", "lora")
    full = told(*small, "--devices", "1")
    assert lora["flops"] < full["flops"]
    distilled = told(*small, "--devices", "4", "--mode", "distil", "--teacher", "3B")
    assert distilled["flops"] > full["flops"]


def test_every_constant_is_explained() -> None:
    for words in (SERVE, [*COMPARE, "--device", "b200"], [*TRAIN, "--devices", "64"]):
        text = said(*words, "--explain")
        for basis in ("published", "assumed", "fitted"):
            assert basis in text
        assert "assumed: layers = " in text


def test_pages(tmp_path: Path) -> None:
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    for i, words in enumerate((SERVE, [*COMPARE, "--device", "b200"], TRAIN)):
        page = tmp_path / f"{i}.html"
        assert f"Report: {page}" in said(*words, "--report", page)
        assert page.read_text().startswith("<!doctype html>")
        assert told(*words, "--report", page)


BAD = {
    "no device": ["serve", "--params", "8B"],
    "unknown device": ["serve", "--params", "8B", "--device", "h1000"],
    "no model": ["serve", "--device", "h100"],
    "both": ["serve", "smollm2", "--params", "8B", "--device", "h100"],
    "params": ["serve", "--params", "lots", "--device", "h100"],
    "no such model": ["serve", "absent.gguf", "--device", "h100"],
    "too big": ["serve", "--params", "70B", "--device", "l4"],
    "batch too big": ["serve", "--params", "8B", "--device", "l4", "--batch", "100000"],
    "batch": ["serve", "--params", "8B", "--device", "h100", "--batch", "0"],
    "prompt": ["serve", "--params", "8B", "--device", "h100", "--prompt", "nan"],
    "latency": ["serve", "--params", "8B", "--device", "h100", "--latency", "soon"],
    "latency of what": ["serve", "--params", "8B", "--device", "h100", "--latency", "50"],
    "too slow": ["serve", "--params", "8B", "--device", "h100", "--latency", "1ms"],
    "weights": ["serve", "--params", "8B", "--device", "h100", "--weights", "q9"],
    "engine": ["serve", "--params", "8B", "--device", "h100", "--engine", "steam"],
    "no tdp": ["serve", "--params", "8B", "--device", "tpu v5e"],
    "pue": ["serve", "--params", "8B", "--device", "h100", "--pue", "0.5"],
    "grid": ["serve", "--params", "8B", "--device", "h100", "--grid", "Atlantis"],
    "battery": ["serve", "--params", "8B", "--device", "h100", "--battery", "0"],
    "requests": ["serve", "--params", "8B", "--device", "h100", "--requests", "0"],
    "cache": ["serve", "--params", "8B", "--device", "h100", "--cache-bits", "3"],
    "link": ["serve", "--params", "8B", "--device", "h100", "--prefill-device", "h100", "--link", "0"],
    "link alone": ["serve", "--params", "8B", "--device", "h100", "--link", "10"],
    "file": ["serve", "--params", "8B", "--device", "h100", "--devices-file", "absent.csv"],
    "report": ["serve", "--params", "8B", "--device", "h100", "--report", "absent/x.html"],
    "nothing": ["compare", "--params", "8B"],
    "none fits": ["compare", "--params", "70B", "--device", "l4", "--devices", "1"],
    "no tokens": ["train", "--params", "8B", "--device", "h100"],
    "tokens": ["train", "--params", "8B", "--device", "h100", "--tokens", "all"],
    "plan": ["train", "--params", "8B", "--device", "h100", "--tokens", "1T", "--plan", "luck=7"],
    "plan ranks": ["train", "--params", "8B", "--device", "h100", "--tokens", "1T", "--plan", "data=0"],
    "mode": ["train", "--params", "8B", "--device", "h100", "--tokens", "1T", "--mode", "magic"],
    "distil": ["train", "--params", "8B", "--device", "h100", "--tokens", "1T", "--mode", "distil"],
    "teacher": ["train", "--params", "8B", "--device", "h100", "--tokens", "1T", "--mode", "distil",
                "--teacher", "absent"],
    "teacher of none": ["train", "--params", "8B", "--device", "h100", "--tokens", "1T", "--teacher", "70B"],
    "precision": ["train", "--params", "8B", "--device", "h100", "--tokens", "1T", "--precision", "q9"],
    "train too big": ["train", "--params", "70B", "--device", "l4", "--tokens", "1T", "--devices", "1"],
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = here("estimate", *BAD[name])
    assert done.returncode == 2, (name, done.stdout, done.stderr)
    assert done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("joulesmith: ") and "Traceback" not in done.stderr


def test_the_nearest_names_are_told() -> None:
    done = here("estimate", "serve", "--params", "8B", "--device", "h1000")
    assert "did you mean H100" in done.stderr


def test_hours_of_a_day_are_no_grid_here(tmp_path: Path) -> None:
    hours = tmp_path / "hours.csv"
    hours.write_text("time,gco2e_per_kwh\n2024-01-01T00:00:00Z,100\n2024-01-01T01:00:00Z,200\n")
    done = here(*SERVE, "--grid", hours)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
