"""Batches that can't be trained, and the epochs that go on without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

from ..errors import BatchError, UsageError

RAISE, SKIP = ON_BAD_BATCH = ("raise", "skip")
_SHOWN = 8  # samples in a message

T = TypeVar("T")


class Surviving(Generic[T]):
    """An iterator that outlives its errors: where it raised a `BatchError`, the next call goes on behind that.

    A generator ends with the first exception that leaves it, so the errors are handed out of it as items.

    Args:
        items: What to give, and what to raise.
    """

    def __init__(self, items: Iterator[T | BatchError]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item = next(self._items)
        if isinstance(item, BatchError):
            raise item
        return item


def check_choice(on_bad_batch: str) -> None:
    """Refuses a choice that isn't known.

    Raises:
        UsageError: It is neither "raise" nor "skip".
    """
    if on_bad_batch not in ON_BAD_BATCH:
        raise UsageError(
            f"on_bad_batch {on_bad_batch!r} is not known.", hint=f"Use one of {', '.join(map(repr, ON_BAD_BATCH))}."
        )


def of_samples(error: BatchError, samples: Sequence[Any], origin: str) -> BatchError:
    """The same error with the samples that it is about.

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
    shown = ", ".join(map(str, samples[:_SHOWN]))
    return f"samples {shown}" + (f", ... ({len(samples)} in all)" if len(samples) > _SHOWN else "")
