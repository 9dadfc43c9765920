"""Run functions in processes that have never used the GPU before.

A trial's process imports the libraries and makes the model once; each measurement then runs in a fork of it, with a
context and an allocator of its own, as in a new process. Where an import has already opened the GPU (a fork can't use
it then), a new process makes the model again.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.truth_search import forked

ANSWER = "ANSWER "


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a module's function with JSON arguments in a fresh process.

    Returns:
        Its result, through JSON.

    Raises:
        RuntimeError: It raised an error, whose traceback this holds.
    """
    if not gpu_is_open():
        return forked(lambda: _on_gpu(function, arguments))
    place = f"{function.__module__}:{function.__qualname__}"
    command = [sys.executable, "-m", "benchmarks.on_gpu.apart", place, json.dumps(arguments)]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = [line.removeprefix(ANSWER) for line in out.stdout.splitlines() if line.startswith(ANSWER)]
    if not lines:
        raise RuntimeError(f"{place} ended with exit code {out.returncode} and no answer")
    return json.loads(lines[-1])


def gpu_is_open() -> bool:
    """Return whether this process has opened a real GPU, or torch's CUDA."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return True
    for file in Path("/proc/self/fd").iterdir():
        try:
            if file.readlink().name == "nvidia-uvm":  # cuInit opens it; NVML doesn't
                return True
        except OSError:
            continue
    return False


def _on_gpu(function: Callable[..., Any], arguments: Any) -> Any:
    torch.set_num_threads(1)  # a fork has none of its parent's threads, and OpenMP would wait for them
    return function(*arguments)


def main() -> None:
    """Run one function and print its answer."""
    place, arguments = sys.argv[1:]
    module, _, name = place.partition(":")
    found = _on_gpu(getattr(importlib.import_module(module), name), json.loads(arguments))
    print("\n" + ANSWER + json.dumps(found), flush=True)
    sys.stderr.flush()
    os._exit(0)  # libraries' threads may still be ending


if __name__ == "__main__":
    main()
