"""A run's folder: what is done is kept there, complete or not at all, so that a run resumes.

Knows names, JSON and a lock; not what the stages compute.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from joulesmith.atomic import atomic_path
from joulesmith.errors import JoulesmithError

try:
    import fcntl
except ImportError:  # not a POSIX system: no lock between processes
    fcntl = None  # type: ignore[assignment]


def fingerprint(value: Any) -> str:
    """Twelve hexadecimal digits of a JSON value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def file_identity(path: str | None) -> list[Any] | None:
    """What tells one state of a file, or of the files in a folder, from another; JSON.

    Place, sizes and times of change, as reading all of a model takes long. The name alone where
    nothing is there ("hf:DATASET"), None for None.
    """
    if path is None:
        return None
    where = Path(path).expanduser()
    if not where.exists():
        return [path]
    where = where.resolve()
    files = sorted(f for f in where.iterdir() if f.is_file()) if where.is_dir() else [where]
    stats = [(f.name, f.stat()) for f in files]
    return [str(where), *([name, s.st_size, s.st_mtime_ns] for name, s in stats)]


class Workspace:
    """``folder`` for one run of one set of arguments. Use as a context manager (holds a lock).

    An error before anything was kept there leaves no trace of the run.

    Raises `JoulesmithError` when the folder cannot be made, holds a run with other
    arguments, or another process works in it.
    """

    def __init__(self, folder: Path, arguments: dict[str, Any]) -> None:
        self.folder = folder
        self.arguments = arguments
        self.work = folder / "work"
        self._lock: int | None = None
        self._made = self._claimed = False

    def __enter__(self) -> Workspace:
        try:
            self._made = not self.folder.exists()
            self._refuse_foreign()
            self.work.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._claimed = self._claim()
        except OSError as e:
            self.__exit__()
            raise JoulesmithError(
                f"cannot write {self.folder}: {e.strerror or e}: choose another --out"
            ) from e
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if self._claimed and exc and exc[0] is not None:
            self._forget()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        self._lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise JoulesmithError(
                f"another joulesmith works in {self.folder}: wait for it or choose another --out"
            ) from e

    def _forget(self) -> None:
        """Remove what this claim wrote, where nothing else was written: `rmdir` fails on kept
        work, and on a finished run, whose work is gone and whose result stands."""
        with contextlib.suppress(OSError):
            self.work.rmdir()
            for name in ("run.json", ".lock"):
                (self.folder / name).unlink(missing_ok=True)
            if self._made:
                self.folder.rmdir()

    def _refuse_foreign(self) -> None:
        if not self.folder.exists() or (self.folder / "run.json").exists():
            return
        foreign = [p.name for p in self.folder.iterdir() if p.name not in ("work", ".lock")]
        if foreign:
            raise JoulesmithError(
                f"{self.folder} is not empty ({foreign[0]}): choose a new folder for --out"
            )

    def _claim(self) -> bool:
        """Whether the folder is newly ours, or (False) was already."""
        path = self.folder / "run.json"
        mine = json.loads(json.dumps(self.arguments, default=str))
        if path.exists():
            try:
                theirs = json.loads(path.read_text())
            except ValueError:
                theirs = None
            if theirs != mine:
                names = sorted(
                    k
                    for k in {*mine, *(theirs or {})}
                    if not isinstance(theirs, dict) or theirs.get(k) != mine.get(k)
                )
                raise JoulesmithError(
                    f"{self.folder} holds a run with other arguments ({', '.join(names)} differ): "
                    "choose another --out, or remove it"
                )
            return False
        self.write_json(path, mine)
        return True

    @staticmethod
    def write_json(path: Path, value: Any) -> None:
        """Write JSON complete or not at all."""
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(value, indent=1))

    def get(self, name: str) -> Any:
        """The stored value of a finished step, or None."""
        path = self.work / f"{name}.json"
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            path.unlink()
            return None

    def put(self, name: str, value: Any) -> Any:
        """Store a finished step's value; returns it."""
        try:
            self.write_json(self.work / f"{name}.json", value)
        except OSError as e:
            raise JoulesmithError(f"cannot write in {self.work}: {e.strerror or e}") from e
        return value

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The stored value, or the computed one, stored."""
        found = self.get(name)
        return self.put(name, compute()) if found is None else found

    def clean(self) -> None:
        """Remove the working files of a finished run; results stay. ``JOULESMITH_KEEP_WORK=1``
        leaves them, for a look or for another floor (benchmarks/main_job.py)."""
        if os.environ.get("JOULESMITH_KEEP_WORK") == "1":
            return
        shutil.rmtree(self.work, ignore_errors=True)
