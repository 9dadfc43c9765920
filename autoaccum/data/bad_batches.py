"""Name the samples of bad batches, and iterate past them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

from ..errors import BatchError, UsageError

RAISE, SKIP = ON_BAD_BATCH = ("raise", "skip")
_SHOWN_SAMPLES = 8

T = TypeVar("T")


class Surviving(Generic[T]):
    """Iterate past errors: after one, the next item follows.

    A generator ends with the first exception that leaves it, so errors leave it as items.

    Args:
        items: What to return, and what to raise.

    Attributes:
        items: The same, with errors as items.
    """

    def __init__(self, items: Iterator[T | BatchError]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item = next(self.items)
        if isinstance(item, BatchError):
            raise item
        return item


def check_choice(on_bad_batch: str) -> None:
    """Refuse an unknown choice.

    Raises:
        UsageError: It is neither "raise" nor "skip".
    """
    if on_bad_batch not in ON_BAD_BATCH:
        raise UsageError(
            f"on_bad_batch {on_bad_batch!r} is not known.", hint=f"Use one of {', '.join(map(repr, ON_BAD_BATCH))}."
        )


def of_samples(error: BatchError, samples: Sequence[Any], origin: str) -> BatchError:
    """Return the error with the indices of its samples.

    Args:
        error: What is wrong with them.
        samples: Their indices; nothing is added where they aren't known.
        origin: What the indices count: "the dataset", say.
    """
    if not samples:
        return error
    return BatchError(f"{error.what} It holds {_listed(samples)} of {origin}.", error.why, error.hint)


def _listed(samples: Sequence[Any]) -> str:
    first = samples[0]
    if len(samples) == 1:
        return f"sample {first}"
    if isinstance(first, int) and list(samples) == list(range(first, first + len(samples))):
        return f"samples {first} to {samples[-1]}"
    shown = ", ".join(map(str, samples[:_SHOWN_SAMPLES]))
    return f"samples {shown}" + (f", ... ({len(samples)} in all)" if len(samples) > _SHOWN_SAMPLES else "")
