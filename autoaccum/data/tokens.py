"""Order and cut sequences of different lengths.

Longest first inside the window, and within a budget of tokens as well as of rows.

A micro-batch is padded to its own longest sample, so samples of like length belong together. Inside a window their
order doesn't matter to the gradient; and with the longest first, too little memory shows immediately. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence


def longest_first(indices: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Sort a window's indices, longest sample first.

    Those of one length stay in their order.

    Args:
        indices: Into the data set.
        lengths: The length of each sample of the data set.
    """
    return sorted(indices, key=lambda index: -lengths[index])


def split_by_tokens(lengths: Sequence[int], most_rows: int, most_tokens: int | None, least: int = 1) -> tuple[int, ...]:
    """Return the fewest sizes that keep within both budgets.

    Args:
        lengths: Of the window's samples, longest first.
        most_rows: Samples allowed in a micro-batch.
        most_tokens: Tokens allowed in one, padding included: its samples times its longest. None for no such budget.
        least: The smallest micro-batch allowed; where the two are at odds, this one holds. A single sample that is
            longer than the budget is a micro-batch alone.

    Returns:
        Sizes that sum to the samples.
    """
    sizes: list[int] = []
    start = 0
    while start < len(lengths):
        rows = most_rows if most_tokens is None else min(most_rows, most_tokens // max(1, lengths[start]))
        sizes.append(min(max(rows, least), len(lengths) - start))
        start += sizes[-1]
    if len(sizes) > 1 and sizes[-1] < least:  # the rest of a window: the one before gives some, or takes it in
        both = sizes[-2] + sizes[-1]
        sizes[-2:] = [both - least, least] if both >= 2 * least else [both]
    return tuple(sizes)


def most_rows(lengths: Sequence[int], most_tokens: int, samples: int) -> int:
    """Return the most samples of a micro-batch within a token budget.

    These are the shortest of all.

    Args:
        lengths: Of all samples of the data set.
        most_tokens: Tokens allowed in a micro-batch, padding included.
        samples: Of a window.
    """
    rows = 0
    for rows, length in enumerate(sorted(lengths)[:samples], start=1):
        if rows * length > most_tokens:
            return max(1, rows - 1)
    return max(1, rows)


def padded_tokens(lengths: Sequence[int], sizes: Sequence[int]) -> int:
    """Return tokens of the micro-batches, padding included."""
    total = start = 0
    for size in sizes:
        total += size * max(lengths[start : start + size])
        start += size
    return total
