"""What `inspect` tells: figures of each format, and joules that are never 0 for unknown."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from joulesmith.engines.matmul import MatmulCell, MatmulCost
from joulesmith.errors import JoulesmithError
from joulesmith.formats.files import StoredTensor
from joulesmith.formats.packed import logical
from joulesmith.inspection import inspect_model
from joulesmith.job.cost import decode_cost
from joulesmith.report.model_tables import render_inspection
from tiny import write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"), steps=0)


def test_formats_agree_on_the_model(folder: Path, tmp_path: Path) -> None:
    from joulesmith.export.gguf import write_float_gguf
    from joulesmith.models import load

    model = load(folder)
    write_float_gguf(model, tmp_path / "m.gguf", "F32")
    whole, gguf = inspect_model(folder), inspect_model(tmp_path / "m.gguf")
    alone = inspect_model(folder / "model.safetensors")
    for key in ("architecture", "parameters", "layers", "hidden", "heads", "kv_heads", "context",
                "vocabulary", "tied_head", "bits_per_weight"):  # fmt: skip
        assert getattr(whole, key) == getattr(gguf, key) == getattr(alone, key), key
    assert whole.parameters == model.parameters
    places = {(t.layer, t.role) for t in whole.tensors if t.layer is not None and len(t.shape) == 2}
    assert places == {
        (t.layer, t.role) for t in gguf.tensors if t.layer is not None and len(t.shape) == 2
    }


@pytest.mark.parametrize("kind", ["INT4-G32", "INT8-G32", "INT4-G32-ZP"])
def test_packed_folders_count_scales_and_the_models_own_weights(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    from joulesmith.compress.quantize.grids import grid
    from joulesmith.export.compressed_tensors import write_compressed
    from joulesmith.models import gguf_weight, load

    model = load(folder)
    packed = {
        r.name: (kind, grid(kind).pack(gguf_weight(model, r.name)))
        for r in model.matrices() if r.layer is not None
    }  # fmt: skip
    size = write_compressed(model, packed, tmp_path / "out")
    found = inspect_model(tmp_path / "out")
    assert found.parameters == model.parameters
    assert found.format.endswith("compressed-tensors")
    assert sum(t.bytes for t in found.types) == size
    row = {t.type: t for t in found.types}[kind]
    shapes = 16 * row.tensors  # two int64 each
    assert row.tensors == len(packed)
    assert row.bytes - shapes == pytest.approx(
        row.weights * grid(kind).bits_per_weight / 8, rel=0.03
    )
    lines = {t.name: t for t in found.tensors}
    for name in packed:
        ref = model.ref(name)
        assert (lines[ref.parameter].shape, lines[ref.parameter].layer) == (ref.shape, ref.layer)


def stored(name: str, kind: str, *shape: int) -> StoredTensor:
    bits = {"I32": 32, "F16": 16, "U8": 8, "F8_E4M3": 8, "F32": 32, "I8": 8, "BF16": 16}[kind]
    n = math.prod(shape) * bits // 8
    return StoredTensor(name, tuple(shape), kind, bits, Path("x"), 0, n)


@pytest.mark.parametrize(
    ("parts", "settings", "want"),
    [
        ([("a.qweight", "I32", 8, 64), ("a.scales", "F16", 2, 64), ("a.qzeros", "I32", 2, 8),
          ("a.g_idx", "I32", 64)], {"bits": 4, "quant_method": "gptq"}, ("GPTQ INT4-G32", (64, 64))),
        ([("a.qweight", "I32", 64, 8), ("a.scales", "F16", 2, 64), ("a.qzeros", "I32", 2, 8)],
         {"bits": 4, "quant_method": "awq"}, ("AWQ INT4-G32", (64, 64))),
        ([("a.weight", "F8_E4M3", 64, 64), ("a.weight_scale", "F32", 64, 1)], {},
         ("F8_E4M3-channel", (64, 64))),
        ([("a.weight", "F8_E4M3", 64, 64), ("a.weight_scale_inv", "F32", 1, 1)], {},
         ("F8_E4M3-blocks", (64, 64))),
        ([("a.weight", "I8", 64, 64), ("a.weight_scale", "F32", 1)], {}, ("INT8-tensor", (64, 64))),
        ([("a.weight_packed", "U8", 64, 32), ("a.weight_scale", "F8_E4M3", 64, 4),
          ("a.weight_global_scale", "F32", 1)], {}, ("FP4-G16", (64, 64))),
        ([("a_blocks", "U8", 64, 2, 16), ("a_scales", "U8", 64, 2)], {}, ("MXFP4", (64, 64))),
        ([("a.weight", "U8", 2048, 1), ("a.weight.absmax", "U8", 64),
          ("a.weight.quant_state.bitsandbytes__nf4", "U8", 9)], {}, ("bitsandbytes NF4", (4096,))),
    ],
)  # fmt: skip
def test_packings_of_others(parts: Any, settings: Any, want: tuple[str, tuple[int, ...]]) -> None:
    tensors = [stored(*p) for p in [*parts, ("b.bias", "BF16", 5)]]
    first, bias = logical(tensors, settings)
    assert (first.type, first.shape, first.weights) == (*want, 4096)
    assert first.nbytes == sum(t.nbytes for t in tensors[:-1])
    assert (bias.type, bias.weights) == ("BF16", 5)


def test_packed_codes_that_do_not_fit_their_shape_are_refused() -> None:
    for parts in (
        [("a.weight_packed", "I32", 4)],
        [("a.weight_packed", "F16", 4, 4)],
        [("a.qweight", "I32", 4)],
    ):
        with pytest.raises(JoulesmithError, match="damaged tensor"):
            logical([stored(*p) for p in parts], {"bits": 4})


class FakeEngine:
    """Multiplies in no time: a cell's joules are its weights in nanojoules."""

    name, version, threads = "fake", "fake 1", 1

    def __init__(self, joules: bool = True) -> None:
        self.joules = joules

    def matmul_table(self, cells: list[MatmulCell], *, batches: Any, **_: Any) -> list[MatmulCost]:
        def cost(c: MatmulCell, b: int) -> MatmulCost:
            n = c.rows * c.columns * b * 1e-9
            if not self.joules:
                return MatmulCost(c, b, n, None, None, None, None)
            return MatmulCost(c, b, n / 10, n, n / 2, n * 2, "modelled")

        return [cost(c, b) for c in cells for b in batches]


def test_joules_of_a_token_are_those_of_its_matrices(folder: Path, tmp_path: Path) -> None:
    found = inspect_model(folder)
    cost = decode_cost(found, engine=FakeEngine(), cache_dir=tmp_path)
    matrices = sum(np.prod(t.shape) for t in found.tensors if len(t.shape) == 2)
    assert cost.joules == pytest.approx(1e-9 * matrices)  # the tied embedding is the head
    assert (cost.low, cost.high) == pytest.approx((0.5e-9 * matrices, 2e-9 * matrices))
    assert cost.pedigree == "modelled" and "fake 1" in cost.how
    text = shown(found, cost)
    assert "predicted" in text and "modelled" in text and "come on top" in text


def test_unknown_joules_are_none_with_the_reason(folder: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    found = inspect_model(folder)
    assert found.cost is None
    cost = decode_cost(found, engine=FakeEngine(joules=False), cache_dir=tmp_path / "a")
    assert cost.joules is None and cost.seconds is not None
    assert "unknown (no counter" in shown(found, cost)
    packed = replace(found, tensors=tuple(replace(t, type="INT4-G64") for t in found.tensors))
    cost = decode_cost(packed, engine=FakeEngine(), cache_dir=tmp_path / "b")
    assert (cost.joules, cost.seconds) == (None, None) and "does not run INT4-G64" in cost.how
    assert "unknown: llama.cpp" in shown(found, cost)
    huge = replace(found, tensors=tuple(replace(t, shape=(1 << 40, 2)) for t in found.tensors))
    assert "too large" in decode_cost(huge, engine=FakeEngine(), cache_dir=tmp_path).how
    assert decode_cost(replace(found, tensors=()), engine=FakeEngine()).joules is None


def shown(found: Any, cost: Any = None, **options: bool) -> str:
    from dataclasses import replace

    page = io.StringIO()
    render_inspection(replace(found, cost=cost), Console(file=page, width=200), **options)
    return page.getvalue()


def test_names_from_files_do_not_drive_the_terminal(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"\x1b[2J[red]x": np.zeros(4, np.float32)}, tmp_path / "m.safetensors")
    (tmp_path / "config.json").write_text(
        '{"model_type": "\x1b[31m[bold]"}'.replace("\x1b", "\\u001b")
    )
    text = shown(inspect_model(tmp_path), every_tensor=True, heat_map=True)
    assert "\x1b" not in text and "[red]x" in text and "[bold]" in text


def test_the_map_of_bits(folder: Path) -> None:
    text = shown(inspect_model(folder), heat_map=True)
    assert text.count("32.00") >= 14 and "bits per weight" in text


def test_the_command_is_light_and_speaks_json(folder: Path) -> None:
    code = (
        "import sys\n"
        "from joulesmith.cli import app\n"
        f"try: app(['inspect', '--json', {str(folder)!r}])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "assert not {'torch', 'transformers', 'scipy', 'onnx', 'rich.console'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["format"] == "Hugging Face folder (safetensors)" and told["cost"] is None
    assert {t["layer"] for t in told["tensors"]} == {None, 0, 1}
