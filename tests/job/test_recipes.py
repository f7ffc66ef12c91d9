"""One recipe, every format: applied, judged, written, and applied again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from runner import Run

from joulesmith.compress.quantize.grids import grid
from joulesmith.compress.recipe import read_recipe
from joulesmith.engines import get_engine
from joulesmith.errors import JoulesmithError
from joulesmith.export.gguf_packed import stored_type, to_blocks
from joulesmith.gguf_file import read_gguf
from joulesmith.job.quantize import Made, quantize
from joulesmith.models import gguf_weight, load
from joulesmith.progress import Progress
from joulesmith.text import english, read

QUIET = Progress({}, stream=open("/dev/null", "w"))  # noqa: SIM115


def recipe(path: Path, *steps: str, calibration: str = "") -> Path:
    lines = ["joulesmith_recipe: 1", calibration, "steps:", *(f"- {{{s}}}" for s in steps)]
    path.write_text("\n".join(lines) + "\n")
    return path


def made(model: Path, out: Path, form: str, given: Path | None = None, **more: object) -> Made:
    kind = more.pop("kind", None)
    return quantize(str(model), kind, out, recipe=given, form=form, progress=QUIET, **more)  # type: ignore[arg-type]


def test_a_gguf_is_judged_in_llama_cpp(tiny: Path, tmp_path: Path, joulesmith: Run) -> None:
    pytest.importorskip("xllamacpp")
    out, page = tmp_path / "m.gguf", tmp_path / "map.html"
    words = ("quantize", tiny, "--type", "Q4_K", "--out", out)
    done = joulesmith(*words, "--map", page, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["format"] == "gguf" and "llama.cpp" in found["engine"]
    assert found["engine_quality"]["kept"] > 0.97
    assert abs(found["engine_quality"]["kl"] - found["quality"]["kl"]) < 0.01
    assert any("no whole Q4_K blocks of 256: Q5_0" in n for n in found["notes"])
    assert "<svg" in page.read_text()
    file = read_gguf(out)
    assert {t.type for t in file.tensors if t.name.startswith("blk.") and len(t.shape) > 1} == {
        "Q5_0"
    }
    assert file.by_name["token_embd.weight"].type == "Q8_0"  # Q6_K falls back
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "m.recipe.yaml", "map.html"]
    # The same recipe on the same model: the same bytes, recipe included.
    again = tmp_path / "again.gguf"
    done = joulesmith("quantize", tiny, "--recipe", tmp_path / "m.recipe.yaml", "--out", again)
    assert done.returncode == 0, done.stderr
    assert again.read_bytes() == out.read_bytes()
    assert (tmp_path / "again.recipe.yaml").read_bytes() == (
        tmp_path / "m.recipe.yaml"
    ).read_bytes()
    for word in ("in llama.cpp", "no whole Q4_K blocks", "the same again"):
        assert word in " ".join(done.stdout.split())


MIXED = (
    "step: awq, type: INT4-G32",
    'step: quantize, types: {"blk.*.ffn_down.weight": INT8-G32, blk.1.attn_v.weight: null, '
    "blk.1.attn_k.weight: F16}, default: INT4-G32, tune_epochs: 1",
)


def test_one_recipe_has_the_same_weights_in_every_format(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    given = recipe(tmp_path / "r.yaml", *MIXED)
    a = made(tiny, tmp_path / "a.gguf", "gguf", given)
    b = made(tiny, tmp_path / "b", "compressed-tensors", given)
    assert a.types == b.types and a.types["blk.0.ffn_down.weight"] == "INT8-G32"
    assert "blk.1.attn_v.weight" not in a.types and "token_embd.weight" not in a.types
    file = read_gguf(tmp_path / "a.gguf")
    types = {t.name: t.type for t in file.tensors if len(t.shape) > 1}
    assert types["blk.0.ffn_down.weight"] == "Q8_0" and types["blk.0.ffn_up.weight"] == "Q4_0"
    assert types["blk.1.attn_v.weight"] == types["blk.1.attn_k.weight"] == "F16"
    assert a.engine_quality is not None
    assert abs(a.engine_quality.kl - a.quality.kl) < 0.3 * a.quality.kl + 0.002
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    folder = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    model = load(tmp_path / "a.gguf")
    ids = torch.arange(40)[None] * 7 % 400
    with torch.no_grad():
        assert torch.allclose(folder(ids).logits, model.module(ids).logits, atol=2e-3)


def test_embedding_and_head_and_every_gguf_type(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    given = recipe(
        tmp_path / "r.yaml",
        "step: quantize, effort: nearest, types: {output.weight: Q5_0, token_embd.weight: Q8_0, "
        "blk.0.attn_q.weight: Q4_0, blk.0.attn_k.weight: Q4_1, blk.0.attn_v.weight: Q5_0, "
        "blk.0.attn_output.weight: Q5_1, blk.0.ffn_up.weight: IQ4_NL, blk.0.ffn_gate.weight: "
        "MXFP4, blk.0.ffn_down.weight: BF16, blk.1.attn_q.weight: F32, blk.1.ffn_up.weight: Q3_K}",
    )
    found = made(tiny, tmp_path / "m.gguf", "gguf", given)
    types = {t.name: t.type for t in read_gguf(tmp_path / "m.gguf").tensors}
    assert types["output.weight"] == "Q5_0" and types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.ffn_gate.weight"] == "MXFP4" and types["blk.1.attn_q.weight"] == "F32"
    assert types["blk.1.ffn_up.weight"] == "IQ4_NL" and len(found.notes) == 1
    assert found.engine_quality is not None and found.engine_quality.kept > 0.9


def test_a_tied_head_of_more_bits_is_the_embedding(tiny: Path, tmp_path: Path) -> None:
    given = recipe(
        tmp_path / "r.yaml",
        "step: quantize, effort: nearest, types: {output.weight: Q8_0, token_embd.weight: Q4_0}",
    )
    made(tiny, tmp_path / "m.gguf", "gguf", given)
    types = {t.name: t.type for t in read_gguf(tmp_path / "m.gguf").tensors}
    assert "output.weight" not in types and types["token_embd.weight"] == "Q8_0"


def test_a_rotated_model_and_a_head_of_its_own(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    given = recipe(
        tmp_path / "r.yaml",
        "step: rotate",
        'step: quantize, effort: nearest, types: {"output*": INT8-G32}, default: INT8-G32',
    )
    found = made(tiny, tmp_path / "f", "compressed-tensors", given)
    assert found.types["output.weight"] == "INT8-G32"
    folder = AutoModelForCausalLM.from_pretrained(tmp_path / "f", dtype=torch.float32)
    exact = load(tiny).module
    ids = torch.arange(40)[None] * 7 % 400
    with torch.no_grad():
        a, b = folder(ids).logits.log_softmax(-1), exact(ids).logits.log_softmax(-1)
    assert float((b.exp() * (b - a)).sum(-1).mean()) < 0.01
    from joulesmith.engines.packed_folder import load_packed

    ours = load_packed(tmp_path / "f", dtype=torch.float32).module
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, folder(ids).logits, atol=2e-3)


def test_the_same_recipe_in_onnx_and_openvino(tiny: Path, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    ov = pytest.importorskip("openvino")
    given = recipe(
        tmp_path / "r.yaml",
        "step: rotate",
        "step: quantize, effort: nearest, types: {output.weight: INT8-G32}, default: INT4-G32",
    )
    made(tiny, tmp_path / "m.gguf", "gguf", given)
    model = load(tmp_path / "m.gguf")
    ids = (np.arange(40)[None] * 7 % 400).astype(np.int64)
    with torch.no_grad():
        wanted = model.module(torch.from_numpy(ids)).logits.numpy()
    config = model.module.config
    past = np.zeros((1, config.num_key_value_heads, 0, 16), np.float32)
    feed = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(40)[None],
    }
    feed |= {f"past_key_values.{i}.{p}": past for i in range(2) for p in ("key", "value")}
    made(tiny, tmp_path / "onnx", "onnx", given)
    session = ort.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    assert np.abs(session.run(["logits"], feed)[0] - wanted).max() < 2e-3
    made(tiny, tmp_path / "ov", "openvino", given)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    graph = ov.Core().compile_model(str(tmp_path / "ov" / "openvino_model.xml"), "CPU", settings)
    assert np.abs(graph(feed)["logits"] - wanted).max() < 2e-3
    for name in ("onnx", "ov"):
        assert read_recipe(tmp_path / name / "recipe.yaml").steps == read_recipe(given).steps


def test_rounded_inputs_from_a_recipe_are_those_of_the_type(tiny: Path, tmp_path: Path) -> None:
    one = made(tiny, tmp_path / "a", "compressed-tensors", kind="W8A8")
    two = made(tiny, tmp_path / "b", "compressed-tensors", tmp_path / "a" / "recipe.yaml")
    assert one.inputs == two.inputs and "a scale by token" in str(one.inputs)
    for name in ("model.safetensors", "config.json", "recipe.yaml"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    given = recipe(
        tmp_path / "r.yaml",
        "step: quantize, default: INT8-ROW, effort: nearest",
        "step: round-inputs",
    )
    three = made(tiny, tmp_path / "c", "compressed-tensors", given)
    assert three.quality.kl < 0.01 and three.types["blk.0.ffn_down.weight"] == "INT8-G96"


@pytest.mark.parametrize(
    ("form", "steps", "match"),
    [
        ("onnx", "step: quantize, default: Q4_K", "blk.0.attn_q.weight is Q5_0, which onnx cannot"),
        ("gguf", "step: quantize, default: INT4-G32-ZP", "is INT4-G32-ZP, which gguf cannot hold"),
        ("gguf", "step: quantize, default: W8A8", "with rounded inputs, which gguf cannot hold"),
        ("openvino", "step: quantize, default: FP8", "which openvino cannot hold"),
        ("compressed-tensors", "step: quantize, default: INT3-G32", "4 or 8 bits"),
        ("compressed-tensors", 'step: quantize, types: {"*": INT8-G32}', "keep the embedding"),
        ("gguf", "step: lowrank, parameters: 0.8", "kept: false"),
        ("gguf", "step: quantize, types: {blk.9.x: Q8_0}", "no matrix 'blk.9.x'"),
        ("gguf", "step: quantize", "quantizes nothing"),
        ("compressed-tensors", "step: quantize, default: F16", "nothing is quantized"),
        ("gguf", "step: quantize, default: Q9_9", "unknown tensor type"),
        ("gguf", "step: polish", "unknown step .polish.*known are absorb, awq"),
        ("gguf", "step: quantize, defualt: Q4_0", "no setting 'defualt'"),
        ("gguf", "step: awq", "step 1: type is missing"),
        ("gguf", "step: lowrank, kept: false", "step 1: give parameters, energy or ranks"),
        ("gguf", "step: awq, type: Q9_9", "unknown tensor type"),
        ("gguf", "step: awq, type: F16", "no scales to protect"),
        ("gguf", "step: lowrank, ranks: {model.nope: 3}, kept: false", "no linear layer"),
        ("gguf", "step: quantize, default: [Q4_0", "not YAML: .*line 4, column"),
        ("compressed-tensors", "step: round-inputs", "rounded inputs but no quantized weights"),
    ],
)
def test_what_cannot_be_is_refused_before_work(
    tiny: Path, tmp_path: Path, form: str, steps: str, match: str
) -> None:
    if form in ("onnx", "openvino"):
        pytest.importorskip(form)
    given = recipe(tmp_path / "r.yaml", steps)
    out = tmp_path / ("m.gguf" if form == "gguf" else "m")
    with pytest.raises(JoulesmithError, match=match):
        made(tiny, out, form, given)
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("calibration: {clib: my.txt}", "unknown key 'clib'"),
        ("extra: 1", "unknown key 'extra'"),
        ("steps: []", "no steps"),
    ],
)
def test_what_a_recipe_has_beside_steps(tiny: Path, tmp_path: Path, text: str, match: str) -> None:
    steps = "" if text.startswith("steps") else "\nsteps: [{step: quantize, default: Q8_0}]"
    given = tmp_path / "r.yaml"
    given.write_text(f"joulesmith_recipe: 1\n{text}{steps}\n")
    with pytest.raises(JoulesmithError, match=match):
        made(tiny, tmp_path / "m.gguf", "gguf", given)
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


def test_a_recipe_knows_its_text(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "c.txt"
    text.write_text(english().text[:60000])
    plan = recipe(
        tmp_path / "r.yaml",
        "step: quantize, default: Q8_0, effort: nearest",
        calibration=f"calibration: {{calib: {text}, sha256: {'0' * 64}}}",
    )
    with pytest.raises(JoulesmithError, match="not the text that the recipe was made with"):
        made(tiny, tmp_path / "m.gguf", "gguf", plan)
    made(tiny, tmp_path / "m.gguf", "gguf", plan, calib=str(text))
    again = read_recipe(tmp_path / "m.recipe.yaml")
    assert again.calibration["sha256"] == read(str(text)).sha256
    made(tiny, tmp_path / "n.gguf", "gguf", tmp_path / "m.recipe.yaml")


def test_steps_in_an_order_that_loses_work(tiny: Path, tmp_path: Path) -> None:
    quantized = "step: quantize, default: Q8_0"
    for steps, match in (
        ((quantized, "step: rotate"), "put it before quantize"),
        ((quantized, quantized), "quantized by two steps"),
        (("step: kv-cache, bits: 8", "step: kv-cache, bits: 4", quantized), "cache a second time"),
    ):
        with pytest.raises(JoulesmithError, match=match):
            made(tiny, tmp_path / "m.gguf", "gguf", recipe(tmp_path / "r.yaml", *steps))


def test_a_recipe_says_it_all(tiny: Path, tmp_path: Path) -> None:
    given = recipe(tmp_path / "r.yaml", "step: quantize, default: Q8_0")
    with pytest.raises(JoulesmithError, match="says it all"):
        made(tiny, tmp_path / "m.gguf", "gguf", given, kind="Q4_0")
    lost = recipe(
        tmp_path / "l.yaml",
        "step: quantize, default: Q8_0",
        calibration="calibration: {calib: x.txt}",
    )
    with pytest.raises(JoulesmithError, match="on which the recipe calibrates: give --calib"):
        made(tiny, tmp_path / "m.gguf", "gguf", lost)
    odd = recipe(
        tmp_path / "o.yaml", "step: quantize, default: Q8_0", calibration="calibration: {seed: x}"
    )
    with pytest.raises(JoulesmithError, match="no whole number"):
        made(tiny, tmp_path / "m.gguf", "gguf", odd)
    for windows in ("[64]", "3", "[1000000, 256]", "[64, 128]", "[true, 256]"):
        odd = recipe(
            tmp_path / "o.yaml",
            "step: quantize, default: Q8_0",
            calibration=f"calibration: {{windows: {windows}}}",
        )
        with pytest.raises(JoulesmithError, match="windows is not"):
            made(tiny, tmp_path / "m.gguf", "gguf", odd)


def test_hostile_recipes(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for text, match in (
        ("[1, 2", "not YAML"),
        ("joulesmith_recipe: 2", "not a joulesmith recipe"),
        ("joulesmith_recipe: 1\nsteps: 3", "must be a list"),
        ("joulesmith_recipe: 1\nsteps: [3]", "needs a name"),
        ("joulesmith_recipe: 1\nsteps: []\ncalibration: [1]", "calibration must be a table"),
        ("!!python/object/apply:os.system ['false']", "not YAML"),
        ("a: &a [x, x]\nb: &b [*a, *a]\n", "anchors"),
        ("# " + "x" * (1 << 21), "absurdly large"),
    ):
        path.write_text(text)
        with pytest.raises(JoulesmithError, match=match):
            read_recipe(path)


@pytest.mark.parametrize("name", ["INT4-G32", "INT4-G64", "INT5-G32", "INT8-G64", "INT8-G128"])
def test_integers_become_blocks_of_the_same_values(name: str) -> None:
    w = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    g = grid(name)
    packed = g.pack(w)
    kind, blocks = to_blocks(name, packed, 128)
    assert kind == stored_type(name)
    assert np.array_equal(grid(kind).unpack(blocks, 128), g.unpack(packed, 128))
    gguf = pytest.importorskip("gguf")
    back = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(back, g.unpack(packed, 128))


def test_what_has_no_block_type() -> None:
    for name in ("INT4-G16", "INT4-G32-ZP", "INT3-G32", "INT2-G64", "TERNARY-G64", "NF4-G64"):
        assert stored_type(name) is None
        with pytest.raises(JoulesmithError, match="GGUF has no type"):
            to_blocks(name, np.zeros((1, 4), np.uint8), 64)


def test_the_engine_reads_what_torch_judged(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    made(tiny, tmp_path / "m.gguf", "gguf", kind="Q8_0", effort="nearest")
    back = load(tmp_path / "m.gguf")
    ids = (np.arange(60) * 7 % 400).astype(np.int32)
    with get_engine("llama.cpp").load(tmp_path / "m.gguf", context=64) as session:
        theirs = session.logits(ids)
    with torch.no_grad():
        ours = back.module(torch.from_numpy(ids).long()[None]).logits[0].numpy()
    assert np.abs(theirs - ours).max() < 0.05 * np.abs(ours).max()
    assert gguf_weight(back, "blk.0.attn_q.weight").shape == (64, 64)


@pytest.mark.parametrize("form", ["gguf", "compressed-tensors"])
def test_factors_beside_a_quantized_base(tiny: Path, tmp_path: Path, form: str) -> None:
    pytest.importorskip("xllamacpp" if form == "gguf" else "peft")
    out = tmp_path / ("m.gguf" if form == "gguf" else "m")
    plain = recipe(tmp_path / "p.yaml", "step: quantize, default: INT4-G32")
    given = recipe(
        tmp_path / "r.yaml",
        "step: quantize, types: {token_embd.weight: F16}",
        'step: absorb, default: INT4-G32, rank: 8, ranks: {"blk.*.ffn_down.weight": 3}',
    )
    base = made(tiny, tmp_path / out.name.replace("m", "base"), form, plain)
    found = made(tiny, out, form, given)
    assert found.quality.kl < 0.8 * base.quality.kl
    assert any("factors take up the error of 14 matrices" in n for n in found.notes)
    ids = torch.arange(40)[None] * 7 % 400
    if form == "gguf":
        assert found.adapter == str(tmp_path / "m.lora.gguf")
        assert found.engine_quality is not None
        assert found.engine_quality.kl < 0.8 * base.quality.kl, "judged with the adapter"
        parts = read_gguf(tmp_path / "m.lora.gguf").by_name
        assert parts["blk.0.ffn_down.weight.lora_a"].shape == (3, 96)
        return
    import peft
    from transformers import AutoModelForCausalLM

    folder = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    exact = load(tiny).module
    with torch.no_grad():
        alone, wanted = folder(ids).logits, exact(ids).logits
        with_factors = peft.PeftModel.from_pretrained(folder, out / "adapter")(ids).logits
    assert float((with_factors - wanted).square().mean()) < 0.8 * float(
        (alone - wanted).square().mean()
    )


def test_absorb_is_refused_where_no_engine_adds_factors(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    for form, steps, match in (
        ("onnx", "step: absorb, default: INT4-G32", "onnx has no place"),
        ("gguf", "step: absorb, types: {blk.0.attn_q.weight: Q4_0}", "every matrix"),
        ("gguf", 'step: absorb, types: {"*": Q4_0}', "a step quantize"),
        ("gguf", "step: absorb, default: Q4_0, ranks: {x: 3}", "no matrix 'x'"),
    ):
        out = tmp_path / ("m.gguf" if form == "gguf" else "m")
        with pytest.raises(JoulesmithError, match=match):
            made(tiny, out, form, recipe(tmp_path / "r.yaml", steps))
