"""Run one trial in this process: `python -m benchmarks.on_gpu.trial JOB`."""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback

from .job import Job
from .rows import DONE, FAILED, FINAL

PARTS = {
    "a": "memory",
    "b": "stand_in",
    "c": "context",
    "d": "gradients",
    "e": "times",
    "f": "finders",
    "g": "command_line",
    "h": "libraries",
}


def main() -> None:
    """Run the job of the command line; its rows are printed."""
    started = time.monotonic()
    job = Job.from_json(sys.argv[1])
    try:
        _import_once(job)
        importlib.import_module(f".{PARTS[job.part]}", __package__).run(job)
    except Exception as error:
        last = str(error).strip().splitlines() or [type(error).__name__]
        job.emit(
            FINAL, status=FAILED, why=last[-1][:400], trace=traceback.format_exc()[-3000:],
            seconds=time.monotonic() - started,
        )  # fmt: skip
    else:
        job.emit(FINAL, status=DONE, seconds=time.monotonic() - started)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # libraries' threads may still be ending


def _import_once(job: Job) -> None:
    """Import what every fork would import again."""
    if job.part in ("b", "g"):
        return
    import torch

    torch.set_num_threads(1)
    for name in ("torch._dynamo", "torchvision", "transformers"):
        importlib.import_module(name)
    if "compiled" in job.model and not job.is_virtual:
        importlib.import_module("torch._inductor.compile_fx")


if __name__ == "__main__":
    main()
