"""Whatever becomes of the worker, the caller gets one line and no zombie is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from joulesmith.engines.llamacpp import LlamaCpp
from joulesmith.errors import EngineError


def children() -> list[psutil.Process]:
    found = psutil.Process().children()
    return [p for p in found if "llama_worker" in " ".join(_command(p)) or _zombie(p)]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@pytest.fixture(autouse=True)
def no_process_left() -> object:
    before = {p.pid for p in children()}
    yield
    assert {p.pid for p in children()} <= before


def refused(engine: LlamaCpp, path: Path) -> str:
    with pytest.raises(EngineError) as e:
        engine.load(path, threads=1)
    message = str(e.value)
    assert "\n" not in message and str(path) in message
    return message


def test_absent_file(engine: LlamaCpp, tmp_path: Path) -> None:
    assert "no such model file" in refused(engine, tmp_path / "none.gguf")
    assert "no such model file" in refused(engine, tmp_path)


@pytest.mark.parametrize("data", [b"", b"GGUF", b"garbage" * 1000, b"GGUF" + b"\xff" * 5000])
def test_garbage(engine: LlamaCpp, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad.gguf").write_bytes(data)
    refused(engine, tmp_path / "bad.gguf")


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_truncated_file(engine: LlamaCpp, model_file: Path, tmp_path: Path, share: float) -> None:
    data = model_file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: int(len(data) * share)])
    refused(engine, tmp_path / "cut.gguf")


def test_killed_in_the_middle_of_a_call(engine: LlamaCpp, model_file: Path) -> None:
    session = engine.load(model_file, context=1024, threads=1)
    pid = session.pid
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    start = time.monotonic()
    with pytest.raises(EngineError, match="killed by SIGKILL during score") as e:
        session.score(np.zeros((5000, 1024), np.int32))
    assert "\n" not in str(e.value) and time.monotonic() - start < 20
    assert not psutil.pid_exists(pid)
    with pytest.raises(EngineError, match="closed"):
        session.logits(np.zeros(3, np.int32))
    session.close()


def test_stopped_worker_is_silent(model_file: Path) -> None:
    session = LlamaCpp(silence=1.0).load(model_file, threads=1)
    os.kill(session.pid, signal.SIGSTOP)
    with pytest.raises(EngineError, match="did not answer for 1 s during logits"):
        session.logits(np.zeros(3, np.int32))
    assert not psutil.pid_exists(session.pid)


def test_interrupt_leaves_nothing(
    engine: LlamaCpp, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = engine.load(model_file, context=1024, threads=1)
    monkeypatch.setattr(session._worker, "_read_line", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.score(np.zeros((5000, 1024), np.int32))
    assert not psutil.pid_exists(session.pid)


def _interrupted() -> bytes:
    raise KeyboardInterrupt


def test_ctrl_c_does_not_reach_the_worker(engine: LlamaCpp, model_file: Path) -> None:
    with engine.load(model_file, threads=1) as session:
        os.kill(session.pid, signal.SIGINT)
        time.sleep(0.1)
        assert session.logits(np.zeros(3, np.int32)).shape[0] == 3


def test_closed_twice_and_dropped(engine: LlamaCpp, model_file: Path) -> None:
    session = engine.load(model_file, threads=1)
    session.close()
    session.close()
    assert not psutil.pid_exists(session.pid)
    dropped = engine.load(model_file, threads=1)
    pid = dropped.pid
    del dropped
    assert not psutil.pid_exists(pid)


def test_worker_dies_with_its_parent(model_file: Path) -> None:
    code = (
        "import sys, time, threading, numpy as np\n"
        "from pathlib import Path\n"
        "from joulesmith.engines.llamacpp import LlamaCpp\n"
        "s = LlamaCpp().load(Path(sys.argv[1]), threads=1)\n"
        "t = np.zeros((100000, 1024), np.int32)\n"
        "threading.Thread(target=s.score, args=(t,), daemon=True).start()\n"
        "print(s.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(model_file)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.3)
    assert worker.is_running()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    worker.wait(timeout=10)


def test_a_worker_started_from_a_thread_outlives_it(engine: LlamaCpp, model_file: Path) -> None:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(engine.load(model_file, threads=1)))
    thread.start()
    thread.join()
    time.sleep(0.2)
    with found[0] as session:  # type: ignore[attr-defined]
        assert session.logits(np.zeros(2, np.int32)).shape[0] == 2
