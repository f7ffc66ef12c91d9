"""``result.json``: the same back, whole or not at all, one line when it is not there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from joulesmith.errors import JoulesmithError
from joulesmith.report import load_result, write_json
from joulesmith.report.result import Result


def test_round_trip(passed: Result, none: Result, tmp_path: Path) -> None:
    for i, result in enumerate((passed, none)):
        path = tmp_path / str(i) / "result.json"
        write_json(result, path)
        assert load_result(path.parent) == result
        assert load_result(path) == result
        assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_not_finite_comes_back(passed: Result, tmp_path: Path) -> None:
    run = passed.runs[0]
    assert run.quality
    bad = run.quality.model_copy(update={"perplexity": math.inf, "kept": 0.0, "kl": math.nan})
    odd = passed.model_copy(update={"runs": (run.model_copy(update={"quality": bad}),)})
    path = tmp_path / "result.json"
    write_json(odd, path)
    json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"not JSON: {c}"))
    quality = load_result(tmp_path).runs[0].quality
    assert quality and quality.perplexity == math.inf and math.isnan(quality.kl)


def test_a_failed_write_leaves_the_old_file(
    passed: Result, none: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    write_json(passed, path)
    whole = Path.write_bytes

    def cut(self: Path, data: bytes) -> int:
        whole(self, data[: len(data) // 2])
        raise OSError(28, "No space left on device", str(self))

    def stop(self: Path, data: bytes) -> int:
        whole(self, data[:100])
        raise KeyboardInterrupt

    for fault, error in ((cut, JoulesmithError), (stop, KeyboardInterrupt)):
        monkeypatch.setattr(Path, "write_bytes", fault)
        with pytest.raises(error):
            write_json(none, path)
        monkeypatch.undo()
        assert load_result(tmp_path) == passed
        assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_one_line_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(JoulesmithError, match="no such run folder"):
        load_result(tmp_path / "absent")
    with pytest.raises(JoulesmithError, match="same command again"):
        load_result(tmp_path)
    (tmp_path / "result.json").write_text('{"schema_version": 1, "mod')
    with pytest.raises(JoulesmithError, match="not a joulesmith result") as caught:
        load_result(tmp_path)
    assert "\n" not in str(caught.value)
