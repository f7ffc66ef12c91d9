"""Tokenizers on both sides: GGUF's keys and the `tokenizers` library.

What llama.cpp does for each ``tokenizer.ggml.pre`` is a fact of its
src/llama-vocab.cpp (checked at the pinned engine version); a tokenizer that none of
these describes is refused, as a wrong one would spoil the model without a sign.
Knows no weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from joulesmith.errors import JoulesmithError, MissingExtraError
from joulesmith.gguf_file import MetaValue, ValueType

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"

_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"

Part = tuple[str, str]  # ("split", regex), ("digits", ""), ("bytes", "regex" or "")


@dataclass(frozen=True)
class Pre:
    """How a text is cut before byte-pair merging, under llama.cpp's name for it.

    parts: pre-tokenizers in order. ignore_merges: whether a whole word that is a
    token is taken as it is. add_bos: the engine's default where the file is silent.
    """

    parts: tuple[Part, ...]
    ignore_merges: bool = False
    add_bos: bool = False


PRES: dict[str, Pre] = {
    "gpt-2": Pre((("bytes", "regex"),)),
    "smollm": Pre((("digits", ""), ("bytes", "regex"))),
    "llama-bpe": Pre((("split", _HEAD + "{1,3}" + _TAIL), ("bytes", "")), True, True),
    "smaug-bpe": Pre((("split", _HEAD + "{1,3}" + _TAIL), ("bytes", ""))),
    "qwen2": Pre((("split", _HEAD + _TAIL), ("bytes", ""))),
    "tekken": Pre((("split", _TEKKEN), ("bytes", "")), True, True),
    "default": Pre(
        (
            ("split", r"[\p{P}\$\+<=>\^~\|]+"),
            ("split", _GPT2),
            ("split", r"\p{N}+"),
            ("split", "[0-9][0-9][0-9]"),
            ("bytes", ""),
        )
    ),
}
# Names that llama.cpp treats the same.
_SAME = {
    "gpt-2": "phi-2 jina-es jina-de gigachat mellum mpt olmo jais trillion granite-docling",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    "smaug-bpe": "dbrx",
    "qwen2": "deepseek-r1-qwen kormo stablelm2 megrez",
}
_ALIAS = {alias: name for name, aliases in _SAME.items() for alias in aliases.split()}


@dataclass(frozen=True)
class Tokenizer:
    """Text <-> token ids as the engine does it.

    backend: a `tokenizers.Tokenizer`. bos, eos: ids or None. add_bos: whether the
    engine puts ``bos`` before every text. chat_template: Jinja source or None.
    """

    backend: Any
    bos: int | None
    eos: int | None
    add_bos: bool
    chat_template: str | None = None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of ``text``, without BOS or EOS.

        special: read names of control tokens in the text as those tokens; by
        default they are plain text, as text from outside should be.
        """
        # The flag lives on the shared backend; set at each call, as it is cheap.
        self.backend.encode_special_tokens = not special
        # `encode` alone would keep other threads from running: minutes, for a large text
        return list(self.backend.encode_batch([text], add_special_tokens=False)[0].ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, control tokens by name."""
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=False))

    def __len__(self) -> int:
        return int(self.backend.get_vocab_size(with_added_tokens=True))


def tokenizer_from_metadata(metadata: dict[str, MetaValue], where: object) -> Tokenizer:
    """Build the tokenizer that a GGUF's ``tokenizer.*`` keys describe.

    Raises `JoulesmithError` for a kind or pre-tokenizer that is not known here, and
    for keys that contradict one another.
    """

    def value(key: str, default: Any = None) -> Any:
        found = metadata.get(f"tokenizer.ggml.{key}")
        return default if found is None else found.value

    kind, tokens = value("model"), value("tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise JoulesmithError(f"no tokenizer.ggml.tokens: {where}: convert the model again")
    types = value("token_type", [NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) < len(tokens):
        raise JoulesmithError(f"tokenizer.ggml.token_type is too short: {where}: convert it again")
    if len(set(tokens)) != len(tokens):
        raise JoulesmithError(f"the same token appears twice: {where}: engines refuse such a file")
    pre = Pre((), add_bos=True)
    try:
        if kind == "gpt2":
            pre = named_pre(value("pre", "default"), where)
            backend = _byte_level(tokens, value("merges", []), pre)
        elif kind == "llama":
            backend = _sentencepiece(
                tokens, value("scores"), types, value("add_space_prefix", True)
            )
        else:
            raise JoulesmithError(
                f"unsupported tokenizer {str(kind)[:40]!r}: {where}: supported are gpt2 and llama"
            )
    except JoulesmithError:
        raise
    except Exception as e:  # the tokenizers library raises bare Exception
        raise JoulesmithError(f"impossible tokenizer: {where}: {str(e)[:200]}") from e
    _add_tokens(backend, tokens, types)
    ids = {k: value(f"{k}_token_id") for k in ("bos", "eos")}
    for name, i in ids.items():
        if i is not None and (not isinstance(i, int) or not 0 <= i < len(tokens)):
            raise JoulesmithError(f"{name} token {str(i)[:20]} is out of the vocabulary: {where}")
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        ids["bos"],
        ids["eos"],
        bool(value("add_bos_token", pre.add_bos)) and ids["bos"] is not None,
        template.value if template is not None and isinstance(template.value, str) else None,
    )


def named_pre(name: Any, where: object) -> Pre:
    """The pre-tokenizer under llama.cpp's ``name``; `JoulesmithError` when unknown here."""
    found = PRES.get(_ALIAS.get(str(name), str(name)))
    if found is None:
        raise JoulesmithError(
            f"unsupported pre-tokenizer {str(name)[:40]!r}: {where}: "
            f"supported are {', '.join(sorted({*PRES, *_ALIAS}))}"
        )
    return found


def pre_tokenizer(parts: tuple[Part, ...]) -> Any:
    """The `tokenizers` pre-tokenizer made of ``parts``."""
    tk = library()
    made = []
    for kind, argument in parts:
        if kind == "split":
            made.append(tk.pre_tokenizers.Split(tk.Regex(argument), "isolated"))
        elif kind == "digits":
            made.append(tk.pre_tokenizers.Digits(individual_digits=True))
        else:
            made.append(
                tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=argument == "regex")
            )
    return made[0] if len(made) == 1 else tk.pre_tokenizers.Sequence(made)


def _byte_level(tokens: list[str], merges: Any, pre: Pre) -> Any:
    tk = library()
    pairs = []
    for merge in merges:
        # A part may itself begin with a space, so the divider is looked for from 1.
        at = merge.find(" ", 1)
        if at < 0:
            raise JoulesmithError(f"merge {merge[:40]!r} is no pair: convert the model again")
        pairs.append((merge[:at], merge[at + 1 :]))
    model = tk.models.BPE(
        {t: i for i, t in enumerate(tokens)}, pairs, ignore_merges=pre.ignore_merges
    )
    backend = tk.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer(pre.parts)
    backend.decoder = tk.decoders.ByteLevel()
    return backend


def _sentencepiece(tokens: list[str], scores: Any, types: list[int], prefix: bool) -> Any:
    """SentencePiece-BPE as merges: a pair may merge when its union is a token, the best
    score first (llama.cpp's llm_tokenizer_spm; sentencepiece's bpe_model.cc)."""
    tk = library()
    if not isinstance(scores, list) or len(scores) < len(tokens):
        raise JoulesmithError("tokenizer.ggml.scores is missing: convert the model again")
    usable = {t: i for i, t in enumerate(tokens) if types[i] in (NORMAL, USER_DEFINED, UNUSED)}
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, i in usable.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in usable and right in usable:
                ranked.append((-scores[i], usable[left], usable[right], left, right))
    ranked.sort()
    unknown = next((t for t, kind in zip(tokens, types, strict=False) if kind == UNKNOWN), None)
    model = tk.models.BPE(
        {t: i for i, t in enumerate(tokens)},
        [(left, right) for *_, left, right in ranked],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tk.Tokenizer(model)
    n, d = tk.normalizers, tk.decoders
    steps = [n.Prepend(SPACE)] if prefix else []
    backend.normalizer = n.Sequence([*steps, n.Replace(" ", SPACE)])
    strip = [d.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = d.Sequence([d.Replace(SPACE, " "), d.ByteFallback(), d.Fuse(), *strip])
    return backend


def _add_tokens(backend: Any, tokens: list[str], types: list[int]) -> None:
    tk = library()
    for wanted, special in ((CONTROL, True), (USER_DEFINED, False)):
        chosen = [
            tk.AddedToken(t, special=special, normalized=False)
            for t, kind in zip(tokens, types, strict=False)
            if kind == wanted and t
        ]
        if chosen and special:
            backend.add_special_tokens(chosen)
        elif chosen:
            backend.add_tokens(chosen)


def contiguous_ranks(merges: Iterable[tuple[str, str]]) -> dict[str, int] | None:
    """Merged token -> rank among merged tokens, or None where the merges of one token
    lie apart, so that no score per token can order them."""
    order: list[str] = [a + b for a, b in merges]
    starts = [order[0]] if order else []
    starts += [b for a, b in pairwise(order) if a != b]
    ranks = {t: i for i, t in enumerate(starts)}
    return ranks if len(ranks) == len(starts) else None


def strings(values: list[str]) -> MetaValue:
    return MetaValue.array(values, ValueType.STRING)


def library() -> Any:
    """The `tokenizers` package; `MissingExtraError` when absent."""
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.normalizers
        import tokenizers.pre_tokenizers
        import tokenizers.processors
    except ImportError as e:
        raise MissingExtraError("tokenizers") from e
    return tokenizers
