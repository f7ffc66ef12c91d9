"""Text as fixed windows of tokens: from a file, a hub dataset, the model's own samples,
or the English text that every Python ships. Knows no models' inner parts.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from joulesmith.atomic import atomic_path
from joulesmith.errors import JoulesmithError, MissingExtraError
from joulesmith.models import cache_word

if TYPE_CHECKING:
    import torch

    from joulesmith.models import Model

_MAX_FILE = 1 << 30
_BATCHES = (32, 128)
"""Texts sampled side by side: at least, and at most where their cache is small."""
_CACHE = 1 << 30
"""Bytes of keys and values up to which there are more than the least."""


@dataclass(frozen=True)
class Text:
    """A text, where it is from (one phrase), and the SHA-256 of its UTF-8 bytes."""

    text: str
    source: str
    sha256: str


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows. tokens: int32 (n, length), each read from an empty context.

    source: where the text is from, one phrase. sha256: of the text's UTF-8 bytes; of the
    tokens' little-endian bytes where the tokens are sampled.
    """

    tokens: NDArray[np.int32]
    source: str
    sha256: str

    def __len__(self) -> int:
        return int(self.tokens.shape[0])


def english() -> Text:
    """Python's own language reference (`pydoc_data.topics`), some 700 kB of English prose.

    It needs no network and is on every machine, but is not the same in each version
    of Python: the source names the version. Raises `JoulesmithError` where a
    distribution leaves it out.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as e:
        raise JoulesmithError("this Python ships no pydoc_data: give a text file instead") from e
    text = "\n\n".join(topics[key].strip() for key in sorted(topics))
    version = ".".join(str(v) for v in sys.version_info[:3])
    return _text(text, f"Python {version} language reference (pydoc_data.topics)")


def read_text(path: str | os.PathLike[str]) -> Text:
    """A UTF-8 text file. Raises `JoulesmithError`: absent, binary, empty, above 1 GiB."""
    p = Path(path)
    try:
        n = p.stat().st_size
        if not p.is_file():
            raise JoulesmithError(f"not a file: {p}: give a UTF-8 text file")
        if n > _MAX_FILE:
            raise JoulesmithError(f"text above 1 GiB: {p}: give a smaller part of it")
        raw = p.read_bytes()
    except OSError as e:
        raise JoulesmithError(f"cannot read text: {p}: {e.strerror or e}") from e
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise JoulesmithError(
            f"not UTF-8: {p}: byte {e.start}: give a plain UTF-8 text file"
        ) from e
    if "\0" in text:
        raise JoulesmithError(f"binary file, not text: {p}: give a plain UTF-8 text file")
    if not text.strip():
        raise JoulesmithError(f"empty text: {p}: give a longer text")
    return _text(text, p.name)


def read(ref: str | os.PathLike[str]) -> Text:
    """ "english", "hf:name[:config[:split]]" (with the `datasets` package), or a file's path."""
    name = os.fspath(ref)
    if name == "english":
        return english()
    if name.startswith("hf:"):
        return _dataset(name)
    return read_text(name)


def split(
    text: Text,
    tokens: Sequence[int] | NDArray[Any],
    length: int,
    counts: Mapping[str, int],
    seed: int = 0,
    *,
    bos: int | None = None,
) -> dict[str, Windows]:
    """Disjoint windows of ``length`` tokens for each name in ``counts``.

    The text is cut into consecutive non-overlapping pieces, which a seeded permutation
    deals out, so that each split is spread over the whole text. Pieces beyond the counts
    are unused; which pieces there are depends on the text and ``length`` alone.

    tokens: of ``text``, in order, without BOS. bos: put before each window (and counted
    in ``length``), for models whose tokenizer adds it.
    Raises `JoulesmithError` when the text is too short, with the tokens needed.
    """
    body = length - (bos is not None)
    if body < 2 or any(n < 0 for n in counts.values()):
        raise JoulesmithError(f"windows of {length} tokens are too short: use 3 or more")
    ids = np.asarray(tokens, np.int32)
    wanted = sum(counts.values())
    have = ids.size // body
    if have < wanted:
        raise JoulesmithError(
            f"too little text: {text.source}: {wanted * body} tokens needed "
            f"({wanted} windows of {length}), {ids.size} there: give a longer text"
        )
    pieces = ids[: have * body].reshape(have, body)
    if bos is not None:
        pieces = np.concatenate([np.full((have, 1), bos, np.int32), pieces], axis=1)
    order = np.random.default_rng(seed).permutation(have)
    out, at = {}, 0
    for name, n in counts.items():
        # Ascending within a split: the order of evaluation then follows the text.
        chosen = np.sort(order[at : at + n])
        out[name] = Windows(np.ascontiguousarray(pieces[chosen]), text.source, text.sha256)
        at += n
    return out


def windows(
    model: Model, text: Text, length: int, counts: Mapping[str, int], seed: int = 0
) -> dict[str, Windows]:
    """`split` of ``text`` under the model's tokenizer, with BOS where its engine adds it."""
    t = model.tokenizer
    return split(text, t.encode(text.text), length, counts, seed, bos=t.bos if t.add_bos else None)


def start_token(model: Model) -> int:
    """What a text begins with: BOS, else EOS, else token 0."""
    t = model.tokenizer
    return t.bos if t.bos is not None else t.eos if t.eos is not None else 0


def self_samples(
    model: Model,
    n_windows: int,
    length: int,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
    keep: Path | None = None,
) -> Windows:
    """Text that the model itself writes: ancestral sampling at temperature 1.

    Each window begins with `start_token`; where a sampled text ends, the window goes on
    with the next one. Batches of 32 to 128 sequences, by the size of their KV cache, in bfloat16
    where the processor has it natively; seeded, and the same on one machine with one torch version.

    progress: called with the share done, 0 to 1. keep: a file of what is written after each batch,
    from which the same call goes on. Raises `JoulesmithError` for a length beyond the model's
    context.
    """
    import torch
    from transformers import StaticCache

    if length < 2 or n_windows < 1:
        raise JoulesmithError(f"cannot sample {n_windows} windows of {length} tokens")
    most = int(model.module.config.max_position_embeddings)
    if length > most:
        raise JoulesmithError(f"windows of {length} tokens exceed the model's context of {most}")
    generator = torch.Generator().manual_seed(seed)
    out = torch.empty((n_windows, length), dtype=torch.int64)
    out[:, 0] = start_token(model)
    begin = 0
    if keep is not None and keep.exists():
        with np.load(keep, allow_pickle=False) as z:
            begin = len(z["rows"])
            out[:begin] = torch.from_numpy(z["rows"])
            generator.set_state(torch.from_numpy(z["generator"]))
    device = next(model.module.parameters()).device
    weights = _sampling_weights(model.module)
    word = cache_word(model.module)
    with torch.inference_mode(), _threads(), _one_query_attention(model.module) as seen:
        batch = _side_by_side(model.module.config, n_windows, length)
        for at in range(begin, n_windows, batch):
            rows = out[at : at + batch]
            # One allocation for all steps: a cache that grows by concatenation leaves
            # holes in memory, as large again as itself.
            cache = step = None  # of the batch before
            cache = StaticCache(config=model.module.config, max_cache_len=length)
            for i in range(1, length):
                seen[0] = i
                given = {"input_ids": rows[:, i - 1 : i].to(device), word: cache}
                step = torch.func.functional_call(
                    model.module, weights, kwargs={**given, "use_cache": True}
                )
                rows[:, i] = _draw(step.logits[:, -1], generator)
                if progress is not None:
                    done = at * (length - 1) + i * rows.shape[0]
                    progress(done / (n_windows * (length - 1)))
            if keep is not None:
                with atomic_path(keep) as path, path.open("wb") as f:
                    done_rows = out[: at + rows.shape[0]].numpy()
                    np.savez(f, rows=done_rows, generator=generator.get_state().numpy())
    tokens = out.numpy().astype(np.int32)
    digest = hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()
    return Windows(tokens, f"{model.name}'s own samples (temperature 1, seed {seed})", digest)


def _side_by_side(config: Any, n: int, length: int) -> int:
    """How many of ``n`` texts to sample at once: weights are read once for all of them. By sizes
    alone, so that the same text comes out whatever the machine's memory."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = 2 * 2 * length * config.num_hidden_layers * heads * width  # keys, values; bfloat16
    least, most = _BATCHES
    batch = min(most, max(least, _CACHE // int(each)))
    return -(-n // -(-n // batch))  # batches of one size


def _draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token a row, by inverting the distribution function at a uniform number."""
    import torch

    share = torch.softmax(logits.float().cpu(), -1).cumsum(-1)
    uniform = torch.rand((share.shape[0], 1), generator=generator)
    # Scaled by the last sum: rounding keeps it from being exactly one.
    drawn = torch.searchsorted(share, uniform * share[:, -1:], right=True)
    return drawn[:, 0].clamp(max=share.shape[1] - 1)


def _sampling_weights(module: Any) -> dict[str, torch.Tensor]:
    """bfloat16 copies where the processor multiplies them natively (about twice as fast)
    and memory allows; else nothing, and the module's own weights are used."""
    import psutil
    import torch

    native = any(
        getattr(torch.cpu, f"_is_{unit}_supported", lambda: False)()
        for unit in ("avx512_bf16", "amx_tile")
    )
    first = next(module.parameters())
    needed = 2 * sum(p.numel() for p in module.parameters())
    if not native or first.device.type != "cpu" or first.dtype != torch.float32:
        return {}
    if psutil.virtual_memory().available < 2 * needed:
        return {}
    return {n: p.detach().to(torch.bfloat16) for n, p in module.named_parameters()}


@contextmanager
def _one_query_attention(module: Any) -> Iterator[list[int]]:
    """Attention as two batched products while one token at a time is read.

    Yields a list whose first element is to be set to the number of tokens read so far,
    this one included: the cache is longer than that.

    torch's fused kernel is made for many queries: with one, in bfloat16 on a CPU, it
    takes ten times as long as this and more than the rest of the model.
    """
    usual = module.config._attn_implementation
    seen = [0]
    try:
        from transformers import AttentionInterface

        AttentionInterface.register("joulesmith_one_query", partial(_attend, seen))
        module.set_attn_implementation("joulesmith_one_query")
    except (ImportError, AttributeError):  # older transformers: slower, the same text
        yield seen
        return
    try:
        yield seen
    finally:
        module.set_attn_implementation(usual)


def _attend(
    seen: list[int],
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query (b, heads, 1, d), key and value (b, kv_heads, room, d) -> (b, 1, heads, d).

    The newest token sees the ``seen[0]`` that are there. Lengths go in steps of 64: for
    each shape, the maths library compiles a kernel and keeps it, 300 MB for 256 of them.
    """
    import torch

    b, kv, room, d = key.shape
    n = min(room, -(-seen[0] // 64) * 64)
    key = key[:, :, :n].reshape(b * kv, n, d)  # views: the room behind stays where it is
    value = value[:, :, :n].reshape(b * kv, n, d)
    scores = torch.bmm(query.reshape(b * kv, -1, d), key.transpose(1, 2)).float() * scaling
    scores[..., seen[0] :] = -torch.inf
    share = scores.softmax(-1).to(value.dtype)
    return torch.bmm(share, value).reshape(b, 1, -1, d), None


@contextmanager
def _threads() -> Iterator[None]:
    """One thread instead of torch's number where a trial says that it is faster.

    On cores shared with other work, threads wait for each other at every operation
    and a step of sampling, a few hundred small operations, takes ten times as long.
    """
    import torch

    usual = torch.get_num_threads()
    x, w = torch.zeros(_BATCHES[0], 512), torch.zeros(512, 1024)

    def trial(n: int) -> float:
        torch.set_num_threads(n)
        begun = time.perf_counter()
        for _ in range(10):
            x @ w
        return time.perf_counter() - begun

    try:
        if usual > 1:
            trial(usual)  # starts the threads
            many, one = trial(usual), trial(1)
            torch.set_num_threads(1 if one < many else usual)
        yield
    finally:
        torch.set_num_threads(usual)


def _dataset(ref: str) -> Text:
    try:
        load_dataset = import_module("datasets").load_dataset
    except ImportError as e:
        raise MissingExtraError("datasets") from e
    found = re.fullmatch(r"hf:([\w./-]+)(?::([\w.-]*))?(?::([\w.\[\]:%-]+))?", ref)
    if found is None:
        raise JoulesmithError(f"not a dataset name: {ref}: write hf:name[:config[:split]]")
    name, config, part = found[1], found[2] or None, found[3] or "train"
    try:
        rows = load_dataset(name, config, split=part)
        texts = [t for t in rows["text"] if isinstance(t, str)]
    except Exception as e:  # a dozen network and format exceptions, all the same to the user
        line = (str(e).strip().splitlines() or [""])[0][:160]
        raise JoulesmithError(
            f"cannot get dataset {name}: {type(e).__name__}: {line}: give a text file"
        ) from e
    if not any(t.strip() for t in texts):
        raise JoulesmithError(f"dataset {name} has no text: give a text file")
    return _text("\n".join(texts), f"{name} {config or ''} {part}".replace("  ", " "))


def _text(text: str, source: str) -> Text:
    return Text(text, source, hashlib.sha256(text.encode("utf-8")).hexdigest())
