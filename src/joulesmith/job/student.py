"""Models to train that are not there yet: of another shape or from a config with fresh weights, or
cut out of a teacher. Knows models; no training."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from joulesmith.architectures import GGUF_NAME, check_config, unsupported
from joulesmith.errors import JoulesmithError

if TYPE_CHECKING:
    from joulesmith.models import Model

WORDS = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "neurons": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "context": "max_position_embeddings",
}
_MOST = 1 << 20
_CONFIG_BYTES = 1 << 20


def shape_of(text: str) -> dict[str, int]:
    """ "layers=4,width=128,heads=4" -> part to count. Raises `JoulesmithError` in one line."""
    found: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z_]+)\s*=\s*(\d{1,7})\s*", part)
        if match is None or match[1] not in WORDS or match[1] in found:
            raise JoulesmithError(
                f"--shape {text[:60]!r}: give counts by name, each once: {', '.join(WORDS)}"
            )
        if not 0 < int(match[2]) <= _MOST:
            raise JoulesmithError(f"--shape: {match[1]}={match[2]} is no size for a model")
        found[match[1]] = int(match[2])
    return found


def shaped(config: Any, parts: Mapping[str, int]) -> Any:
    """A copy of a config with other counts. Heads keep the size that they have unless width or
    heads are given; neurons keep their ratio to the width. Raises `JoulesmithError` for counts
    that do not fit together."""
    made = copy.deepcopy(config)
    ratio = config.intermediate_size / config.hidden_size
    for word, value in parts.items():
        setattr(made, WORDS[word], value)
    if "width" in parts and "neurons" not in parts:
        made.intermediate_size = max(8, round(ratio * parts["width"] / 8) * 8)
    if "heads" in parts and "kv_heads" not in parts:
        group = max(1, config.num_attention_heads // config.num_key_value_heads)
        made.num_key_value_heads = max(1, parts["heads"] // group)
    if parts.keys() & {"width", "heads"}:
        if made.hidden_size % made.num_attention_heads:
            raise JoulesmithError(
                f"--shape: {made.num_attention_heads} heads do not divide a width of "
                f"{made.hidden_size}: give other counts"
            )
        made.head_dim = made.hidden_size // made.num_attention_heads
    if (kinds := getattr(made, "layer_types", None)) is not None:
        last = kinds[-1]
        made.layer_types = [*kinds, *[last] * made.num_hidden_layers][: made.num_hidden_layers]
    check_config(made, "--shape")
    return made


def read_config(path: Path) -> Any:
    """A ``config.json`` of `transformers`; nothing in it is run. Raises `JoulesmithError`."""
    from transformers import AutoConfig

    where = path / "config.json" if path.is_dir() else path
    try:
        if where.stat().st_size > _CONFIG_BYTES:
            raise JoulesmithError(f"absurdly large for a config: {where}")
        plain = json.loads(where.read_bytes())
    except OSError as e:
        raise JoulesmithError(f"cannot read the config: {where}: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise JoulesmithError(f"not JSON: {where}: give a model's config.json") from e
    kind = plain.pop("model_type", None) if isinstance(plain, dict) else None
    if kind not in GGUF_NAME:
        raise unsupported(str(kind)[:40], where)
    plain.pop("auto_map", None)
    try:
        config = AutoConfig.for_model(kind, **plain)
    except Exception as e:  # whatever a foreign value breaks
        raise JoulesmithError(f"not a config of {kind}: {where}: {str(e)[:120]}") from e
    check_config(config, where)
    return config


def fresh(base: Model, config: Any, folder: Path, seed: int) -> Model:
    """A model of that config with weights drawn as `transformers` draws them, and the tokenizer of
    ``base``. It lies in ``folder``, which is written once: what is there is read again.

    Raises `JoulesmithError` for a vocabulary smaller than the tokenizer's, sizes that the memory
    does not hold, and a full disk.
    """
    import psutil
    import torch
    from transformers import AutoModelForCausalLM

    from joulesmith import models
    from joulesmith.atomic import atomic_folder

    if folder.is_dir():
        return models.load(folder)
    if config.vocab_size < len(base.tokenizer):
        raise JoulesmithError(
            f"a vocabulary of {config.vocab_size} for the {len(base.tokenizer)} tokens of "
            f"{base.name}: give a config with as many"
        )
    config.bos_token_id, config.eos_token_id = base.tokenizer.bos, base.tokenizer.eos
    config.pad_token_id = None
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if 4 * size > psutil.virtual_memory().available:
        raise JoulesmithError(
            f"a model of {size:,} parameters takes {4 * size / 1e9:.1f} GB in float32, more than "
            "there is: give a smaller shape"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with atomic_folder(folder, needed=4 * size + (1 << 24)) as part:
        models.write_weights(module, part)
        models.write_tokenizer_of(base, part)
    del module
    return models.load(folder)
