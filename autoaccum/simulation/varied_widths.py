"""Replay what the longest samples reserve, for narrower ones. No torch here.

The caching allocator gives a large request a segment of its size, and never joins two segments. Where micro-batches
vary in width, the segments of narrow ones are too small for wider ones, which get others beside them: what is reserved
grows from window to window, with most of it free. From the segments of the longest samples all others are served.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..phases import BETWEEN, BUILD, LATER, OPTIMIZER
from ..plan import SegmentRow
from .cuda_allocator.allocator import CachingAllocator, CudaRules
from .recording import Phase
from .training_run import Training, TrainingWriter

WINDOWS = 3  # from the second on there is the optimizer's state; the third shows what the second left


def planned_segments(training: Training, split: Sequence[int], rules: CudaRules) -> tuple[SegmentRow, ...]:
    """Return the large segments that windows of a split reserve.

    Without the model's. Those of the stream with most of them, which is the one that computes.

    Args:
        training: The training run, at the longest samples.
        split: Samples in each micro-batch of a window.
        rules: The allocator's settings.

    Returns:
        Their sizes and numbers, largest first; empty where memory runs out.
    """
    allocator, writer = CachingAllocator(rules), TrainingWriter(training)
    allocator.run(Phase(BUILD, training.build))
    model = allocator.large_segments()
    n, last = split[0], split[-1]
    for index in range(WINDOWS):
        phases = [writer.first(n, last) if index else writer.first_of_all(n)]
        phases += [writer.phase(LATER, size) for size in split[1:]]
        phases.append(writer.phase(OPTIMIZER, last) if index else writer.first_optimizer_step())
        if BETWEEN in training.program.phases:
            phases.append(writer.phase(BETWEEN, last))
        for phase in phases:
            if allocator.run(phase).out_of_memory:
                return ()
    found = allocator.large_segments()
    stream = max(found, key=lambda each: sum(found[each]), default=0)
    beside = Counter(found.get(stream, ())) - Counter(model.get(stream, ()))
    return tuple(SegmentRow(size, beside[size]) for size in sorted(beside, reverse=True))
