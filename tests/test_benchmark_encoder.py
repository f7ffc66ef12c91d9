"""The encoder's benchmark: its text, its score and the bound of what is kept."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import encoder

TEXT = """
 = A lobster =

 It lives in cold water , near the coast . It was seen 3 @,@ 000 times in that one year . U. S. ships caught it ( and ate it ) too .
 Too short .

 = = Its life = =

 One sentence that has enough words to stay . Another sentence that has enough words too . A third one that has <unk> in it .
 = A lamp =

 It gives light to all who sit below . It is older than the house it hangs in . Nobody knows how old the house is .
"""


def test_paragraphs_are_cut_into_sentences(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text(TEXT)
    found = encoder.paragraphs(path)
    assert [p.article for p in found] == [1, 1, 2]
    assert found[0].sentences == [
        "It lives in cold water, near the coast.",
        "It was seen 3,000 times in that one year.",
        "U. S. ships caught it (and ate it) too.",
    ]
    assert "[UNK]" in found[1].sentences[2]
    task = encoder.inverse_cloze(found)
    for q, d, p in zip(task.queries, task.documents, found, strict=True):
        assert q in p.sentences and q not in d
        assert len(q) + len(d) + 1 == len(" ".join(p.sentences))


def test_gains_are_those_of_the_rank() -> None:
    queries = np.eye(12, dtype=np.float32)
    documents = np.eye(12, dtype=np.float32)
    assert encoder.gains(queries, documents).tolist() == [1.0] * 12
    documents[:3, 3] = 2  # three others are nearer to the fourth query
    assert encoder.gains(queries, documents)[3] == 1 / math.log2(5)
    documents[:11, 11] = 2  # rank 12
    assert encoder.gains(queries, documents)[11] == 0
    assert encoder.gains(queries, np.ones((12, 12), np.float32)).sum() == 0  # ties count against


def test_the_bound_is_below_what_is_kept() -> None:
    rng = np.random.default_rng(0)
    dense = rng.random(600)
    articles = np.repeat(np.arange(60), 10)
    assert encoder.kept_low(dense, dense, articles) == 1
    now = dense * 0.95 + 0.02 * rng.standard_normal(600)
    low = encoder.kept_low(dense, now, articles)
    assert 0.94 < low < now.mean() / dense.mean()


def test_rows_name_what_is_done() -> None:
    names = [r.name for r in encoder.rows(["admm"], [0.5])]
    assert names == ["dense", "int8", "50 % admm", "50 % admm, int8"]
