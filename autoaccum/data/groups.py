"""Keep samples together that belong together: pairs, triplets, a prompt's generations.

While a plan is made a group counts as one sample, so that no size cuts one apart; `planning/groups.py` turns the plan's
counts into samples at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from ..workload import Batch


@dataclass(frozen=True, eq=False)
class Grouped:
    """Stand for a batch of whole groups.

    Attributes:
        rows: The batch: any that `split` cuts, groups behind one another.
        size: Samples in a group.
    """

    rows: Batch
    size: int

    def indices(self, groups: Sequence[int]) -> list[int]:
        """Return the rows of these groups."""
        return [group * self.size + row for group in groups for row in range(self.size)]


def group_sizes(samples: int, size: int, sizes_of_groups: Any) -> tuple[int, ...]:
    """Return sizes of whole groups, and the rest's.

    Args:
        samples: Samples in the window.
        size: Samples in a group.
        sizes_of_groups: `sizes_of_groups(groups)`, the groups in each micro-batch.
    """
    groups, rest = divmod(samples, size)
    whole = tuple(size * each for each in sizes_of_groups(groups)) if groups else ()
    return (*whole, rest) if rest else whole


def check_groups(size: Any, loader: Any, *, has_lengths: bool) -> None:
    """Refuse a size of groups that can't be kept.

    Raises:
        UsageError: It isn't a number, or the loader or `lengths` mix groups.
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UsageError(
            f"samples_per_group is {size!r}: a whole number from 1.", hint="Give samples_per_group=2, say."
        )
    if size == 1:
        return
    from torch.utils.data import RandomSampler

    if isinstance(getattr(loader, "sampler", None), RandomSampler):
        raise UsageError(
            f"samples_per_group is {size}, and the loader shuffles single samples.",
            "The samples of a group must come behind one another, or they are in different micro-batches.",
            "Give a sampler that shuffles groups, or make a group one item of the dataset and collate it to its rows.",
        )
    if has_lengths:
        raise UsageError(
            f"samples_per_group is {size}, and lengths= are given.",
            "Sorting a window's samples by length takes groups apart.",
            "Leave out lengths=.",
        )
