"""Cut windows from any iterable of batches, in order.

What one window doesn't need is left for the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import BatchError
from .bad_batches import of_samples
from .part import Part, digest_of_batch
from .split import batch_size, join, joinable, split
from .tree import as_tensors
from .window import Window

if TYPE_CHECKING:
    import torch

    from ..workload import Batch

BatchKeys = Mapping[str, Collection[str]]  # `shared` and `per_sample`, as `split` takes them
SizesOf = Callable[[int], tuple[int, ...]]
_END = object()
Piece = tuple[Any, int]  # a batch and its samples


def windows_of_batches(
    batches: Iterable[Batch],
    target: int,
    sizes_of: SizesOf,
    keys: BatchKeys,
    least: int,
    floats: torch.dtype | None = None,
    group: int = 1,
    part: Part | None = None,
) -> Iterator[Window | BatchError]:
    """Yield windows; in the place of what can't be cut, the error.

    Args:
        batches: The loader.
        target: Samples in each window.
        sizes_of: Sizes of the micro-batches for so many samples.
        keys: `shared` and `per_sample`, as `split` takes them.
        least: The fewest samples that a micro-batch may have; fewer at the end join the last window.
        floats: What float64 arrays become; None to keep them.
        group: Consecutive samples that are never cut apart.
        part: Which of a window's samples are this rank's; None for all.

    Raises:
        BatchError: A batch can't be cut, and a group of samples lies partly before it.
    """
    waiting: deque[Piece] = deque()
    waiting_samples = given = 0  # `given` counts those of the windows before
    enough = target + (least if least > 1 else 0)
    for number, batch in enumerate(_read(batches, part)):
        try:
            batch = as_tensors(batch, floats)
            size = batch_size(batch, **keys)
        except BatchError as error:
            error = of_samples(error, [number], "the loader's batches, counted from 0")
            if (given + waiting_samples) % group:  # where the next one begins isn't known
                raise error from None
            yield error
            continue
        waiting.append((batch, size))
        waiting_samples += size
        while waiting_samples >= enough:
            yield _window_or_error(waiting, range(given, given + target), sizes_of, keys, group, part)
            waiting_samples, given = waiting_samples - target, given + target
    if waiting:
        yield _window_or_error(waiting, range(given, given + waiting_samples), sizes_of, keys, group, part)


def _read(batches: Iterable[Batch], part: Part | None) -> Iterator[Batch]:
    """Read batches; what is drawn meanwhile is the same on all ranks."""
    if part is None:
        yield from batches
        return
    with part.drawing():
        found = iter(batches)
    while True:
        with part.drawing():
            batch = next(found, _END)
        if batch is _END:
            return
        yield batch


def _window_or_error(
    waiting: deque[Piece], samples: range, sizes_of: SizesOf, keys: BatchKeys, group: int, part: Part | None
) -> Window | BatchError:
    """Take the next window off the front of what waits.

    Where it can't be cut, it is dropped and the error returned.
    """
    digest = 0
    try:
        parts = _take(waiting, len(samples), keys)
        if part is not None:
            digest, own = digest_of_batch(parts[0][0], len(samples)), part.of(len(samples))
            cut, samples = deque(parts), samples[own]
            _take(cut, own.start, keys)
            parts = _take(cut, len(samples), keys)
        window = _window(parts, sizes_of, keys, group)
    except BatchError as error:
        return of_samples(error, samples, "the epoch, counted from 0")
    return Window(window.pieces, window.sizes, samples, "the epoch, counted from 0", digest=digest)


def _take(parts: deque[Piece], samples: int, keys: BatchKeys) -> list[Piece]:
    """Take so many samples off the front.

    The last part is cut where it has more.
    """
    taken: list[Piece] = []
    while samples:
        batch, size = parts.popleft()
        if size > samples:
            batch, rest = split(batch, (samples, size - samples), **keys)
            parts.appendleft((rest, size - samples))
            size = samples
        taken.append((batch, size))
        samples -= size
    return taken


def _window(parts: list[Piece], sizes_of: SizesOf, keys: BatchKeys, group: int) -> Window:
    """Make micro-batches of consecutive parts.

    Each run of joinable ones is cut separately.

    Raises:
        BatchError: A group of samples lies in two runs.
    """
    pieces: list[Batch] = []
    sizes: list[int] = []
    window = sum(samples for _, samples in parts)
    for run in _runs(parts, keys):
        if sum(sizes) % group:
            raise BatchError(
                f"The loader gives a batch that ends within a group of {group} samples, and the next one has another "
                f"shape (after {sum(sizes)} of the window's {window} samples).",
                "The samples of a group are never in different micro-batches, and batches of unlike shapes can't be "
                "joined.",
                f"Give the loader a batch size that is a multiple of {group}, or pad to one length.",
            )
        for size in sizes_of(sum(samples for _, samples in run)):
            # Only what a micro-batch takes from several batches is copied; the rest are views.
            pieces.append(join([batch for batch, _ in _take(run, size, keys)], **keys))
            sizes.append(size)
    return Window(tuple(pieces), tuple(sizes))


def _runs(parts: list[Piece], keys: BatchKeys) -> Iterator[deque[Piece]]:
    """Yield the longest runs of consecutive parts that can be joined."""
    run: deque[Piece] = deque()
    for part in parts:
        if run and not joinable(run[0][0], part[0], **keys):
            yield run
            run = deque()
        run.append(part)
    if run:
        yield run
