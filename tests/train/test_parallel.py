"""Ranks that train together, as real processes over gloo: two of them, and one to compare with.

Each group does several things in turn, since starting Python and torch is most of the time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
from rank_worker import done, model
from torch import nn

from joulesmith.energy.reading import Reading
from joulesmith.errors import JoulesmithError
from joulesmith.ranks import shared
from joulesmith.train import parallel
from joulesmith.train.distil import Distil
from joulesmith.train.group import ended, ranks
from joulesmith.train.parallel import ParallelSettings, Spread
from joulesmith.train.recover_settings import DistilSettings
from joulesmith.train.scaling import Probe, Scaling, covered
from joulesmith.train.settings import TrainSettings
from small_modules import language

WORKER = Path(__file__).with_name("rank_worker.py")
WAYS: dict[str, dict[str, Any]] = {
    "replicate": {"data": "replicate", "probe": 0},
    "shard": {"data": "shard", "probe": 0},
    "tensor": {"tensor": 2, "probe": 0},
}
NEAR = 2e-5
"""Losses of about 3 in float32, summed in another order, over six steps."""


class Group:
    """Ranks at work on tasks, started as torchrun does."""

    def __init__(self, tasks: list[dict[str, Any]], world: int) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.processes = []
        for rank in range(world):
            told = {
                "RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1,
                "CUDA_VISIBLE_DEVICES": "",
            }  # fmt: skip
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, str(WORKER), json.dumps(tasks)],
                    env={**os.environ, **{k: str(v) for k, v in told.items()}},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def end(self, within: float = 240, alone: bool = False) -> list[tuple[list[Any], str, int]]:
        """What each found, what it said, and its exit code. alone: when the first has ended, the
        others are killed."""
        found = []
        for p in self.processes:
            try:
                out, said = p.communicate(timeout=within)
            finally:
                for other in self.processes if p.returncode is None or alone else ():
                    other.kill()
            lines = [json.loads(x)[1] for x in out.splitlines() if x.startswith("[")]
            found.append((lines, said, p.returncode))
        return found


PLAIN: dict[str, Any] = {}
ZEROS: dict[str, Any] = {"zeros": True, "settings": {"steps": 2}}
MUON: dict[str, Any] = {"settings": {"optimizer": "muon", "steps": 3}}


@pytest.fixture(scope="module")
def one() -> list[Any]:
    """What one rank finds: plain training, with zeros, with Muon, and of shared work."""
    return [json.loads(json.dumps(done(task))) for task in (PLAIN, ZEROS, MUON, {"do": "shared"})]


class Cut(NamedTuple):
    """A run of two ranks, one of them killed, that one rank took further."""

    folder: Path
    survivor: tuple[list[Any], str, int]
    killed: int
    kept: list[str]


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Cut:
    folder = tmp_path_factory.mktemp("checkpoints")
    task = {"folder": str(folder), "parallel": WAYS["tensor"]}
    survivor, dead = Group([{**task, "ends": 1, "at": 3, "how": "kill"}], 2).end()
    kept = [p.name for p in folder.iterdir()]
    with pytest.raises(JoulesmithError, match="that is enough"):
        # at the second step of its own: the first call tells what was done before
        done({"folder": str(folder), "ends": 0, "at": 3, "how": "raise"})
    kept += [p.name for p in folder.iterdir()]
    for way in ("shard", "replicate"):
        shutil.copytree(folder, folder.with_name(way))
    return Cut(folder, survivor, dead[2], kept)


@pytest.fixture(scope="module")
def both(cut: Cut) -> list[list[Any]]:
    """What each of two ranks finds."""
    tasks: list[dict[str, Any]] = [{"parallel": p} for p in WAYS.values()]
    tasks += [{"parallel": WAYS["shard"], "settings": {"micro": 3}}]
    tasks += [{**ZEROS, "parallel": p} for p in WAYS.values()]
    tasks += [{**MUON, "parallel": p} for p in WAYS.values()]
    tasks += [{"parallel": {"data": d, "probe": 2}} for d in ("replicate", "shard")]
    tasks += [{"settings": {"optimizer": "adafactor"}, "parallel": WAYS["tensor"]}]
    tasks += [{"settings": {"batch": 7}}, {"parallel": {"tensor": 3}}, {"do": "shared"}]
    for way in ("shard", "replicate"):
        tasks += [{"folder": str(cut.folder.with_name(way)), "parallel": WAYS[way]}]
    ends = {"ends": 1, "at": 2, "how": "raise", "parallel": WAYS["replicate"]}
    every = Group([*tasks, ends], 2).end()
    for lines, said, code in every:
        assert len(lines) == len(tasks) and code == 2, said
    # a rank that fails says why, the others nothing
    assert [said for _, said, _ in every] == ["", "joulesmith: that is enough\n"]
    return [lines for lines, _, _ in every]


def near(a: dict[str, Any], b: dict[str, Any], most: float = NEAR) -> None:
    assert len(a["losses"]) == len(b["losses"])
    for key in ("losses", "curve"):
        assert a[key] == pytest.approx(b[key], abs=most)


def test_ranks_train_what_one_trains(one: list[Any], both: list[list[Any]]) -> None:
    """Two passes a rank and step add up; with three windows a pass, unequal ones."""
    (first, second), plain = both, one[0]
    for found, other in zip(first, second, strict=True):
        for key in ("losses", "sums", "curve", "joules", "error"):
            assert found.get(key) == other.get(key), "ranks end with the same"
    for found in (*first[:4], *first[10:12]):
        near(found, plain)
        assert found["sums"] == pytest.approx(plain["sums"], abs=1e-3)
        assert found["whole"] == plain["whole"] and found["pedigree"] == plain["pedigree"]
        assert found["joules"] > 0
    assert first[0]["bytes"] == plain["bytes"]
    assert first[1]["bytes"] == pytest.approx(plain["bytes"] / 2, rel=0.01)


def test_zeros_and_muon_over_ranks(one: list[Any], both: list[list[Any]]) -> None:
    for found in both[0][4:7]:
        near(found, one[1])
        assert found["zeros"] == one[1]["zeros"] > 0
    for found in both[0][7:10]:
        near(found, one[2], 1e-3)  # it rounds to bfloat16


def test_ranks_against_one(both: list[list[Any]]) -> None:
    for found in both[0][10:12]:
        plan, speed, ratio, share, note = found["scaling"]
        assert "over 2" in plan or "2 times" in plan
        assert speed > 0 and ratio > 0 and 0 < share <= 1 and not note


def test_what_is_refused(both: list[list[Any]]) -> None:
    adafactor, batch, tensor = (f["error"] for f in both[0][12:15])
    assert "adafactor needs whole matrices" in adafactor
    assert batch == "a batch of 7 windows on 2 ranks: give a multiple"
    assert "2 ranks cannot be split by tensor 3" in tensor


def test_shared_work(one: list[Any], both: list[list[Any]]) -> None:
    first, second = (lines[15] for lines in both)
    for found in (first, second):
        assert found["seventh"] == one[3]["seventh"]
        assert found["loss"] == pytest.approx(one[3]["loss"], abs=1e-6)
    assert first["failed"].startswith("ZeroDivisionError")
    assert second["failed"].startswith("JoulesmithError: rank 0: ")


def test_a_killed_rank_is_one_line(cut: Cut) -> None:
    lines, said, code = cut.survivor
    assert cut.killed == -signal.SIGKILL and code == 2 and not lines
    line = said.strip()
    assert "\n" not in line, line
    assert line.startswith("joulesmith: rank 1 (process ")
    assert f"the same command goes on from {cut.folder / 'step-000000002'}" in line


def test_a_clock_that_is_set_ends_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil counts births from the time that the machine started, which moves with the clock."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = psutil.Process(child.pid)
        assert not ended(process)
        if hasattr(psutil, "_pslinux"):
            later, born = psutil.boot_time() + 3, psutil.Process(child.pid).create_time()
            monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: later)
            moved = psutil.Process(child.pid).create_time() != born
            assert moved or psutil.version_info < (7, 1), "an older one reads the clock once"
        assert not ended(process)
        child.kill()
        while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert ended(process), "not collected yet"
    assert ended(process)


def test_a_rank_that_is_told_to_end_amid_its_last_words_says_them() -> None:
    """torchrun does so as soon as another has ended."""
    _, fails = Group([{"do": "fail", "ends": 0, "told": True}], 2).end(within=90)
    assert fails == ([], "joulesmith: that is enough\n", 2)


def test_a_machine_without_the_folder_says_so(tmp_path: Path) -> None:
    """Each rank has a folder of its own, the first one's with a checkpoint."""
    done({"folder": str(tmp_path / "0"), "settings": {"steps": 2}})
    task = {"folder": str(tmp_path), "own": True, "ends": 9, "parallel": WAYS["replicate"]}
    task |= {"settings": {"steps": 2}}
    first, second = Group([task], 2).end(within=90)
    assert (first[1], first[2], second[2]) == ("", 2, 2)
    assert "rank 1 does not see" in second[1] and "all machines see" in second[1]
    assert (tmp_path / "0" / "step-000000002").is_dir()


def test_who_fails_and_lingers_is_not_waited_for() -> None:
    """As where processes of other machines cannot be seen: the first does work, the other waits."""
    waits, fails = Group([{"do": "meet", "ends": 0}], 2).end(within=90, alone=True)
    assert waits == ([], "", 2)
    assert fails == ([], "joulesmith: that is enough\n", -9), "killed here, when the first was gone"


def test_who_gives_no_sign_of_life_is_not_waited_for() -> None:
    task = {"do": "meet", "ends": 0, "silent": True}
    waits, stopped = Group([task], 2).end(within=90, alone=True)
    assert waits[2] == 2 and waits[1].startswith(
        "joulesmith: rank 1 of 2 gives no sign of life: all ranks stop; no checkpoint was written"
    )
    assert stopped == ([{"heard": True}], "", -9), "while it gave one it was waited for"


def test_a_rank_that_fails_amid_a_sum_leaves() -> None:
    """Else it waits for the others, who wait for it, until collectives time out after 120 s."""
    waits, fails = Group([{"do": "fail", "ends": 0}], 2).end(within=90)
    assert fails == ([], "joulesmith: that is enough\n", 2)
    assert waits == ([], "", 2)


def test_another_number_of_ranks_goes_on(one: list[Any], cut: Cut, both: list[list[Any]]) -> None:
    """Two that split matrices, then one, then shards of two, or replicas."""
    assert cut.kept == ["step-000000002", "step-000000003"]
    for lines in both:
        for found in lines[16:18]:
            near(found, one[0])
    for way in ("shard", "replicate"):
        assert [p.name for p in cut.folder.with_name(way).iterdir()] == ["step-000000006"]


def test_what_tensor_parallel_cannot_split() -> None:
    places = parallel._split_places(model(), 2)
    assert len(places) == 14
    with pytest.raises(JoulesmithError, match="num_key_value_heads 2 does not divide by tensor 4"):
        parallel.check_split(model(), 4)
    with pytest.raises(JoulesmithError, match="do not divide by tensor 5"):
        parallel.check_split(model(), 5)
    with pytest.raises(JoulesmithError, match="Sequential is not built like Llama"):
        parallel.check_split(nn.Sequential(nn.Linear(4, 4)), 2)
    normed: Any = model()
    normed.model.layers[0].self_attn.q_norm = nn.LayerNorm(8)
    with pytest.raises(JoulesmithError, match=r"self_attn\.q_norm would see a part of the heads"):
        parallel.check_split(normed, 2)


def test_a_hook_that_looks_at_whole_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hook:
        pass

    parallel.moved_hook(Hook(), {})
    parallel.check_hook(Hook(), ParallelSettings(data="shard"))  # alone
    monkeypatch.setattr(parallel, "world", lambda: 2)
    parallel.check_hook(Hook(), ParallelSettings())
    for parts in (ParallelSettings(data="shard"), ParallelSettings(tensor=2)):
        with pytest.raises(JoulesmithError, match="Hook looks at whole matrices"):
            parallel.check_hook(Hook(), parts)


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with ranks("cpu") as me:
        assert (me.rank, me.world, me.first, me.device.type) == (0, 1, True, "cpu")
    module = model()
    with parallel.spread(module, ParallelSettings()) as found:
        assert found.module is module and not found.moved
    assert shared([3, 4], lambda part: [2 * x for x in part]) == [6, 8] and shared([], len) == []  # type: ignore[arg-type, return-value]
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(JoulesmithError, match="WORLD_SIZE=two is no number"), ranks("cpu"):
        pass


def test_a_model_too_large_for_one_rank_is_a_note() -> None:
    class Meter:
        def window(self, name: str) -> Any:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    module = language("llama")
    windows = np.zeros((8, 12), np.int32)
    objective = Distil(DistilSettings(hard=1, soft=0))
    probe = Probe(windows, objective, TrainSettings(steps=9, batch=4), 3, Meter())
    probe.on_one(module)
    assert probe.one is None and probe.note == "the model does not fit on one rank"


def test_one_rank_against_itself_is_even() -> None:
    """Joules of a step on both sides, whatever the number of steps that are looked at."""

    class Meter:
        def window(self, name: str) -> Any:
            return Window()

    class Window:
        reading = Reading(6.0, 1.0)

        def __enter__(self) -> Window:
            return self

        def __exit__(self, *exc: object) -> None: ...

    module = language("llama")
    windows = np.random.default_rng(0).integers(0, 50, (8, 12)).astype(np.int32)
    settings = TrainSettings(steps=9, batch=4, micro=4)
    probe = Probe(windows, Distil(DistilSettings(hard=1, soft=0)), settings, 3, Meter())
    before = [p.detach().clone() for p in module.parameters()]
    probe.on_one(module)
    found = probe.on_all(Spread(module, module))
    assert found.joules == found.joules_alone == 2.0 and found.joules_ratio == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_figures_of_scaling() -> None:
    assert covered([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0), (5.2, 5.4)]) == 4.0
    assert covered([]) == 0.0
    found = Scaling(2, "", seconds_alone=3.0, seconds=2.0, joules_alone=None, joules=5.0)
    assert found.speed_up == 1.5 and found.joules_ratio is None
