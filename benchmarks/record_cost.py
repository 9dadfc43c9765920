"""Host time that recording adds to each allocation and each free.

    autoaccum virtual-gpu -- python -m benchmarks.record_cost

The allocator's own work is real on a virtual GPU; there, and on a real one, it is host time that is measured.
"""

from __future__ import annotations

import time

import torch

PAIRS, ROUNDS = 10_000, 5


def seconds_per_event() -> float:
    """Return the smallest of several rounds' seconds per allocation or free."""
    times = []
    for _ in range(ROUNDS):
        started = time.process_time()
        for _ in range(PAIRS):
            torch.empty(1000, device="cuda")
        times.append((time.process_time() - started) / (2 * PAIRS))
    return min(times)


def cost(context: str | None) -> float:
    """Return the seconds that the allocator's history adds to an event.

    With stack frames where `context` is "all".
    """
    without = seconds_per_event()
    torch.cuda.memory._record_memory_history("all", context=context, stacks="python", max_entries=10_000_000)
    try:
        return seconds_per_event() - without
    finally:
        torch.cuda.memory._record_memory_history(None)


def main() -> None:
    """Print both costs."""
    seconds_per_event()
    print(f"without frames {cost(None) * 1e6:.2f} us an event, with frames {cost('all') * 1e6:.2f} us")


if __name__ == "__main__":
    main()
