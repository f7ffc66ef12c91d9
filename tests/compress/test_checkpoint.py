"""What is kept is read back exactly, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from joulesmith.compress import checkpoint
from joulesmith.compress.checkpoint import Checkpoint, digest
from joulesmith.errors import JoulesmithError

VALUE = {"a": [0.1, float("inf"), 1 / 3], "b": None}
TENSORS = {
    "float": torch.randn(3, 4), "turned": torch.randn(3, 4).T, "half": torch.randn(5).bfloat16(),
    "whole": torch.arange(4), "none": torch.zeros(0, 2),
}  # fmt: skip


def test_what_was_put_is_got(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "later"
    files = Checkpoint(folder, "job", 1)
    assert files.get("x") is None and files.get_tensors("x") is None
    assert not folder.parent.exists()
    files.put("x", VALUE)
    files.put_tensors("x", VALUE, TENSORS)
    files.put_tensors("empty", [], {})
    again = Checkpoint(folder, "job", 1)
    assert again.get("x") == VALUE and again.get_tensors("empty") == ([], {})
    found = again.get_tensors("x")
    assert found is not None and found[0] == VALUE
    assert all(
        torch.equal(found[1][n], t) and found[1][n].dtype == t.dtype for n, t in TENSORS.items()
    )
    assert Checkpoint(folder, "job", 2).get("x") is None
    assert Checkpoint(folder, "job", 2).get_tensors("x") is None


def test_another_version_is_another_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Checkpoint(tmp_path, "job").put("x", VALUE)
    monkeypatch.setattr(checkpoint, "__version__", "0.0.0")
    assert Checkpoint(tmp_path, "job").get("x") is None


@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_every_damage_is_seen(tmp_path: Path, kind: str) -> None:
    files = Checkpoint(tmp_path, "job")
    files.put("x", VALUE)
    files.put_tensors("x", VALUE, {"w": torch.ones(4)})
    path = tmp_path / f"x.{kind}"
    get = files.get if kind == "json" else files.get_tensors
    raw = path.read_bytes()
    broken = [b"", b"{}", b"[]", b"null", b"x" * len(raw), raw + b"x"]
    broken += [raw[:n] for n in range(0, len(raw), 7)]
    for at in range(0, len(raw), 3):
        broken.append(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    for bad in broken:
        path.write_bytes(bad)
        found = get("x")
        if found is not None:  # white space and names that nothing reads
            value = found if kind == "json" else found[0]
            assert value == VALUE
            assert kind == "json" or torch.equal(found[1]["w"], torch.ones(4))


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Checkpoint(tmp_path, "job")
    files.put_tensors("x", 1, {"w": torch.ones(4)})
    monkeypatch.setattr("joulesmith.atomic.free_bytes", lambda _: 15)
    with pytest.raises(JoulesmithError, match="not enough disk space") as e:
        files.put_tensors("x", 2, {"w": torch.zeros(4)})
    assert "\n" not in str(e.value)
    found = files.get_tensors("x")
    assert found is not None and found[0] == 1, "the old one stays"


def test_no_folder_keeps_nothing() -> None:
    files = Checkpoint(None, "job")
    files.put("x", 1)
    files.put_tensors("x", 1, {})
    assert files.get("x") is None and files.get_tensors("x") is None


def test_digest_tells_everything_apart() -> None:
    def module(bias: float = 0.0, act: nn.Module | None = None) -> nn.Module:
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(2, 2), act or nn.ReLU(), nn.BatchNorm1d(2))
        made[0].bias.data.fill_(bias)
        return made

    moved = module()
    moved[2].running_mean.add_(1)
    values = [
        None, 1, 1.0, "1", [1], [[1]], (1, 2), {"a": 1}, {"b": 1}, np.arange(3), np.arange(3.0),
        torch.zeros(2), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int32),
        torch.tensor([0.0, 1e-30]), module(), module(1e-9), module(act=nn.GELU()), moved,
    ]  # fmt: skip
    assert len({digest(v) for v in values}) == len(values)
    assert digest(1, 2) != digest([1, 2])
    assert digest(module()) == digest(module())
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(np.arange(3)) == digest(torch.arange(3))
