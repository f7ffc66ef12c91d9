"""A teacher's most likely tokens of all windows, on disk: asked once, and read at every epoch.

A folder of ``top.json`` and shards of whole windows, each there whole or not at all, so that a run
that was killed goes on. A shard is a header, then of its windows the CRC-32 of their tokens
(uint32), ids (windows, positions, k) in uint16 where the vocabulary fits and else uint32, and
log-probabilities of the same shape in float16, largest first; little-endian. Knows no student.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from joulesmith.atomic import atomic_path, check_space
from joulesmith.compress.checkpoint import digest
from joulesmith.errors import JoulesmithError
from joulesmith.progress import Tick, silent
from joulesmith.train import checkpoint, losses
from joulesmith.train.outputs import device_of, run
from joulesmith.train.settings import Precision

META = "top.json"
SHARD_BYTES = 1 << 22
"""A shard's target; what a kill loses is the work on one."""
BATCH = {"cpu": 8, "cuda": 64}
"""Windows in one pass of the teacher."""
_MAGIC = b"jstopk1\n"
_HEADER = struct.Struct("<8s16sQQQQI")
"""Magic, fingerprint, first window, windows, predictions of each, k, CRC-32 of what follows."""


@dataclass(frozen=True)
class Layout:
    """What a cache is of, and what its shards are. fingerprint: of teacher, windows and numbers.
    positions: predictions of a window, one fewer than its tokens. vocab: tokens there are. shard:
    windows in a file, but the last."""

    fingerprint: str
    windows: int
    positions: int
    k: int
    vocab: int
    shard: int

    @property
    def shards(self) -> int:
        """How many files."""
        return -(-self.windows // self.shard)

    @property
    def id_type(self) -> np.dtype[np.generic]:
        """The fewest bits of the two that hold an id."""
        return np.dtype("<u2" if self.vocab <= 1 << 16 else "<u4")

    def count(self, i: int) -> int:
        """Windows of shard i."""
        return min(self.shard, self.windows - i * self.shard)

    def size(self, i: int) -> int:
        """Size of shard i."""
        each = 4 + self.positions * self.k * (self.id_type.itemsize + 2)
        return _HEADER.size + self.count(i) * each

    def header(self, i: int, crc: int) -> bytes:
        """Of shard i, whose body has that CRC-32."""
        first, count = i * self.shard, self.count(i)
        told = self.fingerprint.encode()
        return _HEADER.pack(_MAGIC, told, first, count, self.positions, self.k, crc)


class _Shard(NamedTuple):
    """crcs (n,) of tokens; ids and values (n, positions, k)."""

    crcs: NDArray[np.uint32]
    ids: NDArray[np.generic]
    values: NDArray[np.float16]


class TopK:
    """A complete cache, opened; shards are checked when first read.

    Raises `JoulesmithError` where there is none, or it is damaged or not complete.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.layout = folder, _read_meta(folder)
        self._open: dict[int, _Shard] = {}
        for i in range(self.layout.shards):
            path = _path(folder, i)
            if not path.is_file() or path.stat().st_size != self.layout.size(i):
                raise _damaged(path)

    def read(self, places: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Windows' ids int32 and log-probabilities float32, (n, positions, k) each, as written.
        Raises `JoulesmithError` for windows that are not there and damaged shards."""
        parts = [self._at(int(p)) for p in places]
        ids = np.stack([s.ids[r] for s, r in parts]).astype(np.int32)
        values = np.stack([s.values[r] for s, r in parts]).astype(np.float32)
        return torch.from_numpy(ids), torch.from_numpy(values)

    def check(self, places: NDArray[np.int64], tokens: NDArray[np.int64]) -> None:
        """Raises `JoulesmithError` unless tokens (n, length) are what the teacher read there."""
        for p, row in zip(places, tokens, strict=True):
            shard, r = self._at(int(p))
            if int(shard.crcs[r]) != _crc(row):
                raise JoulesmithError(
                    f"window {int(p)} is not the one that {self.folder} was made of: make the "
                    "cache from the windows that are trained on"
                )

    def _at(self, place: int) -> tuple[_Shard, int]:
        if not 0 <= place < self.layout.windows:
            raise JoulesmithError(
                f"no window {place} in {self.folder}, which has {self.layout.windows}: make the "
                "cache from the windows that are trained on"
            )
        i, row = divmod(place, self.layout.shard)
        if i not in self._open:
            self._open[i] = _load(self.folder, self.layout, i)
        return self._open[i], row


def cache_top(
    teacher: nn.Module,
    windows: NDArray[np.int32],
    k: int,
    folder: Path,
    *,
    vocab: int | None = None,
    shard: int | None = None,
    precision: Precision = "float32",
    progress: Tick = silent,
) -> TopK:
    """The ``k`` most likely tokens after each of the windows' tokens but the last, kept in
    ``folder``; what is there of the same teacher, windows and numbers is not made again. Ranks
    share the shards.

    teacher: put into eval mode. windows: int32 (n, length). vocab: logits beyond are of no token;
    default all. shard: windows in a file. precision: of the teacher's products (autocast); its
    probabilities are made in float32. Raises `JoulesmithError` for a folder of another cache, k
    out of range, probabilities that are not numbers, and a full disk, where shards that are
    complete are kept.
    """
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 2:
        raise JoulesmithError("no windows to ask a teacher about: give more text")
    n, positions = len(windows), windows.shape[1] - 1
    teacher.eval()
    wide = _logits(teacher, windows[:1, :2], "float32").shape[-1]
    vocab = vocab or wide
    if not 0 < k <= vocab <= wide:
        raise JoulesmithError(
            f"{k} of a vocabulary of {vocab} tokens of {wide} logits: give k from 1 to the "
            "vocabulary, and a vocabulary that the teacher has"
        )
    each = positions * k * (4 if vocab <= 1 << 16 else 6)
    shard = shard or max(1, min(n, SHARD_BYTES // each))
    # float32 as it ever was, so that caches made before are known
    how = () if precision == "float32" else (precision,)
    told = digest(teacher, windows, positions, k, vocab, shard, *how)
    layout = Layout(told, n, positions, k, vocab, shard)
    if checkpoint.rank() == 0:
        _claim(folder, layout)
    checkpoint.wait()
    own = range(checkpoint.rank(), layout.shards, checkpoint.world())
    todo = [i for i in own if not _whole(folder, layout, i)]
    check_space(folder, sum(layout.size(i) for i in todo))
    batch = BATCH.get(device_of(teacher).type, BATCH["cpu"])
    all_windows, done = sum(layout.count(i) for i in todo), 0
    for i in todo:
        mine = windows[i * shard :][: layout.count(i)]
        ids = np.empty((len(mine), positions, k), layout.id_type)
        values = np.empty((len(mine), positions, k), "<f2")
        for at in range(0, len(mine), batch):
            logits = _logits(teacher, mine[at : at + batch], precision)
            found, logs = losses.top_of(logits[..., :vocab], k)
            if bool(logs.isnan().any()):
                raise JoulesmithError("the teacher's probabilities are not numbers on this text")
            ids[at : at + batch] = found.cpu().numpy()
            with np.errstate(over="ignore"):  # below float16 is as good as never
                values[at : at + batch] = logs.float().cpu().numpy()
            done += len(found)
            progress(done / all_windows)
        crcs = np.array([_crc(row) for row in mine], "<u4")
        body = crcs.tobytes() + ids.tobytes() + values.tobytes()
        with atomic_path(_path(folder, i), needed=layout.size(i)) as temporary:
            temporary.write_bytes(layout.header(i, zlib.crc32(body)) + body)
    checkpoint.wait()
    return TopK(folder)


def _claim(folder: Path, layout: Layout) -> None:
    """The folder's ``top.json``, and nothing left of a run that was killed."""
    if (folder / META).exists():
        if _read_meta(folder) != layout:
            raise JoulesmithError(
                f"{folder} holds the cache of another teacher, text or k: give another folder"
            )
        for left in folder.glob("top-*.part"):
            left.unlink(missing_ok=True)
        return
    if folder.exists() and any(folder.glob("top-*.bin")):
        raise _damaged(folder / META)
    with atomic_path(folder / META) as temporary:
        temporary.write_text(json.dumps(asdict(layout)))


def _read_meta(folder: Path) -> Layout:
    path = folder / META
    try:
        if path.stat().st_size > 4096:
            raise ValueError
        found = json.loads(path.read_bytes())
        told = found.pop("fingerprint")
        layout = Layout(told, **found)
    except FileNotFoundError as e:
        raise JoulesmithError(f"no cache of a teacher: {folder}: make one") from e
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise _damaged(path) from e
    good = all(type(n) is int and 0 < n < 1 << 32 for n in found.values())
    if not (good and isinstance(told, str) and len(told) == 16 and told.isascii()):
        raise _damaged(path)
    if layout.k > layout.vocab or layout.vocab > 1 << 31:
        raise _damaged(path)
    return layout


def _path(folder: Path, i: int) -> Path:
    return folder / f"top-{i:06d}.bin"


def _whole(folder: Path, layout: Layout, i: int) -> bool:
    try:
        _load(folder, layout, i)
    except JoulesmithError:
        return False
    return True


def _load(folder: Path, layout: Layout, i: int) -> _Shard:
    """Shard i, mapped. Raises `JoulesmithError` unless it is the one that was written."""
    path = _path(folder, i)
    try:
        if path.stat().st_size != layout.size(i):
            raise _damaged(path)
        raw = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as e:
        raise _damaged(path) from e
    if raw[: _HEADER.size].tobytes() != layout.header(i, zlib.crc32(raw[_HEADER.size :].data)):
        raise _damaged(path)
    n = layout.count(i)
    shape = (n, layout.positions, layout.k)
    ids_at = _HEADER.size + 4 * n
    values_at = ids_at + n * layout.positions * layout.k * layout.id_type.itemsize
    ids = raw[ids_at:values_at].view(layout.id_type).reshape(shape)
    if int(ids.max()) >= layout.vocab:
        raise _damaged(path)
    return _Shard(
        raw[_HEADER.size : ids_at].view("<u4"), ids, raw[values_at:].view("<f2").reshape(shape)
    )


def _damaged(path: Path) -> JoulesmithError:
    return JoulesmithError(
        f"damaged or unfinished cache of a teacher: {path}: make it again (what is whole is kept), "
        "or remove it"
    )


@torch.no_grad()
def _logits(teacher: nn.Module, windows: NDArray[np.int32], precision: Precision) -> Tensor:
    """(n, length) -> (n, length - 1, width)."""
    device = device_of(teacher)
    tokens = torch.from_numpy(windows.astype(np.int64)).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return run(teacher, tokens[:, :-1]).logits


def _crc(row: NDArray[np.generic]) -> int:
    return zlib.crc32(np.ascontiguousarray(row, "<i4").tobytes())
