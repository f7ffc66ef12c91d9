"""One rank of `test_parallel`: does what its argument, JSON, says, and writes what it found.

Started as torchrun starts it: the group is in the environment.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from joulesmith.errors import JoulesmithError
from joulesmith.ranks import leaving, shared
from joulesmith.train import group, losses
from joulesmith.train.loop import train
from joulesmith.train.outputs import run
from joulesmith.train.parallel import ParallelSettings, ranks, whole
from joulesmith.train.scores import HeldOut
from joulesmith.train.settings import TrainSettings
from joulesmith.train.zeros import KeepZeros

VOCAB = 32
WINDOWS = np.random.default_rng(0).integers(0, VOCAB, (24, 10)).astype(np.int32)
WINDOWS[:, 1::2] = (WINDOWS[:, ::2] + 1) % VOCAB  # something to learn


def model() -> nn.Module:
    """A Llama of two layers with grouped heads and a head that is the embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        tie_word_embeddings=True,
    )  # fmt: skip
    found: nn.Module = LlamaForCausalLM(config).float()
    return found


def objective(module: nn.Module, tokens: Tensor, places: NDArray[np.int64]) -> Tensor:
    return losses.hard(run(module, tokens[:, :-1]).logits, tokens[:, 1:])


def judge(module: nn.Module) -> float:
    tokens = torch.from_numpy(WINDOWS.astype(np.int64))
    return float(objective(module, tokens, np.arange(len(tokens))))


class Step:
    """Progress that ends this process, or its training, at a step."""

    def __init__(self, at: int, how: str) -> None:
        self.left, self.how = at, how

    def __call__(self, share: float) -> None:
        self.left -= 1
        if self.left == 0:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise JoulesmithError("that is enough")


def trained(task: dict[str, Any]) -> dict[str, Any]:
    module = model()
    hook = None
    if task.get("zeros"):
        with torch.no_grad():
            for n, p in module.named_parameters():
                if "proj" in n:
                    p[:, ::2] = 0
        hook = KeepZeros(module.parameters())
    how = ParallelSettings(**task.get("parallel", {"probe": 0}))
    rank = int(os.environ.get("RANK", 0))
    ends = rank == task.get("ends", -1)
    folder = task.get("folder")
    if task.get("own"):
        folder = f"{folder}/{rank}"
    found = train(
        module, WINDOWS, objective,
        TrainSettings(**{"steps": 6, "batch": 8, "micro": 2, "rate": 1e-2, **task.get("settings", {})}),
        judge=judge, parallel=how, hook=hook, folder=None if folder is None else Path(folder),
        save_seconds=0.0 if folder else 60.0,
        progress=Step(task["at"], task["how"]) if ends else lambda _: None,
    )  # fmt: skip
    state = {n: p.double().sum().item() for n, p in module.named_parameters()}
    out = {
        "losses": found.losses, "curve": [x for _, x in found.curve], "sums": state,
        "joules": found.joules, "pedigree": found.pedigree, "bytes": found.optimizer_bytes,
        "zeros": sum(int((p == 0).sum()) for p in module.parameters()),
        "whole": sorted(whole(module)) if rank == 0 else len(whole(module)),
    }  # fmt: skip
    if (s := found.scaling) is not None:
        out["scaling"] = [s.plan, s.speed_up, s.joules_ratio, s.communication, s.note]
    return out


def fail_amid_a_sum(told: bool = False) -> None:
    """told: by SIGTERM, when its last words are all that is left. The second rank fails while a sum is under way that the first, waiting for it, never joins."""
    if torch.distributed.get_rank() == 0:
        torch.distributed.recv(torch.ones(2), src=1, tag=7)
    if told:
        real = group._Group._ended

        def ended(self: Any, e: BaseException) -> BaseException:
            os.kill(os.getpid(), signal.SIGTERM)
            return real(self, e)

        group._Group._ended = ended  # type: ignore[method-assign]
    under_way = torch.distributed.all_reduce(torch.ones(2), async_op=True)
    raise JoulesmithError(f"that is enough{'' if under_way else ': nothing is under way'}")


def meet(silent: bool) -> None:
    """The second rank, which the first cannot see, fails and stays, or falls silent after a while;
    the first waits for it."""
    if silent:
        group._BEAT, group._SILENCE = 0.5, 4.0
    assert group._Group.current is not None
    group._Group.current.peers.clear()
    if torch.distributed.get_rank() == 0:
        group.meet()
    if silent:
        time.sleep(8)
        print(json.dumps([1, {"heard": True}]), flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    raise JoulesmithError("that is enough")


def done(task: dict[str, Any]) -> dict[str, Any]:
    if task.get("do") == "fail":
        fail_amid_a_sum(task.get("told", False))
    if task.get("do") == "meet":
        meet(task.get("silent", False))
    if task.get("do") != "shared":
        return trained(task)
    found: dict[str, Any] = {
        "seventh": shared(range(7), lambda part: [i / 7 for i in part]),
        "loss": HeldOut(WINDOWS)(model()),
    }
    try:
        shared([1, 2], lambda part: [1 / (i - 1) for i in part])
    except (JoulesmithError, ZeroDivisionError) as e:
        found["failed"] = f"{type(e).__name__}: {e}"
    return found


def main() -> None:
    with leaving():
        _main()


def _main() -> None:
    torch.set_num_threads(1)
    try:
        with ranks("cpu", timeout=120) as me:
            for task in json.loads(sys.argv[1]):
                try:
                    found = done(task)
                except JoulesmithError as e:
                    if "ends" in task:
                        raise
                    found = {"error": str(e)}
                print(json.dumps([me.rank, found]), flush=True)
    except JoulesmithError as e:
        print(f"joulesmith: {e}", file=sys.stderr)
        if '"meet"' in sys.argv[1] and os.environ["RANK"] == "1":
            time.sleep(100)  # its process is there
        sys.exit(e.exit_code)


if __name__ == "__main__":
    main()
