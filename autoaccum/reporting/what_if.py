"""Answer for other targets, memory or headroom from a table of peaks.

The rules are those of simulation/solver.py, with the table in place of replays. `what_if.js` implements them in the
page; tests compare the two. No torch.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from ..errors import UsageError
from ..plan import FASTEST, PeakRow, Plan, window_peak_bytes
from ..process_memory import PAGE_BYTES
from ..simulation.malloc import MAPPING_OVERHEAD_BYTES, mapping_bytes
from ..simulation.solver import CAPACITY_MARGIN, MAX_UNEVEN_SIZES, Split
from ..units import parse_bytes, parse_part
from .split_shapes import Shape, balanced_shape, differing_steps, uneven_shapes

FITS, DOES_NOT_FIT, INVALID = "fits", "does not fit", "invalid"


@dataclass(frozen=True)
class Chosen:
    """The plan's own answer to its own request.

    It was found by replays within the budget. The table's peaks are replayed without a limit, so they can be higher.

    Attributes:
        target_batch: Samples in an optimizer step, over all ranks.
        budget_bytes: The budget.
        split: (count, samples) of each size of micro-batch.
        peak_bytes: The window's peak.
    """

    target_batch: int
    budget_bytes: int
    split: tuple[tuple[int, int], ...]
    peak_bytes: int


@dataclass(frozen=True)
class Table:
    """The part of a plan that other targets and budgets share.

    Attributes:
        rows: Peaks by micro-batch, above baseline and inputs; ascending. Not empty.
        baseline_bytes: Memory that the process uses before it trains.
        history_bytes: Memory that the planning process's history adds.
        malloc_overhead: Fraction of training's memory that is added for malloc's overhead.
        sample_bytes: Bytes of a sample of the window; 0 if samples are not held in this memory.
        world_size: Ranks that share the target.
        least: The smallest micro-batch allowed.
        most: The largest allowed; None for any.
        chosen: The plan's own answer.
        mapping_overhead_bytes: What a mapping takes beside its bytes; 0 with a cache of pages.
    """

    rows: tuple[PeakRow, ...]
    baseline_bytes: int
    history_bytes: int
    malloc_overhead: float
    sample_bytes: int
    world_size: int
    least: int
    most: int | None
    chosen: Chosen | None = None
    mapping_overhead_bytes: int = MAPPING_OVERHEAD_BYTES

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """The rows' micro-batches, ascending."""
        return tuple(row.micro_batch for row in self.rows)

    def row(self, micro_batch: int) -> PeakRow | None:
        """Return the row of a size or the next larger, or None."""
        index = bisect.bisect_left(self.sizes, micro_batch)
        return self.rows[index] if index < len(self.rows) else None

    def input_bytes(self, samples: int) -> int:
        """Return the bytes of a window's samples."""
        return mapping_bytes(samples * self.sample_bytes, self.mapping_overhead_bytes) if self.sample_bytes else 0

    def peak_bytes(self, split: Split) -> int | None:
        """Return the process's peak with a window; None beyond the table.

        The first micro-batch, the later ones (of at most two sizes) and the optimizer step each have a row.
        """
        return self.peak_of(sum(split), len(split), split[0], split[min(1, len(split) - 1)], split[-1])

    def peak_of(self, samples: int, steps: int, first_size: int, second_size: int, last_size: int) -> int | None:
        """Return the peak of a window given by its sizes."""
        first, second, last = self.row(first_size), self.row(second_size), self.row(last_size)
        if first is None or second is None or last is None:
            return None
        window = window_peak_bytes(first, second, last, steps)
        training = self.input_bytes(samples) + self.history_bytes + window
        return self.baseline_bytes + training + int(self.malloc_overhead * training)

    def peak_of_shape(self, shape: Shape) -> int | None:
        """Return the peak of a window given by its shape."""
        return self.peak_of(shape.samples, shape.steps, shape.first, shape.second, shape.last)

    def is_exact(self, split: Split) -> bool:
        """Return whether the table has rows for all of the split's sizes."""
        return all((row := self.row(size)) is not None and row.micro_batch == size for size in {split[0], split[-1]})


@dataclass(frozen=True)
class Answer:
    """The answer to a request.

    Attributes:
        status: "fits", "does not fit" or "invalid".
        split: (count, samples) of each size of micro-batch, largest first; if no window fits, the smallest.
        peak_bytes: The window's peak.
        budget_bytes: The budget.
        missing_bytes: Bytes that the smallest window lacks; 0 if one fits.
        at_most: Whether the table lacks one of the sizes, so that the peak is that of a larger one.
        beyond: Whether sizes larger than the table's may fit, with fewer steps.
        why: Why the request is invalid; empty if it is valid.
    """

    status: str
    split: tuple[tuple[int, int], ...] = ()
    peak_bytes: int = 0
    budget_bytes: int = 0
    missing_bytes: int = 0
    at_most: bool = False
    beyond: bool = False
    why: str = ""

    @property
    def steps(self) -> int:
        """Accumulation steps."""
        return sum(count for count, _ in self.split)


def table_of(plan: Plan) -> Table | None:
    """Return a plan's table; None if the plan has no peaks."""
    if not plan.memory.peaks:
        return None
    per_sample = plan.memory.sample_bytes or -(-plan.memory.input_bytes // sum(plan.split))
    return Table(
        rows=tuple(sorted(plan.memory.peaks, key=lambda row: row.micro_batch)),
        baseline_bytes=plan.memory.baseline_bytes,
        history_bytes=plan.memory.history_bytes,
        malloc_overhead=plan.memory.malloc_overhead,
        sample_bytes=per_sample if plan.memory.input_bytes else 0,
        world_size=plan.world_size,
        least=plan.request.min_micro_batch,
        most=plan.micro_batch if plan.request.objective == FASTEST else plan.request.max_micro_batch,
        chosen=Chosen(plan.target_batch, plan.budget_bytes, _runs(plan.split), plan.predicted_peak_bytes),
        mapping_overhead_bytes=0 if plan.device.malloc == "cached" else MAPPING_OVERHEAD_BYTES,
    )


def ask(table: Table, target: str, memory: str, headroom: str) -> Answer:
    """Answer a request as it was typed.

    Args:
        table: The plan's.
        target: A number of samples.
        memory: A size, like "1400MiB".
        headroom: A size or a percentage of the memory; empty for none.
    """
    if not (target.strip().isascii() and target.strip().isdigit() and 0 < len(target.strip()) <= 7):
        return Answer(INVALID, why="The target batch must be a whole number of samples below 10 million.")
    try:
        limit = parse_bytes(memory)
    except UsageError:
        return Answer(INVALID, why="The memory must be a size such as 2GiB, 1.5GiB, 800MiB or 12GB.")
    try:
        kept = parse_part(headroom.strip() or "0", limit) or 0
    except UsageError:
        return Answer(INVALID, why="The headroom must be a percentage or a size such as 5% or 500MiB.")
    if kept >= limit:
        return Answer(INVALID, why="The headroom must be smaller than the memory.")
    return answer(table, int(target), limit - kept)


def answer(table: Table, target_batch: int, budget_bytes: int) -> Answer:
    """Find the fewest accumulation steps whose window fits, by the table.

    The answer is that of the first rank, whose share of the target is the largest.

    Args:
        table: The plan's.
        target_batch: Samples in an optimizer step, over all ranks.
        budget_bytes: The budget.
    """
    chosen = table.chosen
    if chosen is not None and (target_batch, budget_bytes) == (chosen.target_batch, chosen.budget_bytes):
        return Answer(FITS, chosen.split, chosen.peak_bytes, budget_bytes)
    if target_batch < table.world_size:
        return Answer(INVALID, why=f"The target batch must be at least {table.world_size}: each rank needs a sample.")
    samples = -(-target_batch // table.world_size)
    most = min(table.most or samples, samples)
    if samples < table.least or samples // table.least < -(-samples // most):
        return Answer(INVALID, why=f"Micro-batches of {table.least} to {most} cannot total {samples} samples.")
    usable = int(budget_bytes * (1 - CAPACITY_MARGIN))

    @functools.cache
    def fits(shape: Shape) -> bool:
        peak = table.peak_of_shape(shape)
        return peak is not None and peak <= usable

    found = _fewest_steps(table, fits, samples, most)
    shape = found or balanced_shape(samples, samples // table.least)
    peak, at_most = table.peak_of_shape(shape) or 0, not table.is_exact((shape.first, shape.last))
    if found is None:
        needed = int(peak / (1 - CAPACITY_MARGIN))
        return Answer(DOES_NOT_FIT, shape.runs, needed, budget_bytes, max(1, needed - budget_bytes), at_most)
    largest = table.rows[-1].micro_batch
    beyond = most > largest and shape.steps > 1 and -(-samples // (shape.steps - 1)) > largest
    beyond = beyond and fits(Shape(((2, largest),)))
    return Answer(FITS, shape.runs, peak, budget_bytes, 0, at_most, beyond)


def _fewest_steps(table: Table, fits: Callable[[Shape], bool], samples: int, most: int) -> Shape | None:
    """Find the window that solver.py's `smallest_steps` would find.

    Only windows that differ in size are tested: some thousands at most, also for millions of samples.
    """
    most = min(most, table.rows[-1].micro_batch)  # sizes beyond the table have no known peak
    for steps in differing_steps(samples, -(-samples // most), samples // table.least):
        balanced = balanced_shape(samples, steps)
        if fits(balanced):
            return balanced
        if steps > 1:
            for shape in uneven_shapes(samples, steps, least=table.least, most=most):
                if fits(Shape(((2, shape.first),))) and fits(shape):
                    return shape
    return None


def _runs(split: Split) -> tuple[tuple[int, int], ...]:
    return tuple((len(list(group)), size) for size, group in groupby(split))


def for_page(table: Table) -> dict[str, Any]:
    """Return the table and the rules' constants, for `what_if.js`."""
    rows = [[r.micro_batch, r.first_bytes, r.later_bytes, r.optimizer_bytes, r.between_bytes] for r in table.rows]
    known = asdict(table) | {"rows": rows, "margin": CAPACITY_MARGIN}
    known |= {"most_uneven": MAX_UNEVEN_SIZES}
    return known | {"page_bytes": PAGE_BYTES, "mapping_overhead_bytes": MAPPING_OVERHEAD_BYTES}
