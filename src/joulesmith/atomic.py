"""Files and folders that appear whole or not at all. Knows nothing of what is in them."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from joulesmith.errors import JoulesmithError
from joulesmith.units import size

_FULL = (errno.ENOSPC, errno.EDQUOT)


def free_bytes(path: str | os.PathLike[str]) -> int | None:
    """Bytes an unprivileged writer may still use on the disk of ``path``; None when unknown."""
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def check_space(folder: str | os.PathLike[str], needed: int) -> None:
    """Raises `JoulesmithError` when ``folder``'s disk has fewer than ``needed`` bytes free."""
    free = free_bytes(folder)
    if free is not None and free < needed:
        raise JoulesmithError(
            f"not enough disk space: {folder}: {size(needed)} ({needed} bytes) needed, "
            f"{size(free)} free: free some or write elsewhere"
        )


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, needed: int | None = None) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on a clean exit it becomes ``path``.

    The body creates a regular file under the yielded name. On exit the file is
    synced to disk and renamed over ``path``, so a reader sees the old file or
    the whole new one. On any exception (Ctrl-C included) the temporary file is
    removed and an existing ``path`` stays as it was. After ``kill -9`` a file
    ending in ``.part`` may be left; it is safe to delete.

    path: parent folders are made when absent.
    needed: bytes the file will take, when known; checked before anything is written.
    Raises `JoulesmithError` when the disk is full, read-only or not writable.
    """
    final = Path(path)
    if final.exists() and not final.is_file():
        raise JoulesmithError(f"not a regular file: {final}: give another output name")
    folder = final.parent
    temp = folder / f"{final.name[:200]}.{secrets.token_hex(4)}.part"
    with _one_line(temp, final, needed):
        folder.mkdir(parents=True, exist_ok=True)
        if needed is not None:
            check_space(folder, needed)
        try:
            yield temp
            sync(temp)
            temp.replace(final)
        except BaseException:
            with suppress(OSError):
                temp.unlink(missing_ok=True)
            raise
        sync(folder)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, needed: int | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``; on a clean exit it becomes ``path``.

    ``path`` must be absent or an empty folder. Everything else as `atomic_path`.
    """
    final = Path(path)
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        raise JoulesmithError(f"not a folder: {final}: give another output name")
    with _one_line(final, final, needed):
        if final.is_dir() and any(final.iterdir()):
            raise JoulesmithError(f"folder is not empty: {final}: give a new one or empty it")
    folder = final.parent
    temp = folder / f"{final.name[:200]}.{secrets.token_hex(4)}.part"
    with _one_line(temp, final, needed):
        folder.mkdir(parents=True, exist_ok=True)
        if needed is not None:
            check_space(folder, needed)
        try:
            temp.mkdir()
            yield temp
            usual = temp.stat().st_mode & 0o666
            for item in sorted(temp.rglob("*")):
                if item.is_file():  # some libraries write files that only their owner can read
                    item.chmod(item.stat().st_mode | usual)
                sync(item)
            sync(temp)
            temp.replace(final)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise
        sync(folder)


def sync(path: Path) -> None:
    """A file or folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        # Some file systems cannot sync a folder; a disk error is still told.
        if e.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


@contextmanager
def _one_line(temp: Path, final: Path, needed: int | None) -> Iterator[None]:
    """Turn the operating system's refusals about ``temp`` into one line about ``final``."""
    try:
        yield
    except OSError as e:
        if e.errno in _FULL:
            wanted = "" if needed is None else f"{size(needed)} ({needed} bytes) needed, "
            free = free_bytes(final.parent)
            raise JoulesmithError(
                f"disk full: {final.parent}: {wanted}{size(free)} free: "
                "free some or write elsewhere"
            ) from e
        about = {str(name) for name in (e.filename, e.filename2) if name is not None}
        ours = {str(temp), str(final), *(str(p) for p in final.parents)}
        if e.errno in (errno.EROFS, errno.EFBIG) or about & ours:
            raise JoulesmithError(
                f"cannot write: {final}: {e.strerror or e}: give a writable place"
            ) from e
        raise
