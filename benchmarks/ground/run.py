"""Train benchmarks on a virtual GPU and print the memory reserved.

`python -m benchmarks.ground.run`, started on a virtual GPU.

Reads lines of JSON, `["bert-fp32", 16]`, and writes one for each. A benchmark trains in a separate process, forked
from this one, which has imported everything and never touched CUDA.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from autoaccum.devices.cuda.allocator_rules import find_rules
from autoaccum.devices.cuda.recorder import record
from autoaccum.simulation.cuda_allocator.replay import replay_cuda
from autoaccum.simulation.cuda_allocator.settings import CudaRules

from ..truth import forked
from . import loops, models

OnPhase = Callable[[str], AbstractContextManager[Any]]
STEPS = 6  # what is reserved stays from the third on, or the fourth


def train(name: str, n: int) -> dict[str, Any]:
    """Train a few steps, then replay them by autoaccum's own rules.

    Returns:
        Most bytes that were `reserved` and `allocated`; the allocator's `retries`; whether it ran `out` of memory; and
        the same four, `replayed`.
    """
    warnings.simplefilter("ignore")
    rules = _rules()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["num_alloc_retries"]
    failed = []

    def run(on_phase: OnPhase) -> None:
        with on_phase("train"):
            try:
                _steps(name, n)
            except torch.OutOfMemoryError:
                failed.append(name)

    recording = record(run, micro_batch=n)
    stats = torch.cuda.memory_stats()
    replay = replay_cuda(recording.phases, rules)
    return {
        "reserved": stats["reserved_bytes.all.peak"],
        "allocated": stats["allocated_bytes.all.peak"],
        "retries": stats["num_alloc_retries"] - before,
        "out": bool(failed),
        "replayed": {
            "reserved": replay.peak_reserved_bytes,
            "allocated": replay.peak_allocated_bytes,
            "retries": sum(replay.retries),
            "out": replay.out_of_memory is not None,
        },
    }


def _rules() -> CudaRules:
    """Return the allocator's rules here, with free memory as the capacity."""
    free, total = torch.cuda.mem_get_info()
    found = find_rules(0)
    text = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    rules = CudaRules.from_settings(text, device_bytes=total, capacity_bytes=free)
    return dataclasses.replace(rules, tie_rule=found.tie_rule, addresses_down=found.addresses_down)


def _steps(name: str, n: int) -> None:
    if name == models.LIGHTNING:
        loops.lightning(models.lightning_model, n, STEPS)
        return
    for _ in itertools.islice(models.BENCHMARKS[name](n), STEPS):
        pass


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
