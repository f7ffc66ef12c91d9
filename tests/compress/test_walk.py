"""Walking a model: each matrix is rounded under its own layer's moments, in the file's order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from joulesmith import models
from joulesmith.calibrate import calibrate
from joulesmith.compress.quantize.gptq import gptq
from joulesmith.compress.quantize.grids import grid
from joulesmith.compress.quantize.rounding import EFFORTS
from joulesmith.compress.quantize.walk import Rounded, walk
from joulesmith.errors import JoulesmithError
from joulesmith.moments import Moments
from tiny import write_tiny

WINDOWS = np.random.default_rng(0).integers(0, 400, (12, 64)).astype(np.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> models.Model:
    return models.load(write_tiny(tmp_path_factory.mktemp("walk") / "model", steps=5))


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    """Matrices are rounded side by side, however few threads the tests have."""
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(usual)


def walked(model: models.Model, effort: str, kind: str = "INT4-G32") -> dict[str, Rounded]:
    found: dict[str, Rounded] = {}
    order: list[str] = []

    def emit(block: str, rounded: list[Rounded]) -> None:
        order.append(block)
        found.update({r.ref.name: r for r in rounded})

    walk(model, WINDOWS, lambda _: [kind], emit, effort=effort, seed=1)
    assert order == ["1", "0", "ends"]
    return found


@pytest.mark.parametrize("effort", ["fast", "default"])
def test_each_matrix_is_rounded_under_its_own_moments(model: models.Model, effort: str) -> None:
    """The same bytes as rounding one matrix by hand; attention's rows are permuted in the file."""
    seen: dict[str, Moments] = {}
    calibrate(
        model.module,
        WINDOWS,
        lambda i, m: seen.update({f"{i}.{k}": v for k, v in m.items()}),
        seed=1,
        graded=effort == "default",
    )
    found = walked(model, effort)
    for name, module in (
        ("blk.0.attn_q", "0.self_attn.q_proj"),
        ("blk.0.attn_k", "0.self_attn.k_proj"),
        ("blk.1.ffn_down", "1.mlp.down_proj"),
        ("blk.1.ffn_up", "1.mlp.up_proj"),
    ):
        r = found[f"{name}.weight"]
        weight = models.gguf_weight(model, r.ref.name)
        by_hand = gptq(weight, seen[module].hessian, grid("INT4-G32"), sweeps=EFFORTS[effort] or 0)
        assert np.array_equal(r.packed, by_hand)
        assert torch.equal(r.weight, weight)
        assert r.moments is not None and r.moments.sample is not None
        fisher = seen[module].fisher
        assert torch.equal(r.moments.fisher, fisher if r.ref.rows is None else fisher[r.ref.rows])
        torch.testing.assert_close(
            r.change(0, 3),
            torch.as_tensor(grid("INT4-G32").unpack(r.packed[:3], weight.shape[1])) - weight[:3],
        )


def test_efforts_differ_and_feedback_beats_nearest(model: models.Model) -> None:
    name = "blk.1.ffn_down.weight"
    found = {e: walked(model, e, "INT3-G32")[name] for e in ("nearest", "fast", "default")}
    assert len({r.packed.tobytes() for r in found.values()}) == 3
    moments = found["fast"].moments
    assert moments is not None

    def error(r: Rounded) -> float:
        change = r.change(0, len(r.weight))
        return float(((change @ moments.hessian) * change).sum())

    assert error(found["fast"]) < 0.7 * error(found["nearest"])


def test_a_type_that_fits_nothing_is_refused(model: models.Model) -> None:
    with pytest.raises(JoulesmithError, match="no whole number of blocks"):
        walked(model, "fast", "INT4-G128")
