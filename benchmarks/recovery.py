"""Recovery of a shrunk model within a time: how much of the lost perplexity comes back.

    python benchmarks/recovery.py --student DIR --calib FILE --eval FILE --work DIR

``--student`` is a folder that  joulesmith compress smollm2 --shrink ...  wrote. It is trained
against the dense model on ``--calib``, of which the end is held out, for ``--minutes`` of wall
time: the text that it writes (``--own``), the teacher's passes, the timing of a step, held-out
losses and checkpoints count. Judged before and after on ``--eval`` and on other text that the
dense model wrote itself, none of which is trained on. What is done is kept in ``--work``: the
same command goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtrit

from joulesmith import models, text
from joulesmith.atomic import atomic_path
from joulesmith.energy.cpus import identify
from joulesmith.energy.meter import EnergyMeter
from joulesmith.train import lesson
from joulesmith.train.distil import Distil, check_tokenizers
from joulesmith.train.lesson_settings import LessonSettings
from joulesmith.train.outputs import fused, plainly
from joulesmith.train.recover import recover
from joulesmith.train.recover_settings import DistilSettings, RecoverSettings
from joulesmith.train.scores import HeldOut, scores
from joulesmith.train.settings import TrainSettings
from joulesmith.train.teacher import TopK, cache_top

Nll = NDArray[np.float64]
"""Mean nats a token of each window."""
OWN_SEED = 2_000_003
"""Of the text that the dense model writes to train on, which is another."""
DRAWS = 10_000
"""Of the bootstrap."""
SAMPLES_SEED = 1_000_003
"""Of the text that the dense model writes; no training draws with it."""
RESERVE = 0.03
"""Share of the time that is kept back for steps that are slower than those that were timed."""


class Clock:
    """Seconds of wall time that the recovery has taken, over all starts of this command; what a
    kill loses is less than the step under way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before = json.loads(path.read_text()) if path.is_file() else 0.0
        self.begun = time.monotonic()

    @property
    def seconds(self) -> float:
        """In all."""
        return float(self.before + time.monotonic() - self.begun)

    def keep(self, _: float = 0.0) -> None:
        """On disk; serves as a `Tick`."""
        with atomic_path(self.path) as part:
            part.write_text(json.dumps(self.seconds))


def interval(x: Nll) -> tuple[float, float]:
    """Mean, and half of Student's 95 % interval over windows."""
    return float(x.mean()), float(stdtrit(len(x) - 1, 0.975) * x.std(ddof=1) / math.sqrt(len(x)))


def recovered(dense: Nll, before: Nll, after: Nll) -> dict[str, list[float]]:
    """Share of the gap to the dense model that came back, in nats and in perplexity: [found, low,
    high], 95 % by a bootstrap of windows, which are the same ones for all three models."""
    at = np.random.default_rng(0).integers(0, len(dense), (DRAWS, len(dense)))

    def both(d: Any, b: Any, a: Any) -> dict[str, Any]:
        return {
            "nats": (b - a) / (b - d),
            "ppl": (np.exp(b) - np.exp(a)) / (np.exp(b) - np.exp(d)),
        }

    found = both(dense.mean(), before.mean(), after.mean())
    drawn = both(*(x[at].mean(1) for x in (dense, before, after)))
    return {
        k: [float(found[k]), *(float(q) for q in np.quantile(drawn[k], [0.025, 0.975]))]
        for k in found
    }


def training_text(
    model: models.Model, source: text.Text, length: int, cuts: int, held: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Windows to train on and those held out, int32 (n, length). The end of the text is held out;
    the rest is cut ``cuts`` times, each time elsewhere."""
    tokenizer = model.tokenizer
    bos = tokenizer.bos if tokenizer.add_bos else None
    ids = np.asarray(tokenizer.encode(source.text), np.int32)
    body = length - (bos is not None)
    rest, end = np.split(ids, [len(ids) - held * body])

    def cut(part: NDArray[np.int32]) -> NDArray[np.int32]:
        return text.split(source, part, length, {"all": len(part) // body}, bos=bos)["all"].tokens

    return np.concatenate([cut(rest[i * body // cuts :]) for i in range(cuts)]), cut(end)


def kept(path: Path, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """The array at ``path``, made where it is not there."""
    if not path.is_file():
        found = make()
        with atomic_path(path) as part, part.open("wb") as f:
            np.save(f, found)
    loaded: NDArray[Any] = np.load(path, allow_pickle=False)
    return loaded


def settings(args: argparse.Namespace) -> LessonSettings:
    """All that is asked of the training but its steps."""
    rate = args.rate or (1e-3 if args.mode == "lora" else 3e-4)
    precision: Any = args.precision or lesson.native_precision()
    return LessonSettings(
        train=TrainSettings(
            steps=1, batch=args.batch, micro=args.micro, optimizer=args.optimizer, rate=rate,
            warmup=args.warmup, final=args.final, decay=args.decay, seed=args.seed,
            precision=precision,
        ),
        distil=DistilSettings(hard=args.hard, soft=args.soft, hidden=args.hidden),
        how=RecoverSettings(mode=args.mode, rank=args.rank, alpha=2 * args.rank, seed=args.seed),
        cache=0 if args.live else args.top,
    )  # fmt: skip


def run(
    args: argparse.Namespace,
    teacher: models.Model,
    student: models.Model,
    windows: NDArray[np.int32],
    held: NDArray[np.int32],
    folder: Path,
) -> dict[str, Any]:
    """Recover ``student`` in the time; what it took."""
    s, limit, clock = settings(args), 60 * args.minutes, Clock(folder / "seconds.json")
    vocab = check_tokenizers(student.tokenizer, teacher.tokenizer)
    plan_path, loss = folder / "plan.json", HeldOut(held)

    def judge(module: torch.nn.Module) -> float:
        with plainly():
            return loss(module)

    with EnergyMeter() as meter, ExitStack() as stack:
        if args.own:
            seed, path = OWN_SEED + args.seed, folder / "own.npy"
            fresh = not path.is_file()
            with meter.window("samples") as window:
                drawn = kept(
                    path, lambda: text.self_samples(teacher, args.own, args.length, seed).tokens
                )
            windows = np.concatenate([windows, drawn])
            clock.keep()
            if fresh:
                (folder / "drawn.json").write_text(json.dumps(window.reading.joules))
            print(f"{clock.seconds:.0f} s, {args.own} windows drawn: {window.reading.joules} J")
        if args.fused:
            stack.enter_context(fused(student.module))
        cache: TopK | None = None
        asking = folder / "teacher.json"
        if s.cache:
            fresh = not (folder / "teacher").exists()  # joules of a killed start are lost
            with meter.window("teacher") as window:
                cache = cache_top(
                    teacher.module, windows, s.cache, folder / "teacher", vocab=vocab,
                    precision=s.train.precision, progress=clock.keep,
                )  # fmt: skip
            if not asking.is_file():
                asking.write_text(
                    json.dumps([clock.seconds, window.reading.joules if fresh else None])
                )
        asked = teacher.module if s.asks else None
        if not plan_path.is_file():
            begun = time.monotonic()
            judge(student.module)
            judging = time.monotonic() - begun
            objective = Distil(s.distil, teacher=asked, cache=cache, vocab=vocab)
            step, _ = lesson.trial(s, student.module, windows, objective, meter, None)
            begun = time.monotonic()
            saving = _saving(student, folder)
            # one held-out loss at the start, one at the end, and those between
            aside = (args.points + 2) * judging + (limit / args.save + 2) * saving
            left = limit * (1 - RESERVE) - clock.seconds - aside
            clock.keep()
            if left < step:
                raise SystemExit(f"{args.minutes} minutes are over before the first step")
            plan = {
                "steps": int(left / step), "step_seconds": step, "judge_seconds": judging,
                "save_seconds": saving, "left": left,
            }  # fmt: skip
            with atomic_path(plan_path) as part:
                part.write_text(json.dumps(plan))
        plan = json.loads(plan_path.read_text())
        steps = plan["steps"]
        train = s.train.model_copy(
            update={
                "steps": steps,
                "every": max(1, steps // (args.points + 1)),
                "budget_seconds": plan["left"],
            }
        )
        print(f"{steps} steps of {plan['step_seconds']:.2f} s", flush=True)
        found = recover(
            student.module, windows, train, s.how, s.distil, teacher=asked, cache=cache,
            vocab=vocab, folder=folder / "checkpoints", judge=judge, meter=meter,
            points=folder / "curve.jsonl", progress=clock.keep, save_seconds=args.save,
            tell=lambda line: print(f"{clock.seconds:5.0f} s, {line}", flush=True),
        ).trained  # fmt: skip
    clock.keep()
    asked_for = json.loads(asking.read_text()) if s.cache else (0.0, 0.0)
    own_path = folder / "drawn.json"  # not there where a start was killed between the two
    own = json.loads(own_path.read_text()) if own_path.is_file() else None
    tail = max(1, len(found.losses) // 20)
    return {
        **plan,
        "planned": steps,
        "steps": found.steps,
        "teacher_seconds": asked_for[0],
        "teacher_joules": asked_for[1],
        "own_joules": own,
        "seconds": clock.seconds,
        "windows": len(windows),
        "tokens": found.steps * args.batch * (args.length - 1),
        "losses": [float(np.mean(found.losses[:tail])), float(np.mean(found.losses[-tail:]))],
        "curve": [x for _, x in found.curve],
        "joules": [found.joules, found.low, found.high, found.pedigree],
        "notes": list(found.notes),
    }


def _saving(student: models.Model, folder: Path) -> float:
    """Seconds of writing a checkpoint: three times the weights, as Adam's state is twice them."""
    begun = time.monotonic()
    path = folder / "timed.part"
    for _ in range(3):
        with path.open("wb") as f:
            for p in student.module.parameters():
                f.write(p.detach().numpy().tobytes())
            f.flush()
            os.fsync(f.fileno())
    path.unlink()
    return time.monotonic() - begun


def main() -> None:
    """Judge, recover, judge again, write the table."""
    args = arguments()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    told = json.dumps(
        [vars(args)[k] for k in sorted(vars(args)) if k not in ("work", "out", "calib", "eval")],
        default=str,
    )
    folder = args.work / f"{args.mode}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
    folder.mkdir(exist_ok=True)
    teacher, student = models.load(args.teacher), models.load(args.student)
    length, count = args.length, args.judged
    windows, held = training_text(
        teacher, text.read(args.calib), length, args.cuts, args.held * 256 // length
    )
    if args.most:
        windows = windows[: args.most]

    if args.trial:  # settings are chosen by the held-out end of the training text alone
        found = run(args, teacher, student, windows, held, folder)
        print(json.dumps(found))
        return

    texts = {
        **{
            Path(f).name: text.windows(teacher, text.read(f), args.judged_length,
                {"judged": count})["judged"].tokens
            for f in args.eval
        },
        "self-sampled": kept(
            args.work / f"samples-{count}-{args.judged_length}.npy",
            lambda: text.self_samples(teacher, count, args.judged_length, SAMPLES_SEED).tokens,
        ),
    }  # fmt: skip

    def judged(model: models.Model, where: Path, name: str) -> dict[str, Nll]:
        return {
            t: kept(where / f"{name}-{t}-{count}-{args.judged_length}.npy",
                    lambda w=w: scores(model.module, w))  # type: ignore[misc]
            for t, w in texts.items()
        }  # fmt: skip

    told = hashlib.sha256(str(args.student.resolve()).encode()).hexdigest()[:8]
    dense = judged(teacher, args.work, "dense")
    before = judged(student, args.work, f"shrunk-{told}")
    for t in texts:
        print(f"{t}: {math.exp(dense[t].mean()):.2f} became {math.exp(before[t].mean()):.2f}")
    result_path = folder / "result.json"
    if not result_path.is_file():
        found = run(args, teacher, student, windows, held, folder)
        after = judged(student, folder, "recovered")
        found |= {
            "left": student.parameters / teacher.parameters,
            "parameters": student.parameters,
            "origin": teacher.origin,
            "load": os.getloadavg()[2],
            "command": command(),
            "date": str(date.today()),
            "judged": {
                t: {
                    "nll": [interval(x[t]) for x in (dense, before, after)],
                    "change": interval(after[t] - before[t]),
                    "share": recovered(dense[t], before[t], after[t]),
                }
                for t in texts
            },
            "args": {k: str(v) for k, v in vars(args).items() if not isinstance(v, Path)},
        }
        with atomic_path(result_path) as part:
            part.write_text(json.dumps(found, indent=1))
        if args.save_student:
            models.save(student, folder / "recovered")
    lines = table(json.loads(result_path.read_text()), args)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n")
    print(args.out.read_text())


def command() -> str:
    """As it was given, with names in the place of folders."""
    return "python benchmarks/recovery.py " + shlex.join(
        [f"<{Path(a).name}>" if "/" in a else a for a in sys.argv[1:]]
    )


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--calib", required=True, help="text to train on")
    parser.add_argument("--eval", required=True, nargs="+", help="texts to judge on")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/recovery.md")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=("full", "lora"), default="full")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--judged", type=int, default=128, help="windows of each text")
    parser.add_argument("--judged-length", type=int, default=256)
    parser.add_argument("--held", type=int, default=24, help="windows of 256 tokens")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--cuts", type=int, default=1, help="times that the text is cut, shifted")
    parser.add_argument("--most", type=int, default=0, help="windows to train on at most; 0 all")
    parser.add_argument(
        "--own", type=int, default=0, help="windows that the dense model writes too"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--rate", type=float, default=0, help="0: 3e-4, of lora 1e-3")
    parser.add_argument("--warmup", type=float, default=0.05)
    parser.add_argument("--final", type=float, default=0.02)
    parser.add_argument("--decay", type=float, default=0.0)
    parser.add_argument("--precision", choices=("float32", "bfloat16"))
    parser.add_argument("--hard", type=float, default=0.0)
    parser.add_argument("--soft", type=float, default=1.0)
    parser.add_argument("--hidden", type=float, default=0.0)
    parser.add_argument("--top", type=int, default=64, help="likeliest tokens kept a position")
    parser.add_argument("--live", action="store_true", help="ask the teacher in every step")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--trial", action="store_true", help="held-out losses only; no judgement")
    parser.add_argument("--fused", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--points", type=int, default=6, help="held-out losses on the way")
    parser.add_argument("--save", type=float, default=300, help="seconds between checkpoints")
    parser.add_argument("--save-student", action="store_true")
    args = parser.parse_args()
    if args.judged < 64:
        parser.error("--judged: 64 windows at least, for intervals that mean something")
    if len({Path(f).name for f in args.eval}) < len(args.eval):
        parser.error("--eval: files of one name: give each a name of its own")
    if args.hidden:
        args.live = True
    return args


def table(r: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """The result as Markdown."""
    joules, low, high, pedigree = r["joules"]
    a = r["args"]
    teacher_joules, own_joules = r["teacher_joules"], r["own_joules"]
    over = r["seconds"] - 60 * args.minutes
    within = "within" if over <= 0 else f"**{over:.0f} s beyond**"
    source = "the teacher in every step"
    if a["live"] == "False":
        source = (
            f"a cache of the teacher's {a['top']} likeliest tokens, {r['teacher_seconds']:.0f} s"
        )
    labels = f", {a['hard']} of the text's own loss" if float(a["hard"]) else ""
    lines = [
        f"# Recovery in {args.minutes:g} minutes ({r['date']})",
        "",
        f"`{r['command']}`",
        "",
        f"{r['origin']}, of which {r['left']:.1%} of the parameters are left "
        f"({r['parameters']}) in the student {args.student.name}. {identify().name}, "
        f"{args.threads} threads, {platform.system()}, load {r['load']:.1f}; "
        f"torch {torch.__version__}.",
        f"Trained on {Path(args.calib).name} ({r['windows']} windows of {a['length']} tokens; its "
        f"end, {a['held']} windows of 256, held out; {a['own']} of the windows are text that the "
        f"dense model wrote within the time), mode {a['mode']}, seed {a['seed']}, "
        f"{source}{labels}; {r['steps']} steps ({r['planned']} were planned) of {a['batch']} "
        f"windows, **{r['tokens']} tokens seen**.",
        f"Wall time **{r['seconds']:.0f} s**, {within} the limit of {60 * args.minutes:.0f} s, "
        "with the teacher's passes, the timing of steps, held-out losses and checkpoints. The two "
        "judgements below are outside of it.",
        _energy(joules, low, high, pedigree, teacher_joules, own_joules, a),
        f"Loss of the steps {r['losses'][0]:.4f} (first twentieth), {r['losses'][1]:.4f} (last); "
        "held-out cross-entropy in nats a token on the way: "
        + ", ".join(f"{x:.4f}" for x in r["curve"])
        + ".",
        "",
        f"Judged on {a['judged']} windows of {a['judged_length']} tokens of each text, float32. "
        "Nats a token ± half of the 95 % t interval over windows; perplexities; share of the gap "
        f"that came back, with its 95 % interval by a bootstrap of windows ({DRAWS} draws).",
        "",
        "| text | dense | shrunk | recovered | after less before | perplexities "
        "| of the gap in nats | of the gap in perplexity |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, j in r["judged"].items():
        nll = [f"{m:.4f} ± {h:.4f}" for m, h in j["nll"]]
        ppl = [f"{math.exp(m):.2f}" for m, _ in j["nll"]]
        share = [f"**{m:.3f}** ({x:.3f}–{y:.3f})" for m, x, y in j["share"].values()]
        change = f"{j['change'][0]:.4f} ± {j['change'][1]:.4f}"
        lines.append(
            f"| {name} | {' | '.join(nll)} | {change} | {', '.join(ppl)} | {' | '.join(share)} |"
        )
    return lines


def _energy(
    joules: float | None,
    low: float | None,
    high: float | None,
    pedigree: str | None,
    teacher: float | None,
    own: float | None,
    a: dict[str, str],
) -> str:
    if joules is None:
        return "Joules: unknown."
    interval_ = "" if low is None or high is None else f" ({low:.0f}–{high:.0f}, 90 %)"
    first = ""
    if a["live"] == "False":
        first = "unknown" if teacher is None else f"{teacher:.0f} J"
        first = f"; the cache before them {first}"
    if a["own"] != "0":
        first += f", drawing {a['own']} windows " + ("unknown" if own is None else f"{own:.0f} J")
    return (
        f"Joules ({pedigree}): {joules:.0f} J{interval_} of the steps and checkpoints{first}; "
        "held-out losses and judgements apart."
    )


if __name__ == "__main__":
    main()
