"""One run of a peer in an interpreter of its own: ``python -m benchmarks.quantizers.worker``.

Reads tasks (JSON), calls a peer, writes its weights in float32 and what they cost.
Imports nothing of joulesmith, so that it runs beside any peer's dependencies. The clock and
the peak of memory cover the peer's work only, not importing or loading.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def status_bytes(field: str) -> int:
    """A line of /proc/self/status such as VmHWM (peak) or VmRSS, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    return 0


def main() -> None:
    """Run the tasks of ``sys.argv[1]`` one after another; each fills a folder of its own."""
    listed: list[dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text())
    for task in listed:
        place = Path(task["place"])
        try:
            result = _one(task, place)
        except Exception as e:  # any peer, any failure: told in the table, not raised
            traceback.print_exc()
            last = (str(e).strip().splitlines() or [""])[0]
            result = {"error": f"{type(e).__name__}: {last}"[:300]}
        temporary = place / "result.tmp"
        temporary.write_text(json.dumps(result))
        temporary.rename(place / "result.json")
        gc.collect()


def _one(task: dict[str, Any], place: Path) -> dict[str, Any]:
    import numpy as np
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(int(task["threads"]))
    windows = np.load(task["tokens"], allow_pickle=False)[: task["windows"]]
    peer = importlib.import_module(f"{task['package']}.peers.{task['peer']}")
    by_name = importlib.import_module(f"{task['package']}.settings").by_name
    setting = by_name(task["setting"])
    torch.manual_seed(task["seed"])
    importlib.import_module("transformers.models.llama.modeling_llama")
    peer.warm_imports()
    imported = status_bytes("VmRSS")
    model = peer.load(Path(task["folder"]), task)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    begun, cpu = time.monotonic(), time.process_time()
    act = getattr(peer, task["action"])
    changed = act(model, windows, setting, task["variant"], task["seed"])
    seconds, cpu_seconds = time.monotonic() - begun, time.process_time() - cpu
    peak = status_bytes("VmHWM")
    state, *bits, words = peer.weights(changed, setting, task["variant"])
    forward = getattr(peer, "forward", None)
    check = None
    if forward is not None:
        ids = torch.from_numpy(windows[:1].astype(np.int64))
        check = _difference(forward(changed, ids), state, Path(task["folder"]), ids)
    kept = {k: v.detach().to(torch.float32).contiguous().clone() for k, v in state.items()}
    save_file(kept, place / "weights.safetensors")
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "rss_imported": imported,
        "weight_bytes": _size(Path(task["folder"])),
        "rss_peak": peak,
        **({"bits_per_weight": bits[0]} if bits else {}),
        "words": words,
        "versions": peer.versions(),
        "forward_check": check,
    }


def _size(folder: Path) -> int:
    """Of the float model's weights. They may be mapped from the file, and count as they are
    touched: so what a peer needs besides is told from this, not from what loading made resident."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def _difference(theirs: Any, state: dict[str, Any], folder: Path, ids: Any) -> float:
    """Largest difference of logits: the peer's own forward against the weights handed over."""
    import torch
    from benchmarks.quantizers.peers.common import load_llama

    plain = load_llama(folder)
    plain.load_state_dict(state, strict=False)
    with torch.no_grad():
        ours = plain(input_ids=ids).logits
    return float((theirs.float() - ours).abs().max())


if __name__ == "__main__":
    main()
