"""The devices' table: figures within physical bounds, names found, users' files read or refused."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.errors import JoulesmithError
from joulesmith.estimate import rows
from joulesmith.estimate.devices import (
    FALLBACKS,
    Device,
    all_devices,
    find,
    generations,
    load,
    memory_kinds,
    normalise,
)

ROOT = Path(__file__).parents[2]
DEVICES = all_devices()
ACCELERATORS = [d for d in DEVICES if d.kind in ("gpu", "tpu")]

# GB/s: of the devices that carry each kind of memory, from one channel up to a full package.
BANDWIDTHS = {
    "HBM2": (400, 1700), "HBM2e": (800, 3800), "HBM3": (1600, 5400), "HBM3e": (4800, 8200),
    "GDDR6": (290, 1000), "GDDR6X": (700, 1100), "GDDR7": (400, 1850),
    "DDR4": (100, 210), "DDR5": (300, 620),
    "LPDDR4": (10, 60), "LPDDR4X": (15, 140), "LPDDR5": (60, 820), "LPDDR5X": (60, 600),
}  # fmt: skip
# Most 16-bit matrix operations of an architecture for each fp32 one of its table column; twice
# that is a sparse rate.
SIXTEEN_PER_FP32 = {
    "Volta": 8, "Turing": 8, "Ampere": 16, "Ampere GA10x": 4, "Ada Lovelace": 4, "Hopper": 15,
    "Blackwell": 31.5, "Blackwell GB20x": 4, "CDNA": 4, "CDNA 2": 4, "CDNA 3": 8, "CDNA 4": 16,
    "RDNA 3": 2, "Xavier": 8, "Orin": 8.1, "NeuronCore v2": 4, "NeuronCore v3": 4,
}  # fmt: skip
# GB/s in one direction: what the standards give 16 lanes, and what NVLink gives a GPU.
LINKS = {
    "PCIe 3.0 x16": 15.75, "PCIe 4.0 x16": 31.5, "PCIe 5.0 x16": 63.0,
    "NVLink 1": 80, "NVLink 2": 150, "NVLink 3": 300, "NVLink 4": 450, "NVLink 5": 900,
}  # fmt: skip


def _ids(device: Device) -> str:
    return normalise(device.name)


@pytest.mark.parametrize("device", DEVICES, ids=_ids)
def test_every_row_says_what_it_is_and_whence(device: Device) -> None:
    assert device.kind and device.vendor and device.source
    assert device.generation in generations()
    assert device.memory_kind in memory_kinds()
    assert device.year is not None and 2015 < device.year < 2027
    assert device.bandwidth_gb_s is not None
    assert device.memory_gib is not None or device.kind == "cpu"
    assert (device.tdp_w is None) == (device.tdp_covers == "")
    assert (device.idle_w is None) == (device.idle_basis == "")
    assert (device.link_gb_s is None) == (device.link_kind == "")
    assert "idle_w" not in device.unconfirmed or device.idle_basis == "assumed"
    assert not [c for c in device.unconfirmed if getattr(device, c) in (None, "")]
    assert any(device.peak(p) for p in ("bf16", "int8"))


@pytest.mark.parametrize("device", DEVICES, ids=_ids)
def test_narrower_formats_are_no_slower(device: Device) -> None:
    sixteen = [r for r in (device.fp16_tflops, device.bf16_tflops) if r]
    for rate in (device.int8_tops, device.fp8_tflops, device.fp4_tflops):
        assert not sixteen or rate is None or max(sixteen) <= rate <= 9 * max(sixteen)
    if device.tf32_tflops and device.fp32_tflops:
        assert device.fp32_tflops <= device.tf32_tflops <= min(sixteen)
    if device.fp4_tflops and device.fp8_tflops:
        assert device.fp8_tflops < device.fp4_tflops


@pytest.mark.parametrize("device", DEVICES, ids=_ids)
def test_no_rate_is_sparse(device: Device) -> None:
    most = SIXTEEN_PER_FP32.get(device.generation)
    rate, fp32 = device.peak("bf16"), device.peak("fp32")
    if most and rate and fp32:
        assert rate <= 1.02 * most * fp32
        assert (device.int8_tops or 0) * 1e12 <= 4.1 * rate
        assert (device.fp8_tflops or 0) * 1e12 <= 2.1 * rate


@pytest.mark.parametrize("device", DEVICES, ids=_ids)
def test_power_is_of_its_year(device: Device) -> None:
    """A sparse rate taken for a dense one halves the energy of an operation: too good for
    its year on the data centre's cards. The floor halves every four years."""
    peak = device.peak("bf16")
    if device.tdp_w is None or peak is None:
        return
    picojoules = 1e12 * device.tdp_w / peak
    assert device.year is not None
    if device in ACCELERATORS:
        assert 0.26 * 2 ** ((2025 - device.year) / 4) <= picojoules <= 20
    else:
        assert 0.5 <= picojoules <= 130
    if device.idle_w is not None:
        assert 0.02 <= device.idle_w / device.tdp_w <= 0.5


@pytest.mark.parametrize("device", DEVICES, ids=_ids)
def test_memory_and_links_are_of_their_kind(device: Device) -> None:
    low, high = BANDWIDTHS[device.memory_kind]
    assert device.bandwidth_gb_s is not None and low <= device.bandwidth_gb_s <= high
    if device.memory_bytes and device.bandwidth:
        assert 0.005 < device.memory_bytes / device.bandwidth < 0.8  # seconds to read it all
    if device.link_kind in LINKS and device.name not in ("A800 SXM 80GB", "H800 SXM 80GB"):
        assert device.link_gb_s == LINKS[device.link_kind]
    if device.link_gb_s is not None and device.kind == "gpu":
        assert device.link_gb_s < device.bandwidth_gb_s / 2


@pytest.mark.parametrize(
    ("name", "tdp", "precision", "tera", "gib", "gb_s"),
    [  # as the vendors' documents give them, dense
        ("V100", 300, "fp16", 125, 32, 900),
        ("A100", 400, "bf16", 312, 80, 2039),
        ("A100 PCIe", 250, "int8", 624, 40, 1555),
        ("H100 SXM", 700, "fp8", 1978.9, 80, 3350),
        ("H100 PCIe", 350, "bf16", 756, 80, 2039),
        ("H100 NVL", 400, "bf16", 835.5, 94, 3938),
        ("H200", 700, "bf16", 989.4, 141, 4800),
        ("B200", 1000, "fp4", 9000, 180, 7700),
        ("GB200", 1200, "bf16", 2500, 186, 8000),
        ("MI250X", 560, "bf16", 383, 128, 3277),
        ("MI300X", 750, "fp8", 2614.9, 192, 5300),
        ("T4", 70, "int8", 130, 16, 320),
        ("L40S", 350, "fp8", 733, 48, 864),
        ("RTX 3090", 350, "bf16", 71, 24, 936),
        ("RTX 4090", 450, "fp16", 165.2, 24, 1008),
        ("RTX 5090", 575, "fp16", 209.5, 32, 1792),
        ("TPU v4", 192, "int8", 275, 32, 1200),
        ("TPU v5p", None, "bf16", 459, 95, 2765),
        ("Gaudi 3", 900, "bf16", 1835, 128, 3700),
        ("Trainium2", None, "fp8", 1299, 96, 2900),
    ],
)
def test_figures_of_the_documents(
    name: str, tdp: float | None, precision: str, tera: float, gib: float, gb_s: float
) -> None:
    device = find(name)
    assert device.tdp_w == tdp
    assert device.peak(precision) == pytest.approx(tera * 1e12)
    assert device.memory_bytes == gib * 2**30
    assert device.bandwidth == gb_s * 1e9


def test_cpu_peaks_are_cores_times_clock_times_operations() -> None:
    assert find("epyc 7742").peak("fp32") == pytest.approx(64 * 2.25e9 * 2 * 8 * 2, rel=0.01)
    amx = find("Xeon 8480+")
    assert amx.peak("bf16") == pytest.approx(56 * 2.0e9 * 1024, rel=0.01)
    assert amx.peak("int8") == pytest.approx(56 * 2.0e9 * 2048, rel=0.01)
    for device in (d for d in DEVICES if d.kind == "cpu"):
        spelt = re.search(r"(\d+) cores x ([\d.]+) GHz \(.*\) x (\d+) fp32", device.note)
        assert spelt is not None
        cores, ghz, ops = (float(g) for g in spelt.groups())
        assert device.fp32_tflops == pytest.approx(cores * ghz * ops / 1e3, abs=0.006)


def test_no_name_is_given_twice() -> None:
    seen: dict[str, str] = {}
    for device in DEVICES:
        for key in {normalise(n) for n in (device.name, *device.aliases)}:
            assert seen.setdefault(key, device.name) == device.name
            assert find(key) is device


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("h100", "H100 SXM 80GB"),
        ("a100-80gb", "A100 SXM 80GB"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 SXM 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("Tesla V100-SXM2-16GB", "V100 SXM2 16GB"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("AMD EPYC 7763 64-Core Processor", "EPYC 7763"),
        ("Intel(R) Xeon(R) Platinum 8280 CPU @ 2.70GHz", "Xeon Platinum 8280"),
        ("m1 max", "Apple M1 Max"),
        ("tpu_v5e", "TPU v5e"),
    ],
)
def test_finds_what_people_and_drivers_write(written: str, name: str) -> None:
    assert find(written).name == name


@pytest.mark.parametrize(
    ("written", "near"),
    [
        ("h10O", "H100 SXM 80GB"),
        ("xeon", "Xeon Platinum 8480+"),
        ("", "P100"),
        ("x" * 9999, "A100"),
    ],
)
def test_unknown_device_names_the_nearest_in_one_line(written: str, near: str) -> None:
    with pytest.raises(JoulesmithError) as e:
        find(written)
    assert near in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 400


@given(st.text(max_size=60))
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once


@given(
    st.sampled_from([n for d in DEVICES for n in (d.name, *d.aliases)]),
    st.lists(st.sampled_from([" ", "-", "_", ".", "/", "™", "  "]), min_size=1, max_size=40),
    st.booleans(),
)
def test_case_and_punctuation_do_not_matter(name: str, marks: list[str], upper: bool) -> None:
    text = "".join(c + marks[i % len(marks)] for i, c in enumerate(name.replace("+", "")))
    text = text.upper() if upper else text.lower()
    assert find(text) is find(name)


# ---- precisions


def test_a_precision_without_units_runs_in_the_next_wider_one() -> None:
    a100, v100, tpu, b200 = find("a100"), find("v100"), find("tpu v5e"), find("b200")
    assert a100.runs_as("fp8") == "bf16" and a100.peak("fp8") == 312e12
    assert a100.runs_as("int4") == "bf16" and a100.runs_as("int8") == "int8"
    assert v100.runs_as("bfloat16") == "fp16" and v100.peak("int8") == 125e12
    assert v100.runs_as("tf32") == "fp32"
    assert tpu.runs_as("fp16") == "bf16" and tpu.runs_as("fp8") == "bf16"
    assert tpu.peak("fp32") is None and tpu.runs_as("fp32") is None
    assert b200.runs_as("nvfp4") == "fp4" and find("h100").runs_as("fp4") == "fp8"
    assert find("epyc 7742").runs_as("int8") == "fp32"
    assert find("alveo u280").peak("fp16") is None


@given(st.sampled_from(DEVICES), st.sampled_from(sorted(FALLBACKS)))
def test_a_stand_in_never_falls_back_further(device: Device, precision: str) -> None:
    used = device.runs_as(precision)
    if used is None:
        assert device.peak(precision) is None
    else:
        assert device.runs_as(used) == used
        assert device.peak(used) == device.peak(precision)


def test_unknown_precision_is_told() -> None:
    with pytest.raises(JoulesmithError, match=r"unknown precision 'fp3'.*fp32"):
        find("h100").peak("fp3")


# ---- priors


def test_priors_are_ordered_and_cover_the_table() -> None:
    for kind in memory_kinds().values():
        low, mid, high = kind.low_pj_per_byte, kind.pj_per_byte, kind.high_pj_per_byte
        assert low is not None and mid is not None and high is not None
        assert 0 < low <= mid <= high < 300
    assert memory_kinds()["HBM2"].pj_per_byte == pytest.approx(3.92 * 8, rel=0.02)
    for generation in generations().values():
        assert generation.node_nm is not None and 2 < generation.node_nm <= 28
        of_it = [d.year for d in DEVICES if d.generation == generation.generation and d.year]
        assert generation.year is not None
        assert not of_it or generation.year <= min(of_it)


# ---- users' files


def _write(folder: Path, text: str | bytes) -> Path:
    path = folder / "ours.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_users_file_round_trip(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        "\ufeffname,aliases,kind,tdp_w,bf16_tflops,memory_gib,idle_basis,year\n"
        '"Acme, NPU",npu1; npu-one ,tpu,12.5,1.5e1,8,,2025\n\n',
    )
    (device,) = load(path)
    assert device == Device(
        "Acme, NPU",
        aliases=("npu1", "npu-one"),
        kind="tpu",
        tdp_w=12.5,
        bf16_tflops=15,
        memory_gib=8,
        year=2025,
        source=str(path),
    )
    assert find("NPU ONE", path) == device
    assert find("h100", path) is find("h100")
    assert len(all_devices(path)) == len(DEVICES) + 1


def test_like_takes_the_cells_left_empty_from_another(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        "name,like,tdp_w,price_usd_per_hour\n"
        "h100 sxm 80gb,H100,,2.1\n"
        "Our H100,h100 sxm,450,\n"
        "Our other H100,our h100,,9\n",
    )
    shipped, ours = find("h100"), find("our h100", path)
    assert find("h100", path).price_usd_per_hour == 2.1 == ours.price_usd_per_hour
    assert find("h100", path).bandwidth == shipped.bandwidth
    assert ours.tdp_w == 450 and ours.aliases == () and ours.peak("fp8") == shipped.peak("fp8")
    assert str(path) in ours.source and shipped.source in ours.source
    assert find("our other h100", path).tdp_w == 450
    assert shipped.price_usd_per_hour is None  # the shipped table is as it was
    assert len(all_devices(path)) == len(DEVICES) + 2


def test_a_row_of_a_shipped_name_takes_its_place(tmp_path: Path) -> None:
    path = _write(tmp_path, "name,tdp_w\nT4,60\n")
    assert find("tesla t4", path) == Device("T4", ("Tesla T4",), tdp_w=60, source=str(path))


def test_what_is_given_anew_is_no_longer_unconfirmed(tmp_path: Path) -> None:
    path = _write(tmp_path, "name,like,idle_w,idle_basis\nA40,A40,31,measured\n")
    assert "idle_w" in find("a40").unconfirmed and not find("a40").confirmed("idle_w")
    assert find("a40", path).confirmed("idle_w")
    assert not find("tpu v5p").confirmed("tdp_w")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "empty"),
        ("\n\n", "empty"),
        ("tdp_w\n5\n", "line 1: no column 'name'"),
        ("name,tdp\nx,5\n", "line 1: unknown column 'tdp': did you mean tdp_w"),
        ("name,zzzz\nx,5\n", "unknown column 'zzzz': columns: name"),
        ("name,name\nx,y\n", "column name stands there twice"),
        ("name,tdp_w\nx,350 W\n", "line 2, tdp_w: must be a number above 0 without a unit"),
        ("name,tdp_w\nx,nan\n", "line 2, tdp_w: must be a number"),
        ("name,tdp_w\nx,inf\n", "tdp_w: must be a number"),
        ("name,tdp_w\nx,-3\n", "tdp_w: must be a number"),
        ("name,tdp_w\nx,0\n", "empty when unknown"),
        ("name,tdp_w\nx,1e99\n", "tdp_w: must be a number"),
        ("name,tdp_w\nx,1_000\n", "tdp_w: must be a number"),
        ("name,tdp_w\nx," + "9" * 5000 + "\n", "tdp_w: text must be one line of at most"),
        ("name,year\nx,24\n", "line 2, year: must be a year"),
        ("name,kind\nx,toaster\n", "line 2, kind: 'toaster' is none of gpu"),
        ("name,tdp_covers\nx,all\n", "tdp_covers: 'all' is none of"),
        ("name,idle_basis\nx,felt\n", "idle_basis: 'felt' is none of measured"),
        ("name,unconfirmed\nx,watts\n", "unconfirmed: no column 'watts'"),
        ("name,tdp_w,idle_w\nx,10,20\n", "idle_w: 20 W idle is more than tdp_w, 10 W"),
        ("name,like\nx,h10O\n", "line 2, like: unknown device 'h10O': did you mean H100"),
        ("name,tdp_w\n,5\n", "line 2, name: empty"),
        ("name\n+++\n", "'+++' has neither a letter nor a digit"),
        ("name,aliases\nx,a\ny,A-\n", "line 3: 'A-' is a name of"),
        ("name\nx,5\n", "line 2: 2 cells, the header has 1"),
        ('name\n"x\n', "not CSV"),
        ('name\n"x\ny"\n', "name: text must be one line"),
        (b"name\n\xff\n", "not a text file"),
        (b"name\nx\0y\n", "line"),
        ("name\n" + "".join(f"x{i}\n" for i in range(rows.MAX_ROWS + 1)), "more than 5000 rows"),
        ("name\n" + "x" * rows.MAX_BYTES, "too large"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_in_one_line(tmp_path: Path, text: str | bytes, told: str) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(JoulesmithError) as e:
        load(path)
    message = str(e.value)
    assert told in message and str(path) in message
    assert "\n" not in message and len(message) < len(str(path)) + 700


def test_files_that_are_none_are_told(tmp_path: Path) -> None:
    with pytest.raises(JoulesmithError, match=r"cannot read: .*absent\.csv"):
        load(tmp_path / "absent.csv")
    with pytest.raises(JoulesmithError, match="not a file"):
        load(tmp_path)
    with pytest.raises(JoulesmithError, match="cannot read"):
        load("a\0b")


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = _write(tmp_path_factory.getbasetemp(), b"name,tdp_w,year\n" + data)
    try:
        for device in load(path):
            assert device.name and (device.tdp_w is None or 0 < device.tdp_w < 1e13)
    except JoulesmithError as e:
        assert "\n" not in str(e)


# ---- the package


def test_tables_are_in_the_package() -> None:
    folder = resources.files("joulesmith.estimate")
    config = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^joulesmith = \[.*"estimate/\*\.csv".*\]$', config, re.M)
    for file in ("devices.csv", "generations.csv", "memory_kinds.csv"):
        assert (folder / file).is_file()


def test_docs_name_every_column_and_their_example_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
    for column in ("tdp_covers", "idle_basis", "memory_kind", "link_gb_s", "unconfirmed", "like"):
        assert f"`{column}`" in text
    exec(re.findall(r"```python\n(.*?)```", text, re.S)[0], {})
    assert capsys.readouterr().out.startswith("bf16 312000000000000.0 ")
    path = _write(tmp_path, re.findall(r"```csv\n(.*?)```", text, re.S)[0])
    assert find("our capped H100", path).tdp_w == 450
