"""Running a command: exit status, signals, streams, orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from joulesmith.energy.launch import CommandNotRunError, launch

PYTHON = sys.executable


def wait_for(file: Path) -> None:
    end = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


@pytest.mark.parametrize("code", [0, 1, 7, 255])
def test_exit_code(code: int) -> None:
    ended = launch(["sh", "-c", f"exit {code}"])
    assert (ended.exit_code, ended.signal, ended.stopped) == (code, None, False)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_death_by_signal(number: signal.Signals) -> None:
    ended = launch(["sh", "-c", f"ulimit -c 0; kill -{int(number)} $$"])
    assert (ended.exit_code, ended.signal) == (128 + number, number)
    assert not ended.stopped, "the signal was not ours"


def test_absent_command() -> None:
    with pytest.raises(CommandNotRunError, match="command not found: 'no-such-command'") as e:
        launch(["no-such-command"])
    assert e.value.exit_code == 127
    with pytest.raises(CommandNotRunError) as e:
        launch([""])
    assert e.value.exit_code == 127
    with pytest.raises(CommandNotRunError) as e:
        launch([f"{__file__}/x"])
    assert e.value.exit_code == 127


def test_not_executable(tmp_path: Path) -> None:
    file = tmp_path / "script"
    file.write_text("#!/bin/sh\n")
    file.chmod(0o644)
    for path in (file, tmp_path):
        with pytest.raises(CommandNotRunError) as e:
            launch([str(path)])
        assert e.value.exit_code == 126 and "\n" not in str(e.value)


def test_missing_interpreter(tmp_path: Path) -> None:
    file = tmp_path / "script"
    file.write_text("#!/no/such/interpreter\n")
    file.chmod(0o755)
    with pytest.raises(CommandNotRunError, match="interpreter") as e:
        launch([str(file)])
    assert e.value.exit_code == 127


def test_script_without_first_line(tmp_path: Path) -> None:
    file = tmp_path / "script"
    file.write_text('exit "$1"\n')
    file.chmod(0o755)
    assert launch([str(file), "5"]).exit_code == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_passed_on_and_handlers_restored(
    number: signal.Signals, tmp_path: Path
) -> None:
    """The command ends by its own handler; this process lives on, its handlers as before."""
    ready = tmp_path / "ready"
    code = (
        "import pathlib, signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: sys.exit(9))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)\n"
    )

    def send() -> None:
        wait_for(ready)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    sender = threading.Thread(target=send)
    sender.start()
    ended = launch([PYTHON, "-c", code])
    sender.join()
    assert (ended.exit_code, ended.signal, ended.stopped) == (9, None, True)
    assert signal.getsignal(number) is before


def test_a_signal_before_the_command_runs_reaches_it() -> None:
    def early(pid: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    ended = launch(["sleep", "60"], started=early)
    assert (ended.exit_code, ended.signal, ended.stopped) == (143, signal.SIGTERM, True)


def test_works_outside_the_main_thread() -> None:
    out: list[int] = []
    thread = threading.Thread(target=lambda: out.append(launch(["sh", "-c", "exit 4"]).exit_code))
    thread.start()
    thread.join()
    assert out == [4]


@linux
def test_orphans_are_collected_and_left_ones_told() -> None:
    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    before = children()
    ended = launch(["sh", "-c", "(sh -c 'exit 3' &); (sleep 0.05 &); sleep 1"])
    assert ended.exit_code == 0 and ended.left_running == 0
    assert children() <= before
    ended = launch(["sh", "-c", "sleep 1 & exit 2"])
    assert ended.exit_code == 2 and ended.left_running == 1


@linux
def test_an_ended_child_of_the_caller_hides_no_orphans() -> None:
    mine = subprocess.Popen(["true"])
    os.waitid(os.P_PID, mine.pid, os.WEXITED | os.WNOWAIT)  # ended, and not collected
    before = set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
    ended = launch(["sh", "-c", "(sh -c 'exit 3' &); (sleep 0.05 &); sleep 0.3; exit 5"])
    assert ended.exit_code == 5 and ended.left_running == 0
    now = set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
    assert len(now - before) == 0
    assert str(mine.pid) in now, "it is the caller's to collect"
    assert mine.wait() == 0


@linux
def test_children_of_the_caller_are_left_to_it() -> None:
    mine = subprocess.Popen([PYTHON, "-c", "raise SystemExit(6)"])
    assert launch(["sleep", "0.3"]).exit_code == 0
    assert mine.wait() == 6


@linux
def test_memory_is_the_commands_not_ours() -> None:
    """Asked from a small process: this one may have grown beyond the command in earlier tests."""
    code = (
        "import sys; from joulesmith.energy.launch import launch\n"
        "hold = \"x = bytearray(400 << 20); x[::4096] = b'1' * len(x[::4096])\"\n"
        "print(launch([sys.executable, '-c', hold]).largest_bytes, launch(['true']).largest_bytes)"
    )
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True)
    big, small = done.stdout.split()
    assert 400 << 20 < int(big) < 500 << 20
    assert small == "None", "smaller than the process that asks: unknown, not ours"


def test_redirections_of_the_caller_stay_open(tmp_path: Path) -> None:
    code = "from joulesmith.energy.launch import launch; launch(['sh', '-c', 'echo three >&3'])"
    out = tmp_path / "out"
    subprocess.run(["sh", "-c", f'exec "$0" -c "$1" 3>{out}', PYTHON, code], check=True)
    assert out.read_text() == "three\n"


def test_ignored_signals_stay_ignored() -> None:
    """Under nohup the command must outlive a hang-up, too."""
    code = (
        "import signal; from joulesmith.energy.launch import launch\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "assert launch(['sh', '-c', 'kill -HUP $$; exit 3']).exit_code == 3\n"
    )
    subprocess.run([PYTHON, "-c", code], check=True)


@linux
def test_ctrl_c_of_a_terminal_reaches_the_command_once(tmp_path: Path) -> None:
    """The terminal sends it to the whole group; a second one would kill many programs."""
    import pty

    ready, out = tmp_path / "ready", tmp_path / "out"
    command = (
        "import pathlib, signal, time\n"
        "seen = []\n"
        "signal.signal(signal.SIGINT, lambda *_: seen.append(1))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "while not seen: time.sleep(0.01)\n"
        "time.sleep(0.3)\n"
        f"pathlib.Path({str(out)!r}).write_text(str(len(seen)))\n"
    )
    code = (
        "import sys; from joulesmith.energy.launch import launch\n"
        "ended = launch([sys.executable, '-c', sys.argv[1]])\n"
        "sys.exit(10 + ended.stopped + 2 * ended.exit_code)"
    )
    master, slave = pty.openpty()
    # A session of its own, with the terminal as the one that controls it.
    process = subprocess.Popen(
        [
            *("setsid", "--ctty", "--wait"),
            *(PYTHON, "-c", code, command),
        ],
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    try:
        wait_for(ready)
        os.write(master, b"\x03")
        assert process.wait(timeout=30) == 11
        assert out.read_text() == "1"
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(slave)
