"""The GGUF adapter in llama.cpp itself: its logits are those of the merged weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from joulesmith import models
from joulesmith.engines.llama_abi import find_library
from joulesmith.errors import JoulesmithError
from joulesmith.export.gguf import write_float_gguf
from joulesmith.export.lora import write_gguf_lora
from tiny import write_tiny

# In a process of its own: llama.cpp aborts where it is not pleased.
RUN = """
import ctypes as C, sys
import numpy as np
from joulesmith.engines.llama_abi import open_library
from joulesmith.engines.llama_model import Model
base, adapter, out = sys.argv[1:]
library = open_library()
model = Model(library, base, 64, 1)
ids = np.arange(40, dtype=np.int32)
before = model.logits(ids)
c = library.c
c.llama_adapter_lora_init.restype = C.c_void_p
c.llama_adapter_lora_init.argtypes = [C.c_void_p, C.c_char_p]
found = c.llama_adapter_lora_init(model._model, adapter.encode())
assert found, library.take_errors()
c.llama_set_adapters_lora.argtypes = [C.c_void_p, C.c_void_p, C.c_size_t, C.c_void_p]
adapters, scales = (C.c_void_p * 1)(found), (C.c_float * 1)(1.0)
assert c.llama_set_adapters_lora(model._context, adapters, 1, scales) == 0
np.savez(out, before=before, after=model.logits(ids))
"""


def test_llama_cpp_adds_the_factors(tmp_path: Path) -> None:
    try:
        library = find_library()
    except JoulesmithError:
        pytest.skip("no llama.cpp here")
    if b"llama_set_adapters_lora" not in library.read_bytes():
        pytest.skip("this llama.cpp has another interface for adapters")
    model = models.load(write_tiny(tmp_path / "model", steps=1))
    g = torch.Generator().manual_seed(0)
    pairs = {}
    # attn_q and attn_k have rows in another order in GGUF; ranks differ
    for name, rank in (
        ("blk.0.attn_q.weight", 3),
        ("blk.1.attn_k.weight", 7),
        ("blk.0.ffn_down.weight", 5),
    ):
        rows, columns = model.ref(name).shape
        outer = 0.1 * torch.randn(rows, rank, generator=g)
        pairs[name] = (outer, 0.3 * torch.randn(rank, columns, generator=g))
    write_float_gguf(model, tmp_path / "base.gguf", "F32")
    write_gguf_lora(model, pairs, tmp_path / "adapter.gguf", type="F32")
    command = [sys.executable, "-c", RUN]
    command += [str(tmp_path / n) for n in ("base.gguf", "adapter.gguf", "out.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(tmp_path / "out.npz")
    for name, (outer, inner) in pairs.items():
        models.set_gguf_weight(model, name, models.gguf_weight(model, name) + outer @ inner)
    with torch.no_grad():
        expected = model.module(torch.arange(40)[None]).logits[0].numpy()
    assert np.abs(found["after"] - expected).max() < 2e-2
    assert np.abs(found["before"] - expected).max() > 0.1
