"""`python -m benchmarks.ground.run`, started on a virtual GPU: trains benchmarks there and tells what was reserved.

Reads lines of JSON, `["bert-fp32", 16]`, and writes one for each. A benchmark trains in a process of its own, forked
from this one, which has imported everything and never touched CUDA.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch

from ..truth import forked
from . import loops, models

STEPS = 12  # at most
UNCHANGED = 3  # steps after which what is reserved is taken to stay


class _Watch:
    """What is reserved after each step, and whether enough were seen."""

    def __init__(self) -> None:
        self.reserved: list[int] = []

    def after_step(self) -> bool:
        self.reserved.append(torch.cuda.max_memory_reserved())
        return len(self.reserved) > UNCHANGED and self.reserved[-1] == self.reserved[-1 - UNCHANGED]


def train(name: str, n: int) -> dict[str, Any]:
    """Trains until what is reserved stays.

    Returns:
        Bytes (`reserved`, `allocated`), `steps`, the allocator's `retries`, and whether it ran `out` of memory.
    """
    warnings.simplefilter("ignore")
    watch = _Watch()
    out = False
    try:
        if name == models.LIGHTNING:
            loops.lightning(models.lightning_model, n, UNCHANGED + 3, lambda: None if watch.after_step() else None)
        else:
            for _ in models.BENCHMARKS[name](n):
                if watch.after_step() or len(watch.reserved) == STEPS:
                    break
    except torch.OutOfMemoryError:
        out = True
    return {
        "reserved": torch.cuda.max_memory_reserved(),
        "allocated": torch.cuda.max_memory_allocated(),
        "steps": len(watch.reserved),
        "retries": torch.cuda.memory_stats()["num_alloc_retries"],
        "out": out,
    }


def _import_for(names: list[str]) -> None:
    """What is imported here needn't be imported in each process."""
    import importlib

    wanted = {"torchvision", *(("timm",) if "focalnet" in names else ())}
    for module in wanted:
        importlib.import_module(module)
    with torch.device("meta"):
        for name in (models.BERT, models.T5, models.REFORMER, models.WHISPER):
            models._hugging_face(name)


def main() -> None:
    """Answers line by line."""
    rows = [json.loads(line) for line in sys.stdin]
    _import_for([name for name, _ in rows])
    for name, n in rows:
        try:
            answer = forked(lambda name=name, n=n: train(name, n))
        except RuntimeError as error:
            answer = {"failed": str(error)}
        print(json.dumps([name, n, answer]), flush=True)


if __name__ == "__main__":
    main()
