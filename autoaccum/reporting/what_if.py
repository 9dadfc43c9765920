"""What the plan would be at another target, memory or headroom: answered from a plan's table of peaks alone.

The rules are the solver's (simulation/solver.py), asked of the table in place of a replay. `what_if.js` is the same in
the page; tests hold one against the other. No torch here.
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
    """What the plan itself answers, found by replays within its budget: a table without a limit may know no better.

    Attributes:
        target_batch: Samples in an optimizer step, over all ranks.
        budget_bytes: What may be used.
        split: (how many, samples) of each size of micro-batch.
        peak_bytes: What the window takes.
    """

    target_batch: int
    budget_bytes: int
    split: tuple[tuple[int, int], ...]
    peak_bytes: int


@dataclass(frozen=True)
class Table:
    """What a plan knows that holds for other targets and budgets too.

    Attributes:
        rows: Peaks by micro-batch, above base and data; ascending. Not empty.
        baseline_bytes: What the process takes before it trains.
        history_bytes: What the planning process's history adds.
        malloc_overhead: Fraction of training's memory that is added for malloc.
        sample_bytes: What each sample of the window takes; 0 where they are not held in this memory.
        world_size: Ranks that share the target.
        least: The smallest micro-batch allowed.
        most: The largest allowed; None for any.
        chosen: The plan's own answer, to its own question.
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

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """The rows' micro-batches."""
        return tuple(row.micro_batch for row in self.rows)

    def row(self, micro_batch: int) -> PeakRow | None:
        """The row of that size, or of the next larger one, on the safe side; None beyond the table."""
        index = bisect.bisect_left(self.sizes, micro_batch)
        return self.rows[index] if index < len(self.rows) else None

    def input_bytes(self, samples: int) -> int:
        """What a window's samples take."""
        return mapping_bytes(samples * self.sample_bytes) if self.sample_bytes else 0

    def peak_bytes(self, split: Split) -> int | None:
        """What the process comes to with that window; None beyond the table.

        The first micro-batch, the later ones (of two sizes at most) and the optimizer step each have their row.
        """
        return self.peak_of(sum(split), len(split), split[0], split[min(1, len(split) - 1)], split[-1])

    def peak_of(self, samples: int, steps: int, first_size: int, second_size: int, last_size: int) -> int | None:
        """The same of a window that is known by its sizes: that of a million micro-batches needn't be made."""
        first, second, last = self.row(first_size), self.row(second_size), self.row(last_size)
        if first is None or second is None or last is None:
            return None
        window = window_peak_bytes(first, second, last, steps)
        training = self.input_bytes(samples) + self.history_bytes + window
        return self.baseline_bytes + training + int(self.malloc_overhead * training)

    def peak_of_shape(self, shape: Shape) -> int | None:
        """The same of a window that is known by its shape."""
        return self.peak_of(shape.samples, shape.steps, shape.first, shape.second, shape.last)

    def is_exact(self, split: Split) -> bool:
        """Whether the table has a row of each of the split's sizes."""
        return all((row := self.row(size)) is not None and row.micro_batch == size for size in {split[0], split[-1]})


@dataclass(frozen=True)
class Answer:
    """What a question comes to.

    Attributes:
        status: "fits", "does not fit" or "invalid".
        split: (how many, samples) of each size of micro-batch, largest first; where nothing fits, the smallest.
        peak_bytes: What the window would take.
        budget_bytes: What may be used.
        missing_bytes: How many bytes the smallest window lacks; 0 where one fits.
        at_most: The table lacks one of the sizes, so the peak is that of a larger one.
        beyond: The table ends before memory does: fewer steps may fit.
        why: What is wrong with the question, if anything is.
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
    """The table of a plan; None where the plan has no peaks."""
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
    )


def ask(table: Table, target: str, memory: str, headroom: str) -> Answer:
    """Answers a question as it was typed.

    Args:
        table: The plan's.
        target: A number of samples.
        memory: A size, like "1400MiB".
        headroom: A size or a percentage of the memory; empty for none.
    """
    if not (target.strip().isascii() and target.strip().isdigit() and 0 < len(target.strip()) <= 7):
        return Answer(INVALID, why="The target batch is a whole number of samples, below 10 million.")
    try:
        limit = parse_bytes(memory)
    except UsageError:
        return Answer(INVALID, why="Write memory like 2GiB, 1.5GiB, 800MiB or 12GB.")
    try:
        kept = parse_part(headroom.strip() or "0", limit) or 0
    except UsageError:
        return Answer(INVALID, why="Write headroom like 5% or 500MiB.")
    if kept >= limit:
        return Answer(INVALID, why="So much headroom leaves nothing.")
    return answer(table, int(target), limit - kept)


def answer(table: Table, target_batch: int, budget_bytes: int) -> Answer:
    """The fewest accumulation steps whose window fits, by the table; for the first rank, whose share is the largest.

    Args:
        table: The plan's.
        target_batch: Samples in an optimizer step, over all ranks.
        budget_bytes: What may be used.
    """
    chosen = table.chosen
    if chosen is not None and (target_batch, budget_bytes) == (chosen.target_batch, chosen.budget_bytes):
        return Answer(FITS, chosen.split, chosen.peak_bytes, budget_bytes)
    if target_batch < table.world_size:
        return Answer(INVALID, why=f"A target batch of at least {table.world_size}: each rank needs a sample.")
    samples = -(-target_batch // table.world_size)
    most = min(table.most or samples, samples)
    if samples < table.least or samples // table.least < -(-samples // most):
        return Answer(INVALID, why=f"Micro-batches of {table.least} to {most} can't add up to {samples} samples.")
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
    """What solver.py's `smallest_steps` would find, were it asked of the table; in thousands of tests at most."""
    most = min(most, table.rows[-1].micro_batch)  # nothing beyond the table fits
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
    """The table and the rules' constants, for `what_if.js`."""
    rows = [[r.micro_batch, r.first_bytes, r.later_bytes, r.optimizer_bytes, r.between_bytes] for r in table.rows]
    known = asdict(table) | {"rows": rows, "margin": CAPACITY_MARGIN}
    known |= {"most_uneven": MAX_UNEVEN_SIZES}
    return known | {"page_bytes": PAGE_BYTES, "mapping_overhead_bytes": MAPPING_OVERHEAD_BYTES}
