"""Part (g): the commands, as a person types them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .job import Job

MEMORY = "6GiB"
TUNE_SECONDS = "TUNE_SECONDS"  # a real card's are 20
COMMANDS: dict[str, tuple[str, ...]] = {
    "doctor": ("doctor",),
    "plan": ("plan", "--target-batch", "512", "--device", "cuda", "--memory", MEMORY, "-o", "plan.json", "--force"),
    "explain": ("explain", "plan.json"),
    "run": ("run", "plan.json", "--steps", "4"),
    "bench": (
        "bench", "--target-batch", "512", "--device", "cuda", "--memory", MEMORY, "--tune-trials", "0",
        "--windows", "3",
    ),
    "tune": (
        "tune", "--target-batch", "512", "--device", "cuda", "--memory", MEMORY, "--timeout", TUNE_SECONDS,
        "--trials", "6", "-o", "tuned.json", "--force",
    ),
}  # fmt: skip
LIMIT_SECONDS = 150.0
VIRTUAL_SLOWNESS = 10  # of shared cores


def run(job: Job) -> None:
    """Run the commands one after the other, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="on-gpu-") as folder:
        for name, arguments in COMMANDS.items():
            if name in job.known and job.known[name].get("code") == 0 and name != "plan":
                continue
            slowness = VIRTUAL_SLOWNESS if job.is_virtual else 1
            typed = [str(20 * slowness) if word == TUNE_SECONDS else word for word in arguments]
            job.emit(name, **command(typed, Path(folder), slowness * LIMIT_SECONDS))


def command(arguments: Sequence[str], folder: Path, limit_seconds: float) -> dict[str, Any]:
    """Run one command; return its exit code, seconds and what it printed."""
    started = time.perf_counter()
    whole = [sys.executable, "-m", "autoaccum", *arguments]
    try:
        out = subprocess.run(whole, cwd=folder, capture_output=True, text=True, timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        said = f"no answer within {limit_seconds:.0f} s"
        return {"typed": " ".join(arguments), "code": None, "seconds": limit_seconds, "printed": "", "said": said}
    found: dict[str, Any] = {
        "typed": " ".join(arguments),
        "code": out.returncode,
        "seconds": time.perf_counter() - started,
        "printed": out.stdout[-3000:],
        "said": out.stderr[-800:],
    }
    if "plan.json" in arguments and (folder / "plan.json").exists():
        plan = json.loads((folder / "plan.json").read_text())
        found |= {
            "split": plan["schedule"]["split"],
            "predicted": plan["memory"]["predicted_peak_bytes"],
            "measured": plan["evidence"]["measured_peak_bytes"],
        }
    steps = re.findall(r"(\d+) optimizer steps?", out.stdout)
    return found | ({"steps": int(steps[-1])} if steps else {})
