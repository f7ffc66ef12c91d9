"""A shape from whatever names a model: a folder, a config.json, a ``.gguf`` file, the bundled
``smollm2``, or a hub id.

Reads headers and configs only, never weights. Knows no counting.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from joulesmith.errors import JoulesmithError, MissingExtraError
from joulesmith.estimate.model.header import of_gguf
from joulesmith.estimate.model.hub_config import of_config
from joulesmith.estimate.model.shape import Shape, Stored
from joulesmith.formats import safetensors_file
from joulesmith.formats.files import read_bounded_json
from joulesmith.formats.sparse_layout import sparse_config

_HUB_ID = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}")
_LIMIT, _OBJECTS = 1 << 22, 1 << 14
"""Bytes and objects of a config.json: real ones have kilobytes and dozens, a sparse model's
up to a few thousand."""
_TIMEOUT = 3.0  # seconds to wait for the hub
_TABLE = re.compile(r"(?:^|\.)(?:embed_tokens|embed_in|wte|wpe|word_embeddings|embed_positions)\.")
_OTHER = re.compile(r"(?:^|\.)(?:vision|visual|audio|multi_modal|mtp|image|speech)")


def read(source: str | os.PathLike[str]) -> Shape:
    """Describe the model that ``source`` names. See the module for what it may be.

    A hub id is looked up in the hub's local cache, then asked for at the hub: only its
    config.json. Raises `JoulesmithError`, one line, for what is not there, damaged or no
    language model.
    """
    text = os.fspath(source)
    if not text.strip():
        raise JoulesmithError("no model is named: give smollm2, a file, a folder or a hub id")
    if text == "smollm2":
        from joulesmith.models import resolve

        bundled = resolve(text)
        return replace(of_gguf(bundled.path), name=bundled.name)
    path = Path(text).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.suffix.lower() == ".json" and path.exists():
        # called by its folder, as config.json says nothing
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
        return _config(path, name)
    if path.exists():
        return of_gguf(path)
    if _HUB_ID.fullmatch(text) and ".." not in text and path.suffix.lower() not in _FILES:
        return _config(_hub(text), text.rpartition("/")[2], text)
    raise JoulesmithError(
        f"no such model: {text[:200]}: give smollm2, a .gguf file, a config.json, a folder or a "
        "hub id (org/name)"
    )


_FILES = (".gguf", ".json", ".safetensors")


def _config(path: Path, name: str, where: str | None = None) -> Shape:
    found: Mapping[str, Any] = read_bounded_json(path, _LIMIT, _OBJECTS, "config.json")
    ours = sparse_config(found)  # a folder of ours keeps the model's config inside its own
    if ours is not None and isinstance(ours.get("config"), dict):
        found = ours["config"]
    return of_config(found, name=name, where=where or str(path))


def _folder(path: Path) -> Shape:
    config = path / "config.json"
    if not config.is_file():
        models = sorted(path.glob("*.gguf"))
        if len(models) == 1:
            return of_gguf(models[0])
        hint = f"give one of its {len(models)} .gguf files" if models else "give a model folder"
        raise JoulesmithError(f"no config.json: {path}: {hint}")
    shape = _config(config, path.resolve().name)
    if not (any(path.glob("*.safetensors")) or (path / safetensors_file.INDEX).is_file()):
        return shape
    return replace(shape, stored=_stored(path, shape))


def _stored(folder: Path, shape: Shape) -> Stored:
    """Bytes of the folder's tensors by use, as their headers have them."""
    sizes = dict.fromkeys(("embedding", "head", "matrices", "experts", "vectors"), 0)
    for t in safetensors_file.read_folder(folder):
        if _OTHER.search(t.name):
            continue  # what sees or hears, and what predicts further tokens
        if _TABLE.search(t.name):
            use = "embedding"
        elif t.name.startswith(("lm_head.", "embed_out.", "output.")):
            use = "head"
        elif ".experts." in t.name:
            use = "experts"
        elif len(t.shape) < 2 and t.name.endswith((".bias", "norm.weight", "ln_f.weight")):
            use = "vectors"
        else:
            use = "matrices"  # with the scales, codes and zero points of packed ones
        sizes[use] += t.nbytes
    if shape.tied and sizes["embedding"]:
        sizes["head"] = 0  # a copy of the embedding that engines tie again
    return Stored(**sizes)


def _hub(ref: str) -> Path:
    """The config.json of a hub id: from the local cache, else from the hub."""
    try:
        from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    except ImportError as e:
        raise MissingExtraError("huggingface_hub") from e
    try:
        cached = try_to_load_from_cache(ref, "config.json")
        if isinstance(cached, str):
            return Path(cached)
        # Asked first, as it gives up at once where there is no network; a download tries
        # again for half a minute.
        HfApi().model_info(ref, timeout=_TIMEOUT)
        return Path(hf_hub_download(ref, "config.json", etag_timeout=_TIMEOUT))
    except Exception as e:  # a dozen network and hub exceptions, all the same to the user
        line = (str(e).strip().splitlines() or [""])[0][:120]
        raise JoulesmithError(
            f"{ref} is not in the local cache and the hub did not give it: "
            f"{type(e).__name__}: {line}: check the name and the network, or give a config.json"
        ) from e
