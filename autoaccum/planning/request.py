"""Hold the request for a plan. Imports no torch."""

from __future__ import annotations

import contextlib
import operator
from dataclasses import dataclass

from ..plan import FEWEST_STEPS


@dataclass(frozen=True)
class PlanRequest:
    """Hold a request for a plan, as given.

    `resolve` (resolved_request.py) checks it against a workload.

    Attributes:
        target_batch: Samples in an optimizer step, over all ranks; None for one micro-batch, the largest that fits.
        budget: Memory that the whole process may use, in bytes or like "2GiB"; None for all free memory.
        headroom: Bytes or percent of the budget to keep free.
        max_micro_batch: The largest micro-batch allowed, in samples.
        min_micro_batch: The smallest allowed; None for 2 if the model uses batch statistics, else 1.
        rank: This process's rank; that of the initialised process group, where there is one.
        world_size: Number of ranks that share the target; likewise.
        objective: "fewest-steps" or "fastest".
        timing_seconds: Seconds to time smaller micro-batches for; None for a part of planning, 0 for none.
        verify: Whether to run the plan's window.
        check: Whether to test that the window's gradient is the large batch's.
        malloc: On the CPU, where large tensors come from: "cached", "fixed" or "default".
        train_in_new_process: Whether another process will train, so that the plan need not hold in this one.
        sizes: Micro-batches that the plan's table of peaks must include.
        uniform: Whether all micro-batches must have one size, for tools that know only one.
        host_memory: What lanes on a GPU may keep on the host, in bytes or like "24GiB"; None for all but a tenth of
            what is available.
        target_tokens: The target in tokens, over all ranks, in place of samples.
        shares: Over several ranks: "equal", "speed", "memory", or each rank's samples; None to choose.
        samples: This rank's share of the target; None for an equal one.
        exchanges: Whether windows are to be recorded with what they need to exchange gradients with other ranks.
        timeout_seconds: How long ranks wait for each other's plans.
        explained: Whether the plan has what only explains it: peaks of other sizes, and the largest micro-batches under
            other settings of the allocator. They take a quarter of planning an 8-billion-parameter model.
    """

    target_batch: int | None = None
    budget: str | int | None = None
    headroom: str | int | None = None
    max_micro_batch: int | None = None
    min_micro_batch: int | None = None
    rank: int = 0
    world_size: int = 1
    objective: str = FEWEST_STEPS
    timing_seconds: float | None = None
    verify: bool = True
    check: bool = True
    malloc: str = "cached"
    train_in_new_process: bool = False
    sizes: tuple[int, ...] = ()
    uniform: bool = False
    host_memory: str | int | None = None
    target_tokens: int | None = None
    shares: str | tuple[int, ...] | None = None
    samples: int | None = None
    exchanges: bool = False
    timeout_seconds: float = 1800.0
    explained: bool = True

    def __post_init__(self) -> None:
        """Take whole numbers of other libraries (numpy's, a tensor's) for Python's."""
        for name in ("target_batch", "max_micro_batch", "min_micro_batch"):
            value = getattr(self, name)
            if not isinstance(value, (int, float, str)) and hasattr(value, "__index__"):
                with contextlib.suppress(TypeError):  # a tensor that isn't one
                    object.__setattr__(self, name, operator.index(value))
