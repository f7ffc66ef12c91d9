"""A compressed-tensors folder run in torch with its weights as packed as they lie on disk.

Reads what `joulesmith quantize` writes (format "pack-quantized", 4 and 8 bits, symmetric or
with zeros, by group or whole row), a few rows at a time: no matrix is ever float as a whole.
Files are hostile until checked: names, types and shapes against the model's config before
memory is taken. Regular expressions in the config are not evaluated. `transformers` loads
the same folder by unpacking all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from joulesmith.compress.quantize.grids import Lattice
from joulesmith.compress.quantize.integers import IntGrid
from joulesmith.engines.packed import swap
from joulesmith.engines.packed_store import Prefer, Store, from_codes
from joulesmith.engines.torch_engine import TorchSession
from joulesmith.errors import EngineError, JoulesmithError

if TYPE_CHECKING:
    from joulesmith.architectures import TensorRef
    from joulesmith.models import Model
    from joulesmith.weights import SafetensorsShelf

_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
_BITS = (4, 8)
_SPARSE = ("sparse-24-bitmask", "sparse-bitmask", "marlin-24")
"""Layouts of older versions of compressed-tensors; 0.19 and 0.20 have no code that reads them."""
_AGAIN = "quantize or download the model again"


@dataclass(frozen=True)
class Scheme:
    """How weights are packed. group: columns that share a scale; None: the whole row."""

    bits: int
    group: int | None
    symmetric: bool


def is_packed_folder(path: Path) -> bool:
    """Whether a folder's config.json says that its weights are compressed-tensors."""
    from joulesmith.vocab_folder import read_json

    if not (path / "config.json").is_file():
        return False
    found = read_json(path / "config.json").get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == "compressed-tensors"


def load_packed(
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    prefer: Prefer = "bytes",
) -> Model:
    """Load a packed folder; ``model.module`` runs and generates as any transformers model.

    dtype: of activations and of what is not packed. bfloat16 runs on the CPU's four-bit
    kernel where there is one; float32 gives the logits of the dequantized float32 model.
    The peak of memory is the packed model and one tensor of those that are not packed; while
    it loads, the file's own pages are mapped as well, which the system may take back.
    Raises `JoulesmithError` for a folder that is not of this kind, or damaged.
    """
    from joulesmith.architectures import GGUF_NAME, check_config, hyperparameters
    from joulesmith.models import Model
    from joulesmith.vocab_folder import read_config, tokenizer_of_folder
    from joulesmith.weights import (
        check_shape,
        fill,
        finish,
        open_safetensors,
        refuse_unexpected,
        skeleton,
    )

    folder = Path(folder)
    if not is_packed_folder(folder):
        raise JoulesmithError(
            f"no compressed-tensors folder: {folder}: make one with  joulesmith quantize"
        )
    config = read_config(folder)
    schemes = _schemes(folder)
    del config.quantization_config
    check_config(config, folder)
    with open_safetensors(folder) as shelf:
        if config.num_hidden_layers * 9 > len(shelf.where):
            raise JoulesmithError(
                f"{config.num_hidden_layers} layers but {len(shelf.where)} tensors: {folder}: "
                f"{_AGAIN}"
            )
        tokenizer, keys = tokenizer_of_folder(folder, config)
        module, refs = skeleton(config, folder)
        parameters = sum(p.numel() for p in module.parameters())
        packed = {n: r for n, r in refs.items() if f"{r.parameter}_packed" in shelf.where}
        plain = {n: r for n, r in refs.items() if n not in packed}
        for ref in plain.values():
            check_shape(ref, shelf.shape(ref), folder)
        layers = {n: _Packed(shelf, r, schemes, folder) for n, r in packed.items()}
        known = {
            f"{r.parameter.removesuffix('weight')}{p}" for r in packed.values() for p in _PARTS
        }
        refuse_unexpected([name for name in shelf.unused(plain) if name not in known], folder)
        fill(module, plain, shelf.read, dtype, folder)
        for name, layer in layers.items():
            swap(module, packed[name].parameter, layer.store(dtype, prefer))
    finish(module, dtype)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    _generation_settings(module, folder)
    name = folder.resolve().name
    return Model(
        name=name,
        module=module,
        tokenizer=tokenizer,
        architecture=GGUF_NAME[config.model_type],
        parameters=parameters,
        origin=f"{name}, packed weights from the folder {folder}",
        path=folder,
        given=None,
        metadata={**hyperparameters(config, name), **keys},
        tensors=plain,
    )


class PackedTorch:
    """The engine for packed folders: torch in this process. See `load_packed`."""

    name = "torch"

    def __init__(self, dtype: torch.dtype = torch.bfloat16, prefer: Prefer = "bytes") -> None:
        self._dtype, self._prefer = dtype, prefer

    @property
    def version(self) -> str:
        """Name and version."""
        return f"torch {torch.__version__}, packed weights, {str(self._dtype)[6:]}"

    @property
    def threads(self) -> int:
        """Threads of this process."""
        return torch.get_num_threads()

    def load(self, path: Path, *, context: int = 1024, threads: int | None = None) -> TorchSession:
        """A session on the folder. context is without effect: the cache grows as needed.

        threads: for the whole process, as torch has it. Raises `EngineError`.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            model = load_packed(path, dtype=self._dtype, prefer=self._prefer)
        except JoulesmithError as e:
            raise EngineError(str(e)) from e
        return TorchSession(model.module)


# -- what the config says ---------------------------------------------------------


class _Schemes:
    """Scheme of each layer. One scheme for all is told by class, several by name."""

    def __init__(self, default: Scheme | None, by_name: dict[str, Scheme]) -> None:
        self._default, self._by_name = default, by_name

    def of(self, layer: str) -> Scheme | None:
        return self._by_name.get(layer, self._default)


def _schemes(folder: Path) -> _Schemes:
    from joulesmith.vocab_folder import read_json

    found = read_json(folder / "config.json")["quantization_config"]
    groups = found.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _refused(folder, "no config_groups")
    if found.get("kv_cache_scheme"):
        raise _refused(folder, "a quantized key-value cache")
    sparse = found.get("sparsity_config")
    form = sparse.get("format") if isinstance(sparse, dict) else None
    for name in (form, found.get("format")):
        if name in _SPARSE:
            raise JoulesmithError(
                f"weights are stored as {name}: {folder}: the compressed-tensors library dropped "
                "sparse layouts and nothing loads them: give the dense model"
            )
    default, by_name = None, {}
    for group in groups.values():
        if not isinstance(group, dict):
            raise _refused(folder, "a group that is no object")
        for form in (found.get("format"), group.get("format")):
            if form not in (None, "pack-quantized"):
                raise _refused(folder, f"format {str(form)[:40]!r}")
        if group.get("input_activations") or group.get("output_activations"):
            raise _refused(folder, "quantized activations")
        scheme = _scheme(group.get("weights"), folder)
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            raise _refused(folder, "targets that are no list of names")
        if len(groups) == 1:
            default = scheme
        elif any(t == "Linear" or t.startswith("re:") for t in targets):
            raise _refused(folder, "several schemes that are not given by full names")
        else:
            by_name.update(dict.fromkeys(targets, scheme))
    return _Schemes(default, by_name)


def _scheme(weights: Any, folder: Path) -> Scheme:
    if not isinstance(weights, dict):
        raise _refused(folder, "no weights scheme")
    bits, group = weights.get("num_bits"), weights.get("group_size")
    strategy: Literal["group", "channel"] | Any = weights.get("strategy")
    if weights.get("type") != "int" or bits not in _BITS or isinstance(bits, bool):
        raise _refused(folder, f"{str(weights.get('type'))[:20]} weights of {str(bits)[:20]} bits")
    if weights.get("dynamic") or weights.get("actorder") not in (None, "weight", "static"):
        raise _refused(folder, "dynamic or reordered groups")
    symmetric = weights.get("symmetric")
    if not isinstance(symmetric, bool):
        raise _refused(folder, f"symmetric is {str(symmetric)[:20]}")
    if strategy == "channel":
        return Scheme(bits, None, symmetric)
    if strategy != "group" or not isinstance(group, int) or not 0 < group <= 1 << 20:
        raise _refused(folder, f"strategy {str(strategy)[:20]!r} with groups of {str(group)[:20]}")
    return Scheme(bits, group, symmetric)


def _refused(folder: Path, what: str) -> JoulesmithError:
    return JoulesmithError(
        f"quantization_config has {what}: {folder}: only packed integers of 4 and 8 bits run here"
    )


# -- what the files hold -------------------------------------------------------------


class _Packed:
    """One packed matrix on the shelf, its parts checked and not yet read."""

    def __init__(
        self, shelf: SafetensorsShelf, ref: TensorRef, schemes: _Schemes, folder: Path
    ) -> None:
        self._shelf, self._where = shelf, f"{ref.parameter}: {folder}"
        self._base = ref.parameter.removesuffix("weight")
        scheme = schemes.of(self._base.rstrip("."))
        if scheme is None or not ref.is_matrix or ref.role == "token_embd":
            raise JoulesmithError(
                f"a packed embedding, or packed without a scheme: {self._where}: {_AGAIN}"
            )
        self.rows, self.columns = ref.shape
        group = scheme.group or self.columns
        if self.columns % group:
            raise JoulesmithError(f"groups of {group} do not divide the rows: {self._where}")
        self.grid = IntGrid(scheme.bits, group, symmetric=scheme.symmetric)
        groups, each = self.columns // group, 32 // scheme.bits
        self._part("weight_packed", (self.rows, -(-self.columns // each)), ("I32",))
        self._part("weight_scale", (self.rows, groups), ("F16", "BF16", "F32"))
        self._part("weight_shape", (2,), ("I64", "I32"))
        zero = f"{self._base}weight_zero_point" in shelf.where
        if zero == scheme.symmetric:
            what = "zeros in a symmetric scheme" if zero else "no zeros"
            raise JoulesmithError(f"{what}: {self._where}: {_AGAIN}")
        if zero:
            self._part("weight_zero_point", (-(-self.rows // each), groups), ("I32",))

    def _part(self, part: str, shape: tuple[int, ...], types: tuple[str, ...]) -> None:
        name = self._base + part
        if name not in self._shelf.where:
            raise JoulesmithError(f"{part} is missing: {self._where}: {_AGAIN}")
        found = self._shelf.where[name].get_slice(name)
        if tuple(found.get_shape()) != shape or found.get_dtype() not in types:
            raise JoulesmithError(
                f"{part} is {found.get_dtype()} {tuple(found.get_shape())}, not {types[0]} "
                f"{shape}: {self._where}: {_AGAIN}"
            )

    def _read(self, part: str) -> Tensor:
        from safetensors import SafetensorError

        name = self._base + part
        try:
            found: Tensor = self._shelf.where[name].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, ValueError) as e:
            raise JoulesmithError(f"cannot read {part}: {self._where}: {e}: {_AGAIN}") from e
        return found

    def store(self, dtype: torch.dtype, prefer: Prefer) -> Store:
        """The matrix, packed in memory."""
        shape = self._read("weight_shape").tolist()
        if shape != [self.rows, self.columns]:
            raise JoulesmithError(f"weight_shape says {shape}: {self._where}: {_AGAIN}")
        words, scale = self._read("weight_packed"), self._read("weight_scale")
        if not bool(torch.isfinite(scale).all()):
            raise JoulesmithError(f"a scale is NaN or infinite: {self._where}: {_AGAIN}")
        steps = scale.half()
        if not torch.equal(steps.float(), scale.float()):
            raise JoulesmithError(
                f"scales beyond float16: {self._where}: scales of other types do not run here"
            )
        zeros = None
        if not self.grid.symmetric:
            packed = self._read("weight_zero_point").T.contiguous()
            zeros = _codes(packed, self.grid.bits, self.rows).T.contiguous()

        def read(start: int, stop: int) -> tuple[Tensor, Lattice]:
            codes = _codes(words[start:stop], self.grid.bits, self.columns)
            step = steps[start:stop].float()
            if zeros is None:
                return codes, Lattice(step, None, (step,))
            zero = zeros[start:stop].float()
            return codes, Lattice(step, -zero * step, (step, zero))

        try:
            return from_codes(self.grid, read, self.rows, self.columns, dtype, prefer)
        except JoulesmithError as e:
            raise JoulesmithError(f"{e}: {self._where}") from e


def _codes(words: Tensor, bits: int, n: int) -> Tensor:
    """int32 words, codes from the low bits up -> (rows, n) uint8."""
    raw = words.contiguous().view(torch.uint8)
    if bits == 4:
        raw = torch.stack([raw & 15, raw >> 4], -1).view(len(raw), -1)
    return raw[:, :n].contiguous()


def _generation_settings(module: Any, folder: Path) -> None:
    """The folder's generation_config.json, where it has a good one."""
    from transformers import GenerationConfig

    from joulesmith.vocab_folder import read_json

    if not (folder / "generation_config.json").is_file():
        return
    given = read_json(folder / "generation_config.json")
    try:
        module.generation_config = GenerationConfig.from_dict(given)
    except Exception as e:  # transformers validates with its own exception types
        line = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise JoulesmithError(f"impossible generation_config.json: {folder}: {line}") from e
