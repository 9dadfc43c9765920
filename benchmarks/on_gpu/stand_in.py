"""Part (b): plan the same models by `autoaccum plan --gpu`.

On the virtual GPU, with the same bytes for torch's allocator.

With part (a) on the same card, what differs is the virtual GPU's own: its workspaces, and what it doesn't model.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from autoaccum.devices import virtual

from .job import Job
from .models import MODELS


def run(job: Job) -> None:
    """Plan one model for the card's row in the table of GPUs."""
    reason = virtual.available()
    if reason is not None:
        job.emit("skipped", why=f"no virtual GPU here: {reason}")
        return
    model = MODELS[job.model]
    place = f"{Path(__file__).parent / 'models.py'}:{model.make.__name__}"
    # the same bytes for torch's allocator as the memory fraction gives in part (a)
    memory = model.limit_bytes + int(job.card["spec outside bytes"])
    command = [
        sys.executable, "-m", "autoaccum", "plan", "--gpu", job.card["spec"], "--memory", str(memory),
        "--target-batch", str(model.target), "--workload", place, "--json",
    ]  # fmt: skip
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode == 3:
        job.emit("plan", refused=out.stderr.strip()[-600:])
        return
    if out.returncode:
        raise RuntimeError(f"exit code {out.returncode}: {out.stderr.strip()[-1200:]}")
    plan = json.loads(out.stdout)
    schedule, memory_section = plan["schedule"], plan["memory"]
    job.emit(
        "plan", gpu=job.card["spec"], split=schedule["split"], largest=schedule["largest_micro_batch"],
        budget=memory_section["budget"]["bytes"], predicted=memory_section["predicted_peak_bytes"],
        retries=memory_section["retries"], method=plan["evidence"]["method"],
        seconds=plan["provenance"]["planning_seconds"],
    )  # fmt: skip
