"""Part (g): the commands, as a person types them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .job import Job

MEMORY = "6GiB"
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
        "tune", "--target-batch", "512", "--device", "cuda", "--memory", MEMORY, "--timeout", "20", "--trials", "6",
        "-o", "tuned.json", "--force",
    ),
}  # fmt: skip
LIMIT_SECONDS = 150


def run(job: Job) -> None:
    """Run the commands one after the other, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="on-gpu-") as folder:
        for name, arguments in COMMANDS.items():
            if name in job.known and job.known[name].get("code") == 0 and name != "plan":
                continue
            job.emit(name, **command(arguments, Path(folder)))


def command(arguments: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Run one command; return its exit code, seconds and what it printed."""
    started = time.perf_counter()
    whole = [sys.executable, "-m", "autoaccum", *arguments]
    try:
        out = subprocess.run(whole, cwd=folder, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return {"typed": " ".join(arguments), "code": None, "seconds": float(LIMIT_SECONDS), "printed": "", "said": ""}
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
