"""Compute the budget on a GPU that need not be there.

No torch here.
"""

from __future__ import annotations

from ...budget import Budget, BudgetItem
from ...errors import UsageError
from ...units import parse_bytes, parse_part, show_bytes
from ..cuda.gpu_specs import Gpu


def stand_in_budget(gpu: Gpu, memory: str | int | None, headroom: str | int | None) -> Budget:
    """Return the budget of an idle GPU, in reserved bytes.

    Raises:
        UsageError: A size cannot be read, or leaves nothing.
    """
    outside = gpu.context_bytes + gpu.library_bytes
    total = BudgetItem(
        "device", gpu.total_bytes - outside, f"{show_bytes(gpu.total_bytes)}, less context and libraries"
    )
    limits = [total]
    if memory is not None:
        asked = parse_bytes(memory, what="an amount of memory")
        limits.append(
            BudgetItem("asked", asked - outside, f"you named {show_bytes(asked)}, context and libraries included")
        )
    tightest = min(limits, key=lambda term: term.bytes)
    kept = parse_part(headroom, max(1, tightest.bytes), what="a headroom") or 0 if headroom is not None else 0
    if tightest.bytes - kept <= 0:
        raise UsageError(
            f"Nothing is left to train with: {tightest.why}, less {show_bytes(kept)} headroom.",
            f"Context and libraries of a {gpu.device_name} take about {show_bytes(outside)}.",
            "Name more memory, or less headroom.",
        )
    terms = (
        *limits,
        BudgetItem("context", gpu.context_bytes, gpu.sources.context),
        BudgetItem("libraries", gpu.library_bytes, gpu.sources.library),
        BudgetItem(
            "headroom", kept, f"you asked for {headroom}" if headroom is not None else "none: nobody else is there"
        ),
    )
    return Budget(tightest.bytes - kept, tightest.bytes, kept, terms, tightest.name)
