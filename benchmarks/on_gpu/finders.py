"""Part (f): run Accelerate's finder and a halving loop.

The same models and limits as in part (a). Accelerate's `find_executable_batch_size` as its guide has it, with its own
steps (times 0.9) and with halving; windows of two micro-batches, two windows a size. What was found is then trained in
a fresh process, as in part (a).
"""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

from autoaccum.window import step
from benchmarks.truth_search import count

from . import apart
from .job import Job
from .loops import hand_written
from .memory import WINDOWS, limit_to, trained
from .models import MODELS, made, on_device

START = {"resnet50-fp32": 1024, "vit-b16-bf16": 1024, "gpt2-bf16": 256, "bert-fp32": 512}


def run(job: Job) -> None:
    """Search one model by each finder."""
    made(job.model)
    for name in ("halving", "accelerate"):
        if name in job.known:
            continue
        try:
            import accelerate
        except ImportError:
            job.emit("skipped", why="accelerate isn't installed")
            return
        found = apart.call(search, job.model, name)
        found |= {"version": accelerate.__version__, "start": START[job.model]}
        if found["chosen"]:
            size = (found["chosen"],) * 2
            afresh = apart.call(trained, job.model, size, MODELS[job.model].limit_bytes, True, WINDOWS)
            found |= {"trains afresh": not afresh["ooms"], "retries afresh": afresh["retries"]}
        job.emit(name, **found)


def search(name: str, finder: str) -> dict[str, Any]:
    """Search in this process; return the size and its cost."""
    from accelerate.utils import find_executable_batch_size

    limit_to(MODELS[name].limit_bytes)
    work = on_device(name)
    size, tries = START[name], 0

    def half() -> int:
        nonlocal size
        size //= 2
        return size

    how = {"reduce_batch_size_fn": half} if finder == "halving" else {}

    @find_executable_batch_size(starting_batch_size=size, **how)
    def train(batch_size: int) -> int:
        nonlocal tries
        tries += 1
        work.model.zero_grad(set_to_none=True)
        window = hand_written(work, step.open_context(work).optimizer, batch_size, 2)
        for _ in range(2):
            window()
        torch.cuda.synchronize()
        return batch_size

    started = time.perf_counter()
    try:
        chosen = int(train())
    except RuntimeError as error:
        chosen, failure = 0, str(error).splitlines()[0]
    else:
        failure = ""
    seconds = time.perf_counter() - started
    gc.collect()
    return {"chosen": chosen, "failure": failure, "seconds": seconds, "tries": tries, "ooms": count("num_ooms")}
