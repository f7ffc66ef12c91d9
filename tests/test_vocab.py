"""Encoding; what the tokens are is looked at with the models that have them."""

from __future__ import annotations

import threading
from pathlib import Path

from joulesmith import models
from joulesmith.text import english
from tiny import write_tiny


def test_other_threads_run_while_a_large_text_is_encoded(tmp_path: Path) -> None:
    """Meters, the line of progress and signs of life among ranks are in some."""
    tokenizer = models.load(write_tiny(tmp_path / "tiny")).tokenizer
    text = english().text[:100_000] * 20
    ended, turns = threading.Event(), 0

    def count() -> None:
        nonlocal turns
        while not ended.wait(0.001):
            turns += 1

    other = threading.Thread(target=count)
    other.start()
    found = tokenizer.encode(text)
    during = turns
    ended.set()
    other.join()
    assert during > 20, "of hundreds"
    assert found == tokenizer.backend.encode(text, add_special_tokens=False).ids
