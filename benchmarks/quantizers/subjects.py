"""The models of the comparison, each as a Hugging Face folder with its token windows.

stories260K was trained in float32 and never quantized; its MLP is filled up so that groups of
weights fit, and "stories260K-172" is the same as it came. "shakespeare" is trained here;
SmolLM2-135M is dequantized from Q4_1, the only form at hand.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LENGTH = 256
SUBJECTS = ("stories260K", "stories260K-172", "shakespeare", "smollm2")


@dataclass(frozen=True)
class Places:
    """Where the texts and models are that the project does not ship."""

    shakespeare: Path
    wikitext_valid: Path
    wikitext_test: Path
    stories: Path


@dataclass(frozen=True)
class Subject:
    """folder: of the model. origin, evaluated_on, calibrated_on: one phrase each."""

    name: str
    folder: Path
    origin: str
    evaluation: NDArray[np.int32]
    evaluated_on: str
    calibrated_on: str


def prepare(name: str, places: Places, work: Path) -> Subject:
    """Make the model's folder under ``work``, or find it there, and its evaluation windows."""
    folder = work / "models" / name
    if not (folder / "done.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        origin = {
            "stories260K": _stories,
            "stories260K-172": _stories_172,
            "shakespeare": _shakespeare,
            "smollm2": _smollm2,
        }[name](places, folder)
        (folder / "done.json").write_text(json.dumps({"origin": origin}))
    origin = json.loads((folder / "done.json").read_text())["origin"]
    tokens, evaluated, calibrated = _evaluation(name, places, folder)
    return Subject(name, folder, origin, tokens, evaluated, calibrated)


def calibration(
    subject: Subject, places: Places, seed: int, count: int, work: Path
) -> NDArray[np.int32]:
    """Windows (count, LENGTH) that no evaluation window shares, by seed; kept in ``work``."""
    path = work / "windows" / f"{subject.name}-{seed}-{count}.npy"
    if path.exists():
        found: NDArray[np.int32] = np.load(path, allow_pickle=False)
        return found
    from joulesmith import models, text

    model = models.load(subject.folder)
    if subject.name.startswith("stories260K"):
        tokens = text.self_samples(model, count, LENGTH, seed).tokens
    elif subject.name == "shakespeare":
        fitted, _ = _halves_of(places.shakespeare)
        tokens = text.windows(model, fitted, LENGTH, {"c": count}, seed)["c"].tokens
    else:
        valid = text.read_text(places.wikitext_valid)
        tokens = text.windows(model, valid, LENGTH, {"c": count}, seed)["c"].tokens
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, tokens)
    return tokens


def _evaluation(name: str, places: Places, folder: Path) -> tuple[NDArray[np.int32], str, str]:
    from joulesmith import models, text

    words = {
        "stories260K": ("its own samples, another seed", "its own samples"),
        "stories260K-172": ("its own samples, another seed", "its own samples"),
        "shakespeare": ("the last tenth of tinyshakespeare", "the rest of tinyshakespeare"),
        "smollm2": ("WikiText-2 raw test", "WikiText-2 validation"),
    }[name]
    path = folder / "evaluation.npy"
    if not path.exists():
        model = models.load(folder)
        if name.startswith("stories260K"):
            tokens = text.self_samples(model, 64, LENGTH, 1_000_003).tokens
        elif name == "shakespeare":
            _, held = _halves_of(places.shakespeare)
            tokens = text.windows(model, held, LENGTH, {"e": 128}, 0)["e"].tokens
        else:
            test = text.read_text(places.wikitext_test)
            tokens = text.windows(model, test, LENGTH, {"e": 48}, 0)["e"].tokens
        np.save(path, tokens)
    tokens = np.load(path, allow_pickle=False)
    return tokens, f"{len(tokens)} windows of {LENGTH} tokens of {words[0]}", words[1]


def _halves_of(path: Path) -> tuple[Any, Any]:
    """The first nine tenths and the last tenth of a text, as `Text`s."""
    from joulesmith import text

    whole = text.read_text(path)
    cut = len(whole.text) * 9 // 10
    parts = whole.text[:cut], whole.text[cut:]
    return tuple(text.Text(p, whole.source, f"{whole.sha256}:{i}") for i, p in enumerate(parts))


# -- the models ---------------------------------------------------------------


def _stories(places: Places, folder: Path) -> str:
    _stories_file(places, folder, 64)
    return "stories260K (llama2.c), trained in float32; MLP filled up with zeros from 172 to 192"


def _stories_172(places: Places, folder: Path) -> str:
    _stories_file(places, folder, 1)
    return "stories260K (llama2.c), trained in float32"


def _stories_file(places: Places, folder: Path, multiple: int) -> None:
    from joulesmith import models

    model = models.load(places.stories / "stories260K.bin")
    pad_mlp(model.module, multiple)
    folder.rmdir()
    models.save(model, folder)


def pad_mlp(module: Any, multiple: int) -> None:
    """Fill the MLP's width up with zeros, in place: the model says the same, and groups fit."""
    import torch
    from torch.nn.functional import pad

    width = module.config.intermediate_size
    more = -width % multiple
    for layer in module.model.layers:
        for name, sides in (("gate_proj", (0, 0, 0, more)), ("up_proj", (0, 0, 0, more)),
                            ("down_proj", (0, more))):  # fmt: skip
            linear = getattr(layer.mlp, name)
            linear.weight = torch.nn.Parameter(pad(linear.weight.detach(), sides))
            linear.out_features, linear.in_features = linear.weight.shape
    module.config.intermediate_size = width + more


def _smollm2(places: Places, folder: Path) -> str:
    from joulesmith import models

    model = models.load("smollm2")
    folder.rmdir()
    models.save(model, folder)
    return model.origin


# Three passes over the text; the loss on its last tenth has levelled off by then
STEPS, BATCH, CONTEXT = 800, 8, 256


def _shakespeare(places: Places, folder: Path, seed: int = 0) -> str:
    """3.3 million parameters, 512 byte-level tokens; minutes on two cores."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    fitted, held = _halves_of(places.shakespeare)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([fitted.text], trainer)
    torch.manual_seed(seed)
    module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    ids = np.asarray(tokenizer.encode(fitted.text).ids)
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS, pct_start=0.1)
    for step in range(STEPS):
        at = rng.integers(0, len(ids) - CONTEXT, BATCH)
        batch = torch.from_numpy(np.stack([ids[a : a + CONTEXT] for a in at])).long()
        with torch.autocast("cpu", torch.bfloat16):  # several times as fast where it is native
            loss = module(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % (STEPS // 8) == 0:
            unseen = _loss(module, tokenizer.encode(held.text).ids)
            told = f"loss {loss.item():.3f}, on the last tenth {unseen:.3f}"
            print(f"shakespeare: step {step + 1} of {STEPS}, {told}", flush=True)
    module.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    count = sum(p.numel() for p in module.parameters())
    return f"a Llama of {count:,} parameters trained here on tinyshakespeare, seed {seed}"


def _loss(module: Any, ids: list[int]) -> float:
    """Nats a token, in windows of LENGTH."""
    import torch

    count = len(ids) // LENGTH
    windows = torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = [module(input_ids=w, labels=w).loss * len(w) for w in windows.split(16)]
    return float(sum(found) / count)
