"""GGUF at equal bytes: our rounding against llama.cpp's own quantizer with an importance matrix.

    python -m benchmarks.quantizers.gguf_types --work DIR --data TEXTS --stories FOLDER \\
        --engine-lib LIBLLAMA

LIBLLAMA is a native build (`joulesmith.engines.native.build_native`): the wheel's library
leaves its quantizer out, but judges. llama.cpp's quantizer (``llama_model_quantize``) makes a
file, with an importance matrix of mean squared inputs over the same calibration windows; like
``llama-imatrix`` it has none for the embedding and the head. Ours rounds every tensor onto
the very type that it has in that file, so that the bytes are equal, and both files are
judged on the engine. A file with a type that we have no rounding for is named as missing.
Runs are lines of ``DIR/gguf.jsonl``; finished ones are skipped.
"""

from __future__ import annotations

import argparse
import ctypes as C
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from benchmarks.quantizers.runs import read_lines, spread
from benchmarks.quantizers.subjects import SUBJECTS, Places, calibration, prepare

# llama.h, enum llama_ftype
FILE_TYPES = {
    "Q6_K": 18, "Q5_K_M": 17, "Q4_K_M": 15, "Q4_K_S": 14, "Q4_0": 2, "IQ4_NL": 25, "IQ4_XS": 30,
    "Q3_K_M": 12, "Q3_K_S": 11, "IQ3_M": 27, "IQ3_S": 26, "IQ3_XS": 22, "IQ3_XXS": 23,
    "Q2_K": 10, "Q2_K_S": 21, "IQ2_M": 29, "IQ2_S": 28, "IQ2_XS": 20, "IQ2_XXS": 19,
    "IQ1_M": 31, "IQ1_S": 24,
}  # fmt: skip
USUAL = (
    "Q4_K_M", "Q4_K_S", "IQ4_NL", "IQ4_XS", "Q3_K_M", "Q3_K_S", "IQ3_S", "IQ3_XXS",
    "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS",
)  # fmt: skip


class _Importance(C.Structure):
    _fields_: ClassVar = [
        ("name", C.c_char_p), ("data", C.POINTER(C.c_float)), ("size", C.c_size_t),
    ]  # fmt: skip


class _Parameters(C.Structure):
    """llama.h, ``llama_model_quantize_params``, release b11549."""

    _fields_: ClassVar = [
        *((n, C.c_int32) for n in ("nthread", "ftype", "output_type", "embedding_type")),
        *((n, C.c_bool) for n in ("requantize", "output", "copy", "pure", "split", "dry_run")),
        ("imatrix", C.POINTER(_Importance)),
        *((n, C.c_void_p) for n in ("kv", "types", "prune")),
        ("most_bytes", C.c_size_t),
    ]


def llama_quantize(
    library: Path,
    source: Path,
    target: Path,
    kind: str,
    importance: dict[str, np.ndarray],
    threads: int,
) -> None:
    """What ``llama-quantize --imatrix`` does. Raises `RuntimeError` where it fails."""
    c = C.CDLL(str(library))
    try:
        c.llama_model_quantize.restype = C.c_uint32
        c.llama_model_quantize.argtypes = [C.c_char_p, C.c_char_p, C.POINTER(_Parameters)]
        c.llama_model_quantize_default_params.restype = _Parameters
    except AttributeError as e:
        raise SystemExit(f"{library} has no quantizer: build one, see this module's head") from e
    given = c.llama_model_quantize_default_params()
    types = given.output_type == given.embedding_type > 30  # GGML_TYPE_COUNT
    if not (types and given.output and not given.imatrix and not given.prune):
        raise SystemExit(f"{library} has another ABI")
    rows = (_Importance * (len(importance) + 1))()
    alive = []  # ctypes frees what nobody holds
    for row, (name, squares) in zip(rows, importance.items(), strict=False):
        data = np.ascontiguousarray(squares, np.float32)
        alive.append(data)
        row.name, row.size = name.encode(), data.size
        row.data = data.ctypes.data_as(C.POINTER(C.c_float))
    given.nthread, given.ftype, given.imatrix = threads, FILE_TYPES[kind], rows
    c.llama_backend_init()
    if c.llama_model_quantize(str(source).encode(), str(target).encode(), C.byref(given)) != 0:
        raise RuntimeError(f"llama.cpp could not make {kind}")


class Judge:
    """One subject: its float file, its reference, and what is made of them."""

    def __init__(
        self, name: str, places: Places, work: Path, windows: int, threads: int, library: Path
    ) -> None:
        from joulesmith import models
        from joulesmith.engines import get_engine
        from joulesmith.engines.torch_engine import TorchSession
        from joulesmith.export.gguf import write_float_gguf
        from joulesmith.quality import write_reference

        self.subject = prepare(name, places, work)
        self.places, self.work, self.windows, self.threads = places, work, windows, threads
        self.model = models.load(self.subject.folder)
        self.library = library
        self.engine = get_engine("llama.cpp")
        self.float_file = work / "models" / f"{name}-f32.gguf"
        if not self.float_file.exists():
            write_float_gguf(self.model, self.float_file, "F32")
        path = work / "models" / f"{name}-reference.npy"
        self.reference = write_reference(
            TorchSession(self.model.module),
            self.subject.evaluation,
            path,
            self.subject.evaluated_on,
        )

    def calibration(self, seed: int) -> np.ndarray:
        """The seed's windows."""
        return calibration(self.subject, self.places, seed, self.windows, self.work)

    def importance(self, seed: int) -> dict[str, np.ndarray]:
        """GGUF name -> mean squared inputs of each layer inside the blocks."""
        from joulesmith.compress.quantize.walk import walk

        path = self.work / "windows" / f"{self.subject.name}-{seed}-{self.windows}-squares.npz"
        if not path.exists():
            found: dict[str, np.ndarray] = {}

            def emit(_: str, rounded: Any) -> None:
                for r in rounded:
                    if r.ref.layer is not None:
                        found[r.ref.name] = r.moments.squares.numpy()

            windows = self.calibration(seed)
            walk(self.model, windows, lambda _: ["F16"], emit, effort="nearest", seed=seed)
            np.savez(path, **found)
        with np.load(path, allow_pickle=False) as z:
            return {k: z[k] for k in z.files}

    def theirs(self, kind: str, seed: int) -> tuple[dict[str, Any], dict[str, str]]:
        """llama.cpp's file judged, and the type of each matrix in it."""
        from joulesmith.gguf_file import read_gguf

        path = self.work / "theirs.gguf"
        begun = time.monotonic()
        llama_quantize(
            self.library, self.float_file, path, kind, self.importance(seed), self.threads
        )
        seconds = time.monotonic() - begun
        try:
            file = read_gguf(path)
            types = {t.name: t.type for t in file.tensors if len(t.shape) == 2}
            return self._judged(path, types) | {"seconds": seconds}, types
        finally:
            path.unlink(missing_ok=True)

    def ours(
        self, files: Mapping[str, dict[str, str]], effort: str, seed: int
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """file -> its tensors' types: by our rounding, (file, what is found) one after another.

        One walk calibrates for all, and rounds a tensor once for each type.
        """
        from joulesmith.compress.quantize.grids import grid
        from joulesmith.compress.quantize.walk import walk
        from joulesmith.errors import JoulesmithError
        from joulesmith.job.judge import write_choice

        able = {}
        for file, types in files.items():
            missing = set()
            for kind in set(types.values()):
                try:
                    grid(kind)
                except JoulesmithError:
                    missing.add(kind)
            if missing:
                yield file, {"missing": sorted(missing)}
            else:
                able[file] = types
        if not able:
            return
        packed: dict[tuple[str, str], np.ndarray] = {}

        def emit(_: str, rounded: Any) -> None:
            packed.update({(r.ref.name, r.type): r.packed for r in rounded})

        walk(
            self.model,
            self.calibration(seed),
            lambda ref: sorted({t[ref.name] for t in able.values()}),
            emit,
            effort=effort,
            split_head=any("output.weight" in t for t in able.values()) and self.model.tied,
            seed=seed,
        )
        path = self.work / "ours.gguf"
        for file, types in able.items():
            try:
                write_choice(self.model, lambda name, kind: packed[name, kind], types, path)
                yield file, self._judged(path, types)
            finally:
                path.unlink(missing_ok=True)

    def _judged(self, path: Path, types: dict[str, str]) -> dict[str, Any]:
        from joulesmith.gguf_file import read_gguf
        from joulesmith.job.judge import score_file

        stored = {t.name: t for t in read_gguf(path).tensors if len(t.shape) == 2}
        if {n: t.type for n, t in stored.items()} != types:
            raise AssertionError("the file has other types than were asked for")
        q = score_file(self.engine, path, self.reference)
        return {
            "kl": q.kl,
            "perplexity": q.perplexity,
            "reference_perplexity": q.reference_perplexity,
            "bytes": sum(t.nbytes for t in stored.values()),
            "types": dict(Counter(types.values())),
            "origin": self.subject.origin,
            "evaluated_on": self.subject.evaluated_on,
            "calibrated_on": self.subject.calibrated_on,
            "engine": self.engine.version,
        }


def render(lines: list[dict[str, Any]], command: str) -> str:
    """Markdown of all lines."""
    out = [
        f"# GGUF rounding at equal bytes ({date.today()})",
        "",
        f"`{command}`",
        "",
        "KL, nats a token, to the float model, judged on the engine; medians over seeds (least to "
        "most), a seed being another sample of calibration windows. llama.cpp: its own quantizer "
        "with an importance matrix of the same windows. Ours: the same type for each tensor, "
        "hence the same bytes. Ratio: ours / llama.cpp's, of medians; below 1 is better.",
        "",
    ]
    for subject in dict.fromkeys(x["subject"] for x in lines):
        mine = [x for x in lines if x["subject"] == subject]
        judged = [x for x in mine if "kl" in x]
        if not judged:
            continue
        first = judged[0]
        out += [
            f"## {subject}",
            "",
            f"{first['origin']}. Judged on {first['evaluated_on']}; calibrated on "
            f"{first['windows']} windows of {first['calibrated_on']}. {first['engine']}.",
            "",
            "| file | types | bytes of matrices | quantizer | KL | ratio | perplexity | seeds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for kind in dict.fromkeys(x["file"] for x in mine):
            groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
            for x in mine:
                if x["file"] == kind:
                    groups[x["who"]].append(x)
            theirs = [x["kl"] for x in groups.get("llama.cpp", []) if "kl" in x]
            for who, rows in groups.items():
                if "missing" in rows[0]:
                    names = ", ".join(rows[0]["missing"])
                    out.append(f"| {kind} | | | {who} | no rounding for {names} | | | |")
                    continue
                good = [x for x in rows if "kl" in x]
                if not good:
                    out.append(f"| {kind} | | | {who} | {rows[0]['error']} | | | |")
                    continue
                m, low, high = spread([x["kl"] for x in good])
                p = spread([x["perplexity"] for x in good])[0]
                types = ", ".join(f"{k} {n}" for k, n in sorted(good[0]["types"].items()))
                ratio = f"{m / spread(theirs)[0]:.3f}" if theirs and who != "llama.cpp" else ""
                out.append(
                    f"| {kind} | {types} | {good[0]['bytes']:,} | {who} "
                    f"| {m:.4g} ({low:.4g}–{high:.4g}) | {ratio} | {p:.4g} | {len(good)} |"
                )
        out.append("")
    return "\n".join(out)


def main() -> None:
    """Do what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--stories", type=Path, required=True)
    parser.add_argument("--engine-lib", type=Path, required=True)
    parser.add_argument("--subjects", nargs="+", default=["shakespeare"], choices=SUBJECTS)
    parser.add_argument("--files", nargs="+", default=USUAL, choices=FILE_TYPES)
    parser.add_argument("--efforts", nargs="+", default=["default"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantizers_gguf.md"))
    args = parser.parse_args()
    places = Places(
        args.data / "tinyshakespeare.txt",
        args.data / "wikitext2-valid.txt",
        args.data / "wikitext2-raw-test.txt",
        args.stories,
    )
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "gguf.jsonl"
    for name in args.subjects:
        judge: Judge | None = None
        for seed in args.seeds:
            lines = read_lines(path)
            base = {"subject": name, "seed": seed, "windows": args.windows}

            def done(
                who: str, kind: str, lines: list[Any] = lines, base: dict[str, Any] = base
            ) -> bool:
                wanted = base | {"who": who, "file": kind}
                return any(wanted.items() <= x.items() for x in lines)

            def keep(
                who: str, kind: str, found: dict[str, Any], base: dict[str, Any] = base
            ) -> None:
                with path.open("a") as f:
                    f.write(json.dumps(base | {"who": who, "file": kind} | found) + "\n")
                told = found.get("kl", found.get("missing", found.get("error")))
                print(f"{base['subject']} {kind} {who} seed {base['seed']}: {told}", flush=True)

            todo = {
                f"ours:{e}": [k for k in args.files if not done(f"ours:{e}", k)]
                for e in args.efforts
            }
            types = {}
            for kind in args.files:
                if done("llama.cpp", kind) and not any(kind in t for t in todo.values()):
                    continue
                judge = judge or Judge(
                    name, places, args.work, args.windows, args.threads, args.engine_lib
                )
                try:
                    theirs, types[kind] = judge.theirs(kind, seed)
                except RuntimeError as e:
                    theirs = {"error": str(e)}
                if not done("llama.cpp", kind):
                    keep("llama.cpp", kind, theirs)
            for who, kinds in todo.items():
                files = {k: types[k] for k in kinds if k in types}
                if judge is not None and files:
                    for kind, found in judge.ours(files, who.partition(":")[2], seed):
                        keep(who, kind, found)
    shown = f"python -m benchmarks.quantizers.gguf_types --subjects {' '.join(args.subjects)}"
    args.out.write_text(render(read_lines(path), shown))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
