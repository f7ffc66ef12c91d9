"""Build llama.cpp for exactly this processor. Optional: the wheel's build always works.

The wheel is compiled for any recent x86-64; a native build may use wider vector
instructions. The source is the one inside the pinned xllamacpp, so that the structures
declared in `llama_abi` stay true, which is proven again here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from joulesmith.atomic import atomic_folder
from joulesmith.engines.llama_abi import PACKAGE, package_version
from joulesmith.errors import EngineError, JoulesmithError, MissingExtraError

_INSIDE = PurePosixPath("thirdparty/llama.cpp")
_LARGEST = 2 << 30  # bytes unpacked; the source is about 150 MB
_OFF = ("TESTS", "EXAMPLES", "TOOLS", "SERVER", "COMMON", "APP", "UI", "MTMD")


def build_native(
    dest: Path | None = None, source: Path | None = None, jobs: int | None = None
) -> Path:
    """Build the shared library; returns its path, for ``--engine-lib`` or $JOULESMITH_LLAMA_LIB.

    dest: an absent or empty folder; default one in the user's cache, reused when it is
    complete. source: an xllamacpp source archive (.tar.gz) or an unpacked folder; default
    downloads the installed version's through pip. jobs: compilers at once.
    Raises `EngineError` in one line when cmake, a compiler, the source or the build fails.
    """
    version = package_version()
    if version is None:
        raise MissingExtraError(PACKAGE)
    for tool in (("cmake",), ("c++", "g++", "clang++")):
        if not any(shutil.which(t) for t in tool):
            raise EngineError(f"building the engine needs {' or '.join(tool)} on the PATH")
    if dest is None:
        base = os.environ.get("XDG_CACHE_HOME")
        root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
        dest = root / "joulesmith" / f"llama.cpp-{version}-native"
    if dest.is_dir() and any(dest.iterdir()):
        return _proven(_library(dest))
    with tempfile.TemporaryDirectory(prefix="joulesmith-native-") as scratch:
        tree = _tree(source, version, Path(scratch))
        build = Path(scratch) / "build"
        _run(_configure(tree, build), "cmake configuration")
        count = str(jobs if jobs is not None else os.cpu_count() or 1)
        compile_ = ["cmake", "--build", str(build), "--target", "llama", "--parallel", count]
        _run(compile_, "the compilation")
        with atomic_folder(dest) as folder:
            for file in sorted((build / "bin").glob("*")):
                if ".so" in file.name or file.suffix in (".dylib", ".dll"):
                    shutil.copy2(file, folder / file.name, follow_symlinks=False)
            _proven(_library(folder))
    return _library(dest)


def _configure(tree: Path, build: Path) -> list[str]:
    return [
        "cmake",
        "-S",
        str(tree),
        "-B",
        str(build),
        "-DCMAKE_BUILD_TYPE=Release",
        "-DGGML_NATIVE=ON",
        "-DBUILD_SHARED_LIBS=ON",
        "-DLLAMA_CURL=OFF",
        "-DLLAMA_OPENSSL=OFF",
        # the libraries find each other wherever their folder is moved to
        "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
        "-DCMAKE_INSTALL_RPATH=" + ("@loader_path" if sys.platform == "darwin" else "$ORIGIN"),
        *(f"-DLLAMA_BUILD_{part}=OFF" for part in _OFF),
    ]


def _tree(source: Path | None, version: str, scratch: Path) -> Path:
    """The llama.cpp source folder."""
    if source is None:
        source = _download(version, scratch / "download")
    source = Path(source)
    if source.is_dir():
        for tree in (source, source / _INSIDE):
            if (tree / "include" / "llama.h").is_file():
                return tree
        raise EngineError(f"no llama.cpp source in {source}")
    if not source.is_file():
        raise EngineError(f"no such source archive: {source}")
    return _unpack(source, scratch / "source")


def _download(version: str, folder: Path) -> Path:
    folder.mkdir()
    # pip asks a source archive for its metadata, so it also fetches the build tools it names
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE]
    command += ["--dest", str(folder), f"{PACKAGE}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = sorted(folder.glob("*.tar.gz"))
    if not archives:
        raise EngineError(f"cannot download the source of {PACKAGE} {version}: {_tail(done)}")
    return archives[0]


def _unpack(archive: Path, folder: Path) -> Path:
    """Only ``thirdparty/llama.cpp``; regular files and folders with sane names only."""
    total = 0
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts[1:]  # drop "xllamacpp-<version>"
                if parts[: len(_INSIDE.parts)] != _INSIDE.parts or not member.isfile():
                    continue
                rest = parts[len(_INSIDE.parts) :]
                if not rest or any(p in ("..", "", "/") or os.sep in p for p in rest):
                    raise EngineError(f"unsafe name in {archive}: {member.name}")
                total += member.size
                if total > _LARGEST:
                    raise EngineError(f"the source archive unpacks to too much: {archive}")
                target = folder.joinpath(*rest)
                target.parent.mkdir(parents=True, exist_ok=True)
                stream = tar.extractfile(member)
                assert stream is not None
                with stream, target.open("wb") as out:
                    shutil.copyfileobj(stream, out)
    except (tarfile.TarError, EOFError, OSError) as e:
        raise EngineError(f"cannot unpack {archive}: {' '.join(str(e).split())}") from e
    if not (folder / "include" / "llama.h").is_file():
        raise EngineError(f"no llama.cpp source in {archive}")
    return folder


def _run(command: list[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as e:
        raise EngineError(f"{what} could not start: {e}") from e
    if done.returncode:
        raise EngineError(f"{what} failed: {_tail(done)}")


def _tail(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout or "").splitlines()
    errors = [line for line in lines if "error" in line.lower()] or lines
    return " ".join(" ".join(errors[-3:]).split())[-400:] or f"status {done.returncode}"


def _library(folder: Path) -> Path:
    for name in ("libllama.so", "libllama.dylib", "llama.dll"):
        if (folder / name).exists():
            return folder / name
    raise EngineError(f"no llama library in {folder}: remove it and build again")


def _proven(library: Path) -> Path:
    """The library, opened once in a process of its own: two copies in one do not agree."""
    code = "import sys; from joulesmith.engines.llama_abi import open_library as o; o(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(library)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise EngineError(f"the built library does not work: {_tail(done)}")
    return library


if __name__ == "__main__":
    try:
        print(build_native())
    except JoulesmithError as e:
        print(f"joulesmith: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
