"""Train benchmarks on a virtual GPU and print the memory reserved.

`python -m benchmarks.ground.run`, started on a virtual GPU.

Reads lines of JSON, `["bert-fp32", 16]`, and writes one for each. A benchmark trains in a separate process, forked
from this one, which has imported everything and never touched CUDA.
"""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from typing import Any

import torch

from ..truth import forked
from . import loops, models

STEPS = 6  # what is reserved stays from the third on, or the fourth


def train(name: str, n: int) -> dict[str, Any]:
    """Trains a few steps.

    Returns:
        Most bytes that were `reserved` and `allocated`; the allocator's `retries`; whether it ran `out` of memory.
    """
    warnings.simplefilter("ignore")
    out = False
    try:
        if name == models.LIGHTNING:
            loops.lightning(models.lightning_model, n, STEPS)
        else:
            for _ in itertools.islice(models.BENCHMARKS[name](n), STEPS):
                pass
    except torch.OutOfMemoryError:
        out = True
    return {
        "reserved": torch.cuda.max_memory_reserved(),
        "allocated": torch.cuda.max_memory_allocated(),
        "retries": torch.cuda.memory_stats()["num_alloc_retries"],
        "out": out,
    }


def _import_for(names: set[str]) -> None:
    """Import before forking what each process would otherwise import."""
    import torchvision  # noqa: F401

    if "focalnet" in names:
        import timm  # noqa: F401
    if models.LIGHTNING in names:
        import lightning  # noqa: F401
    with torch.device("meta"):
        for name in models.TEXT & names:
            models.make_text_model(name)


def main() -> None:
    """Answers line by line."""
    rows = [json.loads(line) for line in sys.stdin]
    _import_for({name.split("-")[0] for name, _ in rows})
    for name, n in rows:
        try:
            answer = forked(lambda name=name, n=n: train(name, n))
        except RuntimeError as error:
            answer = {"failed": str(error)}
        print(json.dumps([name, n, answer]), flush=True)


if __name__ == "__main__":
    main()
