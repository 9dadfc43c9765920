"""Plan on this machine's GPU and measure: `python -m benchmarks.on_gpu`.

It needs a real GPU.
"""

from __future__ import annotations

import sys
from typing import Any

from .models import MODELS

TARGET = 512


def why_not() -> str:
    """Why nothing can be measured here; empty where it can."""
    import torch

    from autoaccum.devices.virtual.control import is_virtual

    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    return "the GPU is a virtual one, which has no times" if is_virtual() else ""


def table(quick: bool = False) -> list[dict[str, Any]]:
    """Return one row for each model: its verified plan and step time."""
    import torch

    from autoaccum import fit_plan

    from .models import make

    rows = []
    for name in list(MODELS)[: 2 if quick else None]:
        workload = make(name)
        workload.model.cuda()
        plan = fit_plan(workload, target_batch=TARGET, budget="4GiB")
        assert plan.measured_peak_bytes is not None and plan.timing.window_seconds is not None
        rows.append(
            {
                "model": name,
                "GPU": torch.cuda.get_device_name(),
                "steps": plan.accumulation_steps,
                "micro-batch": plan.micro_batch,
                "predicted GiB": plan.predicted_peak_bytes / 2**30,
                "measured GiB": plan.measured_peak_bytes / 2**30,
                "error %": 100 * (plan.predicted_peak_bytes / plan.measured_peak_bytes - 1),
                "step s": plan.timing.window_seconds,
                "planning s": plan.provenance.planning_seconds,
            }
        )
        del workload
    return rows


def main() -> None:
    """Run the command line."""
    why = why_not()
    if why:
        sys.exit(f"skipped: {why}")
    import pandas

    print(pandas.DataFrame(table()).to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
