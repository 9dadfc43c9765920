"""Give a Lightning Trainer its own loader in batches of one window.

The Trainer then counts, logs, validates and saves as with a DataLoader of that batch size; samples, their order, the
collate function and the workers are the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from ..data.indexed_loader import indices_of_windows, with_batches
from ..data.loaders import is_map_style, loader_length
from ..data.windows import windows
from ..errors import BatchError, UsageError


class WindowSampler:
    """A batch sampler that yields the indices of each window.

    Args:
        batches: The loader's own batch sampler.
        target: Samples in a window.
        least: The fewest samples of a micro-batch; fewer at the end join the window before.
        length: Windows of an epoch; None where unknown.

    Attributes:
        sampler: The loader's own, whose epoch Lightning sets.
        batch_size: Samples in a window.
    """

    def __init__(self, batches: Any, target: int, least: int, length: int | None) -> None:
        self._batches, self._least, self._length = batches, least, length
        self.sampler, self.batch_size, self.drop_last = getattr(batches, "sampler", batches), target, False

    def __iter__(self) -> Iterator[list[Any]]:
        return indices_of_windows(iter(chain.from_iterable(self._batches)), self.batch_size, self._least)

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("the loader doesn't know its number of samples")
        return self._length


class WindowStream:
    """The batches of any other loader, regrouped to one window each.

    Args:
        loader: An iterable of batches.
        target: Samples in a window.
        least: The fewest samples of a micro-batch.
        keys: `shared` and `per_sample`, as `data.split` takes them.
    """

    def __init__(self, loader: Any, target: int, least: int, keys: Any) -> None:
        self._loader, self._target, self._least, self._keys = loader, target, least, keys

    def __iter__(self) -> Iterator[Any]:
        for window in windows(self._loader, self._target, lambda n: (n,), least=self._least, **self._keys):
            if len(window.pieces) > 1:
                raise BatchError(
                    f"A window's batches have {len(window.pieces)} different forms, and can't be joined into one.",
                    "The Trainer is given each window as one batch; padding to different lengths is the usual cause.",
                    "Use a map-style dataset, whose samples are collated together, or pad all to one length.",
                )
            yield window.pieces[0]

    def __len__(self) -> int:
        length = loader_length(self._loader, self._target, least=self._least, **self._keys)
        if length is None:
            raise TypeError("the loader doesn't know its number of samples")
        return length


def in_windows(loader: Any, target: int, least: int, keys: Any) -> Any:
    """Return a loader that gives the same samples in windows.

    Raises:
        UsageError: There are several loaders, or it can be iterated once only.
    """
    if isinstance(loader, (dict, list, tuple)) or type(loader).__name__ == "CombinedLoader":
        raise UsageError(
            f"The training loaders are several (a {type(loader).__name__}).",
            "A window is cut from one loader's samples.",
            "Return one DataLoader, over torch.utils.data.ConcatDataset or StackDataset.",
        )
    if not is_map_style(loader):
        if iter(loader) is loader:
            raise UsageError(
                f"The training loader is an iterator ({type(loader).__name__}), which can be used once only.",
                "Planning looks at its first batch.",
                "Give a DataLoader, or an object whose __iter__ starts anew.",
            )
        return WindowStream(loader, target, least, keys)
    length = loader_length(loader, target, least=least)
    return with_batches(loader, WindowSampler(loader.batch_sampler, target, least, length))


class WindowSource:
    """A Trainer's source of training loaders, each in windows.

    Args:
        source: The Trainer's own.
        wrap: Makes a loader's windows.

    Attributes:
        loader: The user's loader that was asked for last; None before.
    """

    def __init__(self, source: Any, wrap: Callable[[Any], Any]) -> None:
        self._source, self._wrap = source, wrap
        self.loader: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def dataloader(self) -> Any:
        """Return the loader, in windows."""
        self.loader = self._source.dataloader()
        return self._wrap(self.loader)
