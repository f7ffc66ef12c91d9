"""The config and the tokenizer of a Hugging Face folder, read into GGUF's keys and
written back. Files are hostile until parsed. Knows no weights.

Sources: the tokenizer.json format (https://github.com/huggingface/tokenizers), and
SentencePiece's sentencepiece_model.proto for tokenizer.model.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from joulesmith.architectures import GGUF_NAME, MAX_LAYERS, float_array, unsupported
from joulesmith.errors import JoulesmithError
from joulesmith.gguf_file import MetaValue, ValueType
from joulesmith.vocab import (
    BYTE,
    CONTROL,
    NORMAL,
    PRES,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Part,
    Tokenizer,
    contiguous_ranks,
    library,
    strings,
    tokenizer_from_metadata,
)

_AGAIN = "download the model again"
_MAX_JSON = 1 << 28

# Digits, contractions, runs of spaces, several scripts, symbols: where pre-tokenizers
# differ from one another. In NFC, as engines do not normalise.
_PROBE = (
    "It's 1234567 o'clock, WE'LL see 3.14!  \n\n\tdef f(x):\r\n    return x**2  # ok\n"
    "naïve Ünïcode, привет мир, 你好世界 123 ١٢٣ 🙂🙂 <tag attr='v'>$5+5=10</tag> a_b-c   end "
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `JoulesmithError` when it is none."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise JoulesmithError(f"absurdly large JSON file: {path}: {_AGAIN}")
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise JoulesmithError(f"cannot read JSON: {path}: {str(e)[:120]}: {_AGAIN}") from e
    if not isinstance(found, dict):
        raise JoulesmithError(f"no JSON object: {path}: {_AGAIN}")
    return found


def read_config(folder: Path) -> Any:
    """The transformers config of a folder; no code from the folder is run.

    Raises `JoulesmithError` for an unsupported kind of model or impossible values.
    """
    import transformers

    raw = read_json(folder / "config.json")
    kind = raw.get("model_type")
    if kind not in GGUF_NAME:
        raise unsupported(str(kind)[:40], folder)
    layers = raw.get("num_hidden_layers")
    # Checked first: the config class makes a list as long as this.
    if layers is not None and (not isinstance(layers, int) or not 0 < layers <= MAX_LAYERS):
        raise JoulesmithError(f"num_hidden_layers is {str(layers)[:20]}: {folder}: {_AGAIN}")
    try:
        return transformers.AutoConfig.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except Exception as e:  # transformers validates with its own exception types
        line = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise JoulesmithError(f"impossible config.json: {folder}: {line}: {_AGAIN}") from e


def tokenizer_of_folder(folder: Path, config: Any) -> tuple[Tokenizer, dict[str, MetaValue]]:
    """The tokenizer of a folder and its GGUF keys, from tokenizer.json or tokenizer.model.

    The keys are turned back into a tokenizer and both are tried on a sample, so that
    what the engine will do is what the folder does. Raises `JoulesmithError` for a
    tokenizer that GGUF cannot express.
    """
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    theirs = None
    if (folder / "tokenizer.json").is_file():
        try:
            theirs = library().Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as e:  # the tokenizers library raises bare Exception
            raise JoulesmithError(
                f"damaged tokenizer.json: {folder}: {str(e)[:120]}: {_AGAIN}"
            ) from e
        keys = _from_json(theirs, config.vocab_size, folder)
    elif (folder / "tokenizer.model").is_file():
        keys = _from_sentencepiece(folder / "tokenizer.model", config.vocab_size, settings)
    else:
        raise JoulesmithError(f"no tokenizer.json or tokenizer.model: {folder}: {_AGAIN}")
    keys.update(_special(keys, settings, config, theirs))
    if template := _chat_template(folder, settings):
        keys["tokenizer.chat_template"] = MetaValue.string(template)
    ours = tokenizer_from_metadata(keys, folder)
    if theirs is not None:
        theirs.encode_special_tokens = True
        same = theirs.encode(_PROBE, add_special_tokens=False).ids == ours.encode(_PROBE)
        if not same:
            raise JoulesmithError(
                f"the tokenizer cannot be expressed in GGUF: {folder}: "
                "it cuts a sample text differently there: use another model"
            )
    return ours, keys


def tokenizer_of_sentencepiece(path: Path, config: Any) -> tuple[Tokenizer, dict[str, MetaValue]]:
    """The tokenizer of a SentencePiece model on its own, and its GGUF keys.

    Raises `JoulesmithError` as `tokenizer_of_folder`.
    """
    keys = _from_sentencepiece(path, config.vocab_size, {})
    keys.update(_special(keys, {}, config, None))
    return tokenizer_from_metadata(keys, path), keys


def write_tokenizer(tokenizer: Tokenizer, metadata: dict[str, MetaValue], folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json that transformers reads."""
    backend = library().Tokenizer.from_str(tokenizer.backend.to_str())
    tokens = metadata["tokenizer.ggml.tokens"].value
    assert isinstance(tokens, list)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": tokenizer.add_bos,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        found = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if found is not None and isinstance(found.value, int) and found.value < len(tokens):
            settings[f"{name}_token"] = tokens[found.value]
    if tokenizer.add_bos and tokenizer.bos is not None:
        bos = tokens[tokenizer.bos]
        backend.post_processor = library().processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.bos)],
        )
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings, ensure_ascii=False, indent=2) + "\n", "utf-8"
    )


def _from_json(backend: Any, vocab_size: int, folder: Path) -> dict[str, MetaValue]:
    state = json.loads(backend.to_str())
    model = state["model"]
    if model.get("type") != "BPE":
        raise JoulesmithError(
            f"unsupported tokenizer {model.get('type')}: {folder}: only BPE is supported"
        )
    ids: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    if ids and max(ids.values()) >= vocab_size:
        raise JoulesmithError(
            f"token {max(ids.values())} but {vocab_size} embedding rows: {folder}: {_AGAIN}"
        )
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, i in ids.items():
        tokens[i], types[i] = token, NORMAL
    for added in state["added_tokens"]:
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in model["merges"]]
    out: dict[str, MetaValue] = {}
    if model.get("byte_fallback"):
        out["tokenizer.ggml.model"] = MetaValue.string("llama")
        out["tokenizer.ggml.pre"] = MetaValue.string("default")
        scores = _merge_scores(tokens, types, merges, model.get("unk_token"), folder)
        out["tokenizer.ggml.add_space_prefix"] = MetaValue.boolean(_space_prefix(state, folder))
    else:
        out["tokenizer.ggml.model"] = MetaValue.string("gpt2")
        out["tokenizer.ggml.pre"] = MetaValue.string(_pre_name(state, folder))
        scores = None
    out["tokenizer.ggml.tokens"] = strings(tokens)
    out["tokenizer.ggml.token_type"] = MetaValue.array(types, ValueType.INT32)
    if scores is None:
        out["tokenizer.ggml.merges"] = strings([f"{a} {b}" for a, b in merges])
    else:
        out["tokenizer.ggml.scores"] = float_array(scores)
    return out


def _parts(node: Any) -> Iterator[Part | None]:
    """A pre-tokenizer's JSON as plain parts, None where it is something else."""
    kind = node.get("type") if isinstance(node, dict) else None
    if kind == "Sequence":
        for child in node["pretokenizers"]:
            yield from _parts(child)
    elif kind == "Split" and node["behavior"] == "Isolated" and not node["invert"]:
        yield ("split", node["pattern"]["Regex"]) if "Regex" in node["pattern"] else None
    elif kind == "Digits" and node["individual_digits"]:
        yield ("digits", "")
    elif kind == "ByteLevel" and not node["add_prefix_space"]:
        yield ("bytes", "regex" if node.get("use_regex", True) else "")
    else:
        yield None


def _pre_name(state: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name of the pre-tokenizer, recognised by its structure."""
    parts = tuple(_parts(state["pre_tokenizer"]))
    ignore = bool(state["model"].get("ignore_merges"))
    normalizer = (state.get("normalizer") or {}).get("type")
    for name, pre in PRES.items():
        # Qwen normalises to NFC; engines do not, and neither does its own converter.
        allowed = (None, "NFC") if name == "qwen2" else (None,)
        if pre.parts == parts and pre.ignore_merges == ignore and normalizer in allowed:
            return name
    raise JoulesmithError(
        f"unknown pre-tokenizer (normalizer {normalizer}, parts {str(parts)[:120]}): {folder}: "
        f"known are {', '.join(PRES)}: a GGUF with a wrong one would be silently worse"
    )


def _space_prefix(state: dict[str, Any], folder: Path) -> bool:
    """Whether a SentencePiece-like tokenizer puts a space before the text."""
    text = json.dumps([state.get("normalizer"), state.get("pre_tokenizer")], ensure_ascii=False)
    if SPACE not in text:
        raise JoulesmithError(f"byte-fallback BPE without {SPACE}: {folder}: not supported")
    scheme = (state.get("pre_tokenizer") or {}).get("prepend_scheme")
    return '"Prepend"' in text or scheme in ("always", "first")


def _merge_scores(
    tokens: list[str], types: list[int], merges: list[Any], unknown: Any, folder: Path
) -> list[float]:
    """Scores that make SentencePiece's search merge in the order of ``merges``."""
    ranks = contiguous_ranks(merges)
    if ranks is None:
        raise JoulesmithError(
            f"merges cannot be expressed as scores: {folder}: give the original tokenizer.model"
        )
    scores = []
    for i, token in enumerate(tokens):
        scores.append(-float(ranks[token] + 1) if token in ranks else 0.0)
        if token == unknown:
            types[i] = UNKNOWN
        elif types[i] == NORMAL and _is_byte(token):
            types[i] = BYTE
    return scores


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _special(
    keys: dict[str, MetaValue], settings: dict[str, Any], config: Any, backend: Any
) -> dict[str, MetaValue]:
    tokens = keys["tokenizer.ggml.tokens"].value
    assert isinstance(tokens, list)
    ids = {t: i for i, t in enumerate(tokens)}
    out: dict[str, MetaValue] = {}
    found: dict[str, int] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        text = settings.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text
        i = ids.get(text) if isinstance(text, str) else None
        if i is None:
            i = getattr(config, f"{name}_token_id", None)
            i = i[0] if isinstance(i, list) and i else i
        if isinstance(i, int) and 0 <= i < len(tokens):
            found[name] = i
            out[f"tokenizer.ggml.{key}_token_id"] = MetaValue.u32(i)
    around = backend.encode("", add_special_tokens=True).ids if backend is not None else []
    if backend is not None and json.loads(backend.to_str()).get("post_processor"):
        add_bos = bool(around) and around[0] == found.get("bos")
    else:
        # SentencePiece's own default in Llama tokenizers is to add it.
        add_bos = bool(settings.get("add_bos_token", backend is None)) and "bos" in found
    out["tokenizer.ggml.add_bos_token"] = MetaValue.boolean(add_bos)
    out["tokenizer.ggml.add_eos_token"] = MetaValue.boolean(False)
    return out


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise JoulesmithError(f"cannot read: {file}: {e}") from e
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol buffer message; ValueError where it is damaged."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(raw) or shift > 63:
                raise ValueError("truncated number")
            byte = raw[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(raw):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint()
            continue
        n = {1: 8, 5: 4}.get(kind, -1) if kind != 2 else varint()
        if not 0 <= n <= len(raw) - at:
            raise ValueError("truncated field")
        yield tag >> 3, raw[at : at + n]
        at += n


def _from_sentencepiece(
    path: Path, vocab_size: int, settings: dict[str, Any]
) -> dict[str, MetaValue]:
    """GGUF keys of a tokenizer.model (ModelProto: 1 pieces, 2 trainer, 3 normalizer)."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    scores, types = [-10000.0] * vocab_size, [UNUSED] * vocab_size
    prefix, kind, n = True, 1, 0
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ValueError("absurdly large")
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece = dict(_fields(value))
                if n < vocab_size:
                    tokens[n] = piece[1].decode("utf-8")
                    scores[n] = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0]
                    types[n] = int(piece.get(3, NORMAL))
                n += 1
            elif number == 2:
                kind = int(dict(_fields(value)).get(3, 1))
            elif number == 3:
                prefix = bool(dict(_fields(value)).get(3, 1))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as e:
        raise JoulesmithError(f"damaged tokenizer.model: {path}: {e}: {_AGAIN}") from e
    if kind != 2:
        raise JoulesmithError(f"unsupported SentencePiece model (not BPE): {path}: only BPE is")
    if n > vocab_size:
        raise JoulesmithError(f"{n} tokens but {vocab_size} embedding rows: {path}: {_AGAIN}")
    _apply_added(settings, tokens, scores, types)
    return {
        "tokenizer.ggml.model": MetaValue.string("llama"),
        "tokenizer.ggml.pre": MetaValue.string("default"),
        "tokenizer.ggml.add_space_prefix": MetaValue.boolean(prefix),
        "tokenizer.ggml.tokens": strings(tokens),
        "tokenizer.ggml.scores": float_array(scores),
        "tokenizer.ggml.token_type": MetaValue.array(types, ValueType.INT32),
    }


def _apply_added(
    settings: dict[str, Any], tokens: list[str], scores: list[float], types: list[int]
) -> None:
    added = settings.get("added_tokens_decoder")
    for key, token in added.items() if isinstance(added, dict) else ():
        i = int(key) if str(key).isdecimal() else -1
        content = token.get("content") if isinstance(token, dict) else None
        if 0 <= i < len(tokens) and isinstance(content, str) and types[i] != UNKNOWN:
            tokens[i], scores[i] = content, -1000.0
            types[i] = CONTROL if token.get("special") else USER_DEFINED
