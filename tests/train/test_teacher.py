"""The cache of a teacher: what is read is what was written, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from killed import Killed, killed_at
from numpy.typing import NDArray
from torch import Tensor, nn

from joulesmith import atomic
from joulesmith.errors import JoulesmithError
from joulesmith.train import checkpoint, losses, teacher
from joulesmith.train.teacher import TopK, cache_top

VOCAB = 23
WINDOWS = np.random.default_rng(0).integers(0, VOCAB, (11, 7)).astype(np.int32)


class Teacher(nn.Module):
    def __init__(self, vocab: int = VOCAB, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(vocab, 8)
        self.head = nn.Linear(8, vocab)
        self.calls = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.head(self.embed(tokens).cumsum(1))
        return 3 * out


def expected(module: nn.Module, windows: NDArray[np.int32], k: int, vocab: int | None = None):  # type: ignore[no-untyped-def]
    with torch.no_grad():
        logits = module(torch.from_numpy(windows.astype(np.int64))[:, :-1])[..., :vocab]
    return losses.top_of(logits, k)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@given(
    n=st.integers(1, 9),
    length=st.integers(2, 6),
    k=st.integers(1, 5),
    shard=st.one_of(st.none(), st.integers(1, 10)),
    vocab=st.sampled_from([5, 300, 65536, 65537]),
    seed=st.integers(0, 3),
)
def test_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    n: int, length: int, k: int, shard: int | None, vocab: int, seed: int,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("cache")
    rng = np.random.default_rng(seed)
    windows = rng.integers(0, vocab, (n, length)).astype(np.int32)
    module = Teacher(vocab, seed)
    shares: list[float] = []
    found = cache_top(module, windows, k, folder, shard=shard, progress=shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0
    places = rng.permutation(n)
    ids, values = expected(module, windows, k)
    for cache in (found, TopK(folder)):
        got_ids, got_values = cache.read(places)
        assert got_ids.dtype == torch.int32 and got_values.dtype == torch.float32
        assert torch.equal(got_ids, ids[places])
        torch.testing.assert_close(got_values, values[places], rtol=1e-3, atol=1e-3)
        assert torch.equal(got_values, got_values.half().float()), "float16 values"
        cache.check(places, windows[places].astype(np.int64))
    each = 4 + (length - 1) * k * (2 + (2 if vocab <= 65536 else 4))
    total = sum(p.stat().st_size for p in folder.glob("*.bin"))
    assert total == n * each + 60 * len(list(folder.glob("*.bin")))


def test_the_teacher_is_asked_once(tmp_path: Path) -> None:
    module = Teacher()
    cache_top(module, WINDOWS, 4, tmp_path, shard=3)
    before, module.calls = contents(tmp_path), 0
    cache_top(module, WINDOWS, 4, tmp_path, shard=3)
    assert module.calls == 1, "but for its width"
    assert contents(tmp_path) == before


def test_products_in_bfloat16_probabilities_in_float32(tmp_path: Path) -> None:
    module = Teacher()
    cache = cache_top(module, WINDOWS, 4, tmp_path / "half", precision="bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        ids, values = expected(module, WINDOWS, 4)
    got_ids, got_values = cache.read(np.arange(len(WINDOWS)))
    assert torch.equal(got_ids, ids)
    assert torch.equal(got_values, values.half().float())
    assert not torch.equal(got_values, expected(module, WINDOWS, 4)[1].half().float())
    with pytest.raises(JoulesmithError, match="another teacher"):
        cache_top(module, WINDOWS, 4, tmp_path / "half")


def test_logits_beyond_the_vocabulary(tmp_path: Path) -> None:
    module = Teacher()
    ids, values = cache_top(module, WINDOWS, 6, tmp_path, vocab=6).read(np.arange(11))
    wanted = expected(module, WINDOWS, 6, 6)
    assert torch.equal(ids, wanted[0])
    torch.testing.assert_close(values.exp().sum(-1), torch.ones(11, 6), rtol=2e-3, atol=0)


def test_impossible_tokens(tmp_path: Path) -> None:
    module = Teacher()
    with torch.no_grad():
        module.head.bias[5:] = -torch.inf
    _, values = cache_top(module, WINDOWS, 8, tmp_path).read(np.arange(11))
    assert torch.isneginf(values[..., 5:]).all() and torch.isfinite(values[..., :5]).all()
    with torch.no_grad():
        module.head.bias[5:] = torch.nan
    with pytest.raises(JoulesmithError, match="not numbers"):
        cache_top(module, WINDOWS, 8, tmp_path / "nan")


@pytest.mark.parametrize("stop", range(1, 5))
def test_a_stopped_run_goes_on(tmp_path: Path, stop: int) -> None:
    module = Teacher()
    cache_top(module, WINDOWS, 4, tmp_path / "whole", shard=3)
    with pytest.raises(Killed):
        cache_top(module, WINDOWS, 4, tmp_path / "part", shard=3, progress=killed_at(stop))
    assert len(list((tmp_path / "part").glob("*.bin"))) == stop - 1
    with pytest.raises(JoulesmithError, match="unfinished"):
        TopK(tmp_path / "part")
    (tmp_path / "part" / "top-000003.bin.1234.part").write_bytes(b"left by kill -9")
    shares: list[float] = []
    cache_top(module, WINDOWS, 4, tmp_path / "part", shard=3, progress=shares.append)
    assert len(shares) == 5 - stop and shares[-1] == 1.0
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


def test_kill_9(tmp_path: Path) -> None:
    """A real process, killed while it waits between two shards and in the middle of a write."""
    code = """
import sys, time
from pathlib import Path
import test_teacher as t
slow = lambda share: (print(share, flush=True), time.sleep(0.3))
t.cache_top(t.Teacher(), t.WINDOWS, 4, Path(sys.argv[1]), shard=2, progress=slow)
"""
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here, here.parent, here.parents[1] / "src")))
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a")],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    for _ in range(3):
        child.stdout.readline()
    time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    done = {n: b for n, b in contents(tmp_path / "a").items() if n.endswith(".bin")}
    assert 1 <= len(done) < 6
    cache_top(Teacher(), WINDOWS, 4, tmp_path / "a", shard=2)
    cache_top(Teacher(), WINDOWS, 4, tmp_path / "b", shard=2)
    whole = contents(tmp_path / "b")
    assert all(whole[n] == b for n, b in done.items()), "each shard is whole or not there"
    assert contents(tmp_path / "a") == whole


def test_of_one_teacher_text_and_k_only(tmp_path: Path) -> None:
    cache_top(Teacher(), WINDOWS, 4, tmp_path)
    before = contents(tmp_path)
    other = WINDOWS.copy()
    other[0, 0] += 1
    for module, windows, k, vocab in (
        (Teacher(seed=1), WINDOWS, 4, None),
        (Teacher(), other, 4, None),
        (Teacher(), WINDOWS[:-1], 4, None),
        (Teacher(), WINDOWS, 5, None),
        (Teacher(), WINDOWS, 4, VOCAB - 1),
    ):
        with pytest.raises(JoulesmithError, match="cache of another teacher, text or k"):
            cache_top(module, windows, k, tmp_path, vocab=vocab)
    assert contents(tmp_path) == before


def test_windows_that_are_not_there(tmp_path: Path) -> None:
    cache = cache_top(Teacher(), WINDOWS, 4, tmp_path)
    for place in (-1, 11):
        with pytest.raises(JoulesmithError, match=f"no window {place} in"):
            cache.read(np.array([place]))
    with pytest.raises(JoulesmithError, match="window 3 is not the one"):
        cache.check(np.array([2, 3]), WINDOWS[[2, 4]].astype(np.int64))


@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_flipped_bit_of_a_shard_is_found_and_mended(
    tmp_path_factory: pytest.TempPathFactory, at: int, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache_top(Teacher(), WINDOWS, 4, folder, shard=6)
    before = contents(folder)
    raw = bytearray(before["top-000001.bin"])
    raw[at % len(raw)] ^= 1 << bit
    (folder / "top-000001.bin").write_bytes(raw)
    opened = TopK(folder)
    opened.read(np.arange(6))
    with pytest.raises(JoulesmithError, match="damaged") as e:
        opened.read(np.array([6]))
    assert "\n" not in str(e.value)
    cache_top(Teacher(), WINDOWS, 4, folder, shard=6)
    assert contents(folder) == before


@pytest.mark.parametrize("size", [0, 1, 59, 60, 61, -1])
def test_shards_cut_short(tmp_path: Path, size: int) -> None:
    cache_top(Teacher(), WINDOWS, 4, tmp_path)
    path = tmp_path / "top-000000.bin"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(JoulesmithError, match="damaged or unfinished"):
        TopK(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"windows": -1}, {"windows": 1 << 40}, {"k": 0}, {"k": VOCAB + 1}, {"vocab": "9"},
        {"shard": 0}, {"positions": 2.5}, {"positions": True}, {"fingerprint": "é" * 16},
        {"fingerprint": 7}, {"more": 1}, {"windows": 1 << 31},
    ],
)  # fmt: skip
def test_hostile_numbers(tmp_path: Path, change: dict[str, object]) -> None:
    cache_top(Teacher(), WINDOWS, 4, tmp_path)
    meta = json.loads((tmp_path / "top.json").read_text())
    (tmp_path / "top.json").write_text(json.dumps({**meta, **change}))
    with pytest.raises(JoulesmithError, match="damaged") as e:
        TopK(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["", "[", "[]", "null", "[" * 4000, "{}", " " * 5000])
def test_hostile_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "top.json").write_text(text)
    for f in (lambda: TopK(tmp_path), lambda: cache_top(Teacher(), WINDOWS, 4, tmp_path)):
        with pytest.raises(JoulesmithError, match="damaged"):
            f()


def test_shards_without_their_numbers(tmp_path: Path) -> None:
    cache_top(Teacher(), WINDOWS, 4, tmp_path)
    (tmp_path / "top.json").unlink()
    with pytest.raises(JoulesmithError, match="damaged"):
        cache_top(Teacher(), WINDOWS, 4, tmp_path)
    with pytest.raises(JoulesmithError, match="no cache of a teacher"):
        TopK(tmp_path)


def test_a_full_disk_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Teacher()
    cache_top(module, WINDOWS, 4, tmp_path / "whole", shard=3)
    real = Path.write_bytes
    written = 0

    def full(self: Path, data: bytes) -> int:
        nonlocal written
        written += 1
        if written == 3:
            real(self, data[:50])
            raise OSError(28, "No space left on device", str(self))
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(JoulesmithError, match="disk full") as e:
        cache_top(module, WINDOWS, 4, tmp_path / "a", shard=3)
    assert "\n" not in str(e.value)
    assert sorted(contents(tmp_path / "a")) == ["top-000000.bin", "top-000001.bin", "top.json"]
    monkeypatch.undo()
    monkeypatch.setattr(atomic, "free_bytes", lambda _: 100)
    with pytest.raises(JoulesmithError, match="not enough disk space"):
        cache_top(module, WINDOWS, 4, tmp_path / "a", shard=3)
    monkeypatch.undo()
    cache_top(module, WINDOWS, 4, tmp_path / "a", shard=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "whole")


def test_numbers_out_of_range(tmp_path: Path) -> None:
    for k, vocab in ((0, None), (VOCAB + 1, None), (5, 4), (1, VOCAB + 1)):
        with pytest.raises(JoulesmithError, match=f"{k} of a vocabulary of"):
            cache_top(Teacher(), WINDOWS, k, tmp_path, vocab=vocab)
    for bad in (WINDOWS[:0], WINDOWS[:, :1]):
        with pytest.raises(JoulesmithError, match="no windows"):
            cache_top(Teacher(), bad, 4, tmp_path)
    assert not list(tmp_path.iterdir())


def test_shards_are_of_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "SHARD_BYTES", 300)
    cache = cache_top(Teacher(), WINDOWS, 4, tmp_path)
    assert cache.layout.shard == 300 // (6 * 4 * 4) == 3


def test_ranks_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_top(Teacher(), WINDOWS, 4, tmp_path / "one", shard=3)
    monkeypatch.setattr(checkpoint, "world", lambda: 2)
    for rank, done in ((0, [0, 2]), (1, [0, 1, 2, 3])):
        monkeypatch.setattr(checkpoint, "rank", lambda rank=rank: rank)
        with nullcontext() if rank else pytest.raises(JoulesmithError, match="unfinished"):
            cache_top(Teacher(), WINDOWS, 4, tmp_path / "two", shard=3)  # nobody to wait for
        names = [f"top-{i:06d}.bin" for i in done]
        assert sorted(contents(tmp_path / "two")) == [*names, "top.json"]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
