"""The main job on the default model: floors, seeds, and what stands beside the plan.

    python benchmarks/main_job.py --seeds 0 1 2 --keep 0.99 Q4_K_M --eval FILE

Runs `joulesmith optimize smollm2` as a user would, once a (floor, seed), each in a process
of its own, and writes a table of the ratios that matter to benchmarks/results/. Every figure
comes from the runs' own result.json: interleaved rounds on one machine, medians with the
spread of single rounds. Takes about 14 minutes a seed on two cores, and 5 a further floor:
the floors of one seed share windows, references and rounded tensors, which do not depend on
the floor, so only the first floor's wall time and peak memory are those of a whole run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
FLOAT_BYTES = 4  # the float model in memory: float32


def run(keep: str, seed: int, folder: Path, more: list[str], before: Path | None) -> dict[str, Any]:
    """One run of the command, on the working files of the run ``before``; returns its result."""
    if before is not None and not folder.exists():
        folder.mkdir(parents=True)
        (before / "work").rename(folder / "work")
        for name in ("rounds.json", "rounds-torch.json", "plan.gguf"):
            (folder / "work" / name).unlink(missing_ok=True)
    command = [sys.executable, "-m", "joulesmith", "optimize", "smollm2", "--keep", keep]
    command += ["--seed", str(seed), "--out", str(folder), *more]
    begun = time.monotonic()
    kept = {**os.environ, "JOULESMITH_KEEP_WORK": "1"}
    code = subprocess.run(command, check=False, env=kept).returncode
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    result["exit_code"] = code
    result["wall_seconds"] = time.monotonic() - begun
    result["whole"] = before is None
    return result


def by(rows: list[dict[str, Any]], **want: str) -> dict[str, Any] | None:
    """The first row with these values."""
    return next((r for r in rows if all(r[k] == v for k, v in want.items())), None)


def ratio(result: dict[str, Any], baseline: str, phase: str = "workload") -> str:
    """ "1.40 (1.38-1.42; rounds 1.31-1.49)" or a dash."""
    r = by(result["ratios"], baseline=baseline, phase=phase)
    if r is None:
        return "—"
    low, high = r["spread"]
    return f"{r['ratio']:.2f} ({r['low']:.2f}–{r['high']:.2f}; rounds {low:.2f}–{high:.2f})"


def row(result: dict[str, Any], keep: str, seed: int) -> str:
    """One line of the table."""
    plan = by(result["runs"], kind="plan")
    assert plan is not None
    q = plan["quality"]
    guess = by(result["predictions"], phase="workload")
    off = "—" if guess is None else f"{guess['predicted'] / guess['measured'] - 1:+.1%}"
    peak = result["peak_memory"] / (FLOAT_BYTES * result["parameters"])
    cells = [
        keep,
        str(seed),
        result["status"],
        f"{result['keep']:.4f}",
        f"{q['kept']:.4f} (≥ {q['kept_low']:.4f})",
        f"{q['kl']:.4f}",
        ratio(result, "BF16 GGUF"),
        ratio(result, "Q8_0"),
        ratio(result, "Q4_K_M"),
        ratio(result, "torch, bfloat16 eager"),
        off,
        f"{peak:.2f}x" if result["whole"] else "—",
        f"{result['wall_seconds'] / 60:.1f} min" if result["whole"] else "—",
    ]
    return "| " + " | ".join(cells) + " |"


def uniform_rows(result: dict[str, Any]) -> list[str]:
    """Every file that was measured, from one run."""
    out = []
    for r in result["runs"]:
        q = r["quality"]
        joules = r["workload"]["joules"]
        out.append(
            f"| {r['name']} | {r['kind']} | "
            + ("—" if r["file_bytes"] is None else f"{r['file_bytes'] / 1e6:.1f} MB")
            + f" | {1 / r['decode']['seconds']:.0f} | {1 / r['prefill']['seconds']:.0f} | "
            + ("unknown" if joules is None else f"{joules * 1e3:.1f} mJ")
            + " | "
            + ("—" if q is None else f"{q['kept']:.4f} | {q['kl']:.4f}")
            + (" | — |" if q is None else " |")
        )
    return out


def main() -> None:
    """Run all, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--keep", nargs="+", default=["0.99", "Q4_K_M"])
    parser.add_argument("--eval", default=None, help="evaluation text; default: Python's own")
    parser.add_argument("--engine-lib", default=None)
    parser.add_argument("--pairs", default="7")
    parser.add_argument("--out", type=Path, default=Path("joulesmith-out/benchmark"))
    parser.add_argument("--name", default="main_job")
    args = parser.parse_args()
    more = ["--pairs", args.pairs]
    if args.eval:
        more += ["--eval", args.eval]
    if args.engine_lib:
        more += ["--engine-lib", args.engine_lib]
    rows, last = [], None
    for seed in args.seeds:
        before = None
        for keep in args.keep:
            folder = args.out / f"{keep}-{seed}"
            last = run(keep, seed, folder, more, before)
            rows.append(row(last, keep, seed))
            write(args, rows, (keep, seed, uniform_rows(last)), last)
            before = folder
        shutil.rmtree(before / "work", ignore_errors=True)


def write(
    args: argparse.Namespace,
    rows: list[str],
    files: tuple[str, int, list[str]],
    last: dict[str, Any],
) -> None:
    """Write the results so far."""
    command = "python benchmarks/main_job.py " + shlex.join(
        [a if not Path(a).is_absolute() else f"<{Path(a).name}>" for a in sys.argv[1:]]
    )
    head = [
        f"# The main job on SmolLM2-135M-Instruct ({date.today()})",
        "",
        f"`{command}`",
        "",
        f"{last['machine']['cpu']}, {last['machine']['threads']} threads, "
        f"{platform.system()}; {last['engine']}; {last['origin']}.",
        f"Judged on {last['evaluation']}. Joules are {last['runs'][0]['workload']['pedigree']}: "
        "ratios are of interleaved rounds.",
        "Ratios are joules per token of the named file / the plan's, workload "
        f"{last['workload_prefill']}:{last['workload_decode']}; interval 95 %, then the spread "
        "of single rounds.",
        "",
        "| --keep | seed | status | floor | kept (bound) | KL | BF16 GGUF | Q8_0 | Q4_K_M "
        "| torch bf16 | predicted/measured | peak memory / float32 model | wall |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"Files of the last run (--keep {files[0]}, seed {files[1]}):",
        "",
        "| file | kind | size | decode tokens/s | prefill tokens/s | J/token | kept | KL |",
        "|---|---|---|---|---|---|---|---|",
        *files[2],
        "",
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.md").write_text("\n".join(head))


if __name__ == "__main__":
    main()
