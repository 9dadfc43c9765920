"""A loader's batches gathered into windows of exactly the target."""

from __future__ import annotations

import gc
import math
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from autoaccum.data.loaders import loader_length
from autoaccum.data.window import Window
from autoaccum.data.windows import windows
from autoaccum.errors import BatchError, UsageError


class Numbers(Dataset[dict[str, Any]]):
    """Sample i is the number i; its sequence has `lengths[i % len(lengths)]` tokens."""

    def __init__(self, n: int, lengths: tuple[int, ...] = (2,)) -> None:
        self.n, self.lengths = n, lengths

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": torch.tensor(index), "ids": torch.full((self.lengths[index % len(self.lengths)],), index)}


class Stream(IterableDataset[dict[str, Any]]):
    def __init__(self, n: int, lengths: tuple[int, ...] = (2,)) -> None:
        self.numbers = Numbers(n, lengths)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.numbers[index] for index in range(self.numbers.n))


def pad(samples: list[dict[str, Any]]) -> dict[str, Any]:
    ids = torch.nn.utils.rnn.pad_sequence([sample["ids"] for sample in samples], batch_first=True, padding_value=-1)
    return {"id": torch.stack([sample["id"] for sample in samples]), "ids": ids}


def at_most(micro_batch: int) -> Callable[[int], tuple[int, ...]]:
    """Balanced sizes of at most `micro_batch`."""

    def split_of(samples: int) -> tuple[int, ...]:
        pieces = math.ceil(samples / micro_batch)
        return tuple(samples // pieces + (index < samples % pieces) for index in range(pieces))

    return split_of


def ids(found: list[Window]) -> list[int]:
    return [int(i) for window in found for piece in window.pieces for i in piece["id"]]


def check(found: list[Window], expected: list[int], target: int, micro_batch: int) -> None:
    """The laws: all samples once and in order, full windows of `target`, a real tail, sizes true and allowed."""
    assert ids(found) == expected
    totals = [sum(window.sizes) for window in found]
    full, rest = divmod(len(expected), target)
    assert totals == [target] * full + [rest] * bool(rest)
    for window in found:
        assert [len(piece["id"]) for piece in window.pieces] == list(window.sizes)
        assert max(window.sizes) <= micro_batch


def batches_of(rows: list[int], lengths: list[int] | None = None) -> list[dict[str, Any]]:
    starts = [sum(rows[:index]) for index in range(len(rows))]
    widths = lengths or [2] * len(rows)
    return [
        {"id": torch.arange(start, start + n), "ids": torch.ones(n, width)}
        for start, n, width in zip(starts, rows, widths, strict=True)
    ]


micro_batches = st.integers(1, 7)
targets = st.integers(1, 20)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), targets, micro_batches, st.booleans())
def test_map_style_no_sample_is_lost_repeated_or_moved(
    n: int, batch: int, target: int, micro: int, drop_last: bool
) -> None:
    loader = DataLoader(Numbers(n), batch_size=batch, drop_last=drop_last)
    expected = [int(i) for plain in loader for i in plain["id"]]
    if not expected:
        with pytest.raises(UsageError, match="no batch at all"):
            list(windows(loader, target, at_most(micro)))
        return
    found = list(windows(loader, target, at_most(micro)))
    check(found, expected, target, micro)
    assert [window.sizes for window in found] == [at_most(micro)(sum(window.sizes)) for window in found]
    assert loader_length(loader, target) == len(found)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), targets, micro_batches, st.data())
def test_batches_no_sample_is_lost_repeated_or_moved(
    rows: list[int], target: int, micro: int, data: st.DataObject
) -> None:
    lengths = data.draw(st.lists(st.integers(1, 3), min_size=len(rows), max_size=len(rows)))
    loader = batches_of(rows, lengths)
    found = list(windows(loader, target, at_most(micro)))
    check(found, list(range(sum(rows))), target, min(micro, target))
    assert loader_length(loader, target) == len(found)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), targets, micro_batches)
def test_batches_of_one_shape_follow_split_of(rows: list[int], target: int, micro: int) -> None:
    found = list(windows(batches_of(rows), target, at_most(micro)))
    assert [window.sizes for window in found] == [at_most(micro)(sum(window.sizes)) for window in found]


def test_a_micro_batch_within_one_batch_is_a_view() -> None:
    loader = batches_of([8, 8])
    (window,) = windows(loader, 16, at_most(4))
    assert window.pieces[3]["id"].data_ptr() == loader[1]["id"][4:].data_ptr()


@pytest.mark.parametrize("workers", [0, 2])
def test_shuffled_epochs_have_the_samples_and_the_order_of_the_plain_loader(workers: int) -> None:
    def epochs(of: Callable[[Any], list[int]]) -> list[list[int]]:
        generator = torch.Generator().manual_seed(3)
        loader = DataLoader(Numbers(22), batch_size=4, shuffle=True, generator=generator, num_workers=workers)
        return [of(loader) for _ in range(2)]

    plain = epochs(lambda loader: [int(i) for batch in loader for i in batch["id"]])
    cut = epochs(lambda loader: ids(list(windows(loader, 10, at_most(3)))))
    assert cut == plain
    assert plain[0] != plain[1]
    assert sorted(plain[0]) == list(range(22))


@pytest.mark.parametrize("workers", [0, 2])
def test_each_micro_batch_is_collated_once_and_padded_to_its_own_longest(workers: int) -> None:
    loader = DataLoader(Numbers(8, (50, 50, 48, 41)), batch_size=8, collate_fn=pad, num_workers=workers)
    (window,) = windows(loader, 8, at_most(2))
    assert [tuple(piece["ids"].shape) for piece in window.pieces] == [(2, 50), (2, 48), (2, 50), (2, 48)]


def test_batches_padded_to_different_lengths_stay_apart() -> None:
    # Each batch of two is padded to its own longest: 50, 48, 50, 48.
    loader = DataLoader(Stream(8, (50, 50, 48, 41)), batch_size=2, collate_fn=pad)
    (window,) = windows(loader, 8, at_most(4))
    assert [tuple(piece["ids"].shape) for piece in window.pieces] == [(2, 50), (2, 48), (2, 50), (2, 48)]
    check([window], list(range(8)), 8, 4)


def test_a_run_of_joinable_batches_is_cut_balanced_by_the_largest_size() -> None:
    loader = batches_of([3, 3, 4], [50, 50, 41])
    (window,) = windows(loader, 10, at_most(4))
    assert window.sizes == (3, 3, 4)
    (window,) = windows(loader, 10, at_most(5))
    assert window.sizes == (3, 3, 4)
    (window,) = windows(loader, 10, at_most(10))
    assert window.sizes == (6, 4)


def test_the_first_windows_samples_are_let_go_when_the_second_is_asked_for() -> None:
    found = windows(({"x": torch.zeros(4)} for _ in range(3)), 4, at_most(4))
    first = next(found)
    watched = weakref.ref(first.pieces[0]["x"])
    del first
    next(found)
    gc.collect()
    assert watched() is None


class Backwards(BatchSampler):
    """A batch sampler of its own kind, with uneven batches; counts how often it is iterated."""

    def __init__(self, n: int) -> None:
        self.n, self.epochs = n, 0

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[list[int]]:
        self.epochs += 1
        backwards = list(range(self.n))[::-1]
        yield backwards[:1]
        yield backwards[1:]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_custom_batch_sampler_is_iterated_once_an_epoch_and_kept_in_order(workers: int) -> None:
    sampler = Backwards(11)
    loader = DataLoader(Numbers(11), batch_sampler=sampler, num_workers=workers)
    for epoch in (1, 2):
        check(list(windows(loader, 4, at_most(3))), list(range(11))[::-1], 4, 3)
        assert sampler.epochs == epoch
    assert loader_length(loader, 4) is None


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterable_dataset_keeps_the_loaders_order(workers: int) -> None:
    loader = DataLoader(Stream(11), batch_size=3, num_workers=workers)
    for _ in range(2):
        expected = [int(i) for batch in loader for i in batch["id"]]
        check(list(windows(loader, 8, at_most(3))), expected, 8, 3)


def test_a_loader_without_automatic_batching_is_cut_within_its_batches() -> None:
    sampler = BatchSampler(SequentialSampler(range(10)), 4, drop_last=False)

    class Batched(Numbers):
        def __getitem__(self, index: Any) -> dict[str, Any]:
            return {"id": torch.tensor(index)}

    loader = DataLoader(Batched(10), sampler=sampler, batch_size=None)
    check(list(windows(loader, 6, at_most(4))), list(range(10)), 6, 4)
    assert loader_length(loader, 6) is None


def test_a_generator_is_cut_without_being_read_ahead_of_its_window() -> None:
    read = []

    def batches() -> Iterator[dict[str, Any]]:
        for batch in batches_of([4, 4, 4]):
            read.append(1)
            yield batch

    found = windows(batches(), 4, at_most(2))
    assert not read
    next(found)
    assert len(read) == 1
    assert ids(list(found)) == list(range(4, 12))


def test_a_subclass_that_iterates_in_its_own_way_is_left_to_do_so() -> None:
    class Doubling(DataLoader[Any]):
        def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
            return ({"id": batch["id"] * 2} for batch in super().__iter__())

    check(list(windows(Doubling(Numbers(5), batch_size=2), 3, at_most(2))), [0, 2, 4, 6, 8], 3, 2)


def test_a_changed_split_reaches_the_next_window_requested() -> None:
    def split_now(samples: int) -> tuple[int, ...]:
        return at_most(micro)(samples)

    micro = 4
    for loader in (DataLoader(Numbers(24), batch_size=8), batches_of([8, 8, 8])):
        micro = 4
        found = windows(loader, 8, split_now)
        assert next(found).sizes == (4, 4)
        micro = 2
        assert [window.sizes for window in found] == [(2, 2, 2, 2)] * 2


def test_a_changed_split_does_not_disturb_what_was_prefetched() -> None:
    micro = 4
    loader = DataLoader(Numbers(80), batch_size=8, num_workers=2)
    found = windows(loader, 8, lambda samples: at_most(micro)(samples))
    first = next(found)
    micro = 1
    rest = list(found)
    check([first, *rest], list(range(80)), 8, 4)
    assert rest[0].sizes == (4, 4)
    assert rest[-1].sizes == (1,) * 8


def test_the_loaders_own_settings_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Recorder(DataLoader[Any]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr("autoaccum.data.indexed_loader.DataLoader", Recorder)
    settings = {"collate_fn": pad, "num_workers": 1, "timeout": 60, "prefetch_factor": 3, "worker_init_fn": print}
    generator = torch.Generator().manual_seed(0)
    loader = Recorder(Numbers(6), batch_size=4, generator=generator, multiprocessing_context="fork", **settings)
    check(list(windows(loader, 4, at_most(2))), list(range(6)), 4, 2)
    _, fresh = made
    for name in (*settings, "dataset", "pin_memory", "generator", "multiprocessing_context"):
        assert getattr(fresh, name) is getattr(loader, name)


def test_a_packing_loader_is_packed_anew_for_each_micro_batch_and_never_cut() -> None:
    def pack(samples: list[dict[str, Any]]) -> dict[str, Any]:
        lengths = torch.tensor([0] + [len(sample["ids"]) for sample in samples])
        return {
            "id": torch.stack([sample["id"] for sample in samples]),
            "ids": torch.cat([sample["ids"] for sample in samples])[None],
            "cu_seqlens": lengths.cumsum(0),
        }

    loader = DataLoader(Numbers(6, (2, 3)), batch_size=6, collate_fn=pack)
    (window,) = windows(loader, 6, at_most(2))
    assert [piece["cu_seqlens"].tolist() for piece in window.pieces] == [[0, 2, 5]] * 3
    with pytest.raises(BatchError, match="map-style DataLoader"):
        list(windows(list(loader), 6, at_most(2)))


def test_names_settle_doubtful_keys_in_a_loader() -> None:
    weight = torch.rand(4)
    loader = [{"id": torch.arange(4 * i, 4 * i + 4), "weight": weight} for i in range(3)]
    with pytest.raises(BatchError, match="weight"):
        list(windows(loader, 6, at_most(3)))
    found = list(windows(loader, 6, at_most(3), shared={"weight"}))
    check(found, list(range(12)), 6, 3)
    assert all(piece["weight"] is weight for window in found for piece in window.pieces)
    assert loader_length(loader, 5, shared={"weight"}) == 3


@pytest.mark.parametrize(
    "loader", [None, 3, {"x": torch.ones(2)}, "text", torch.ones(2, 3), lambda: [], Numbers(3), object()]
)
def test_what_is_no_loader_raises_at_once_with_a_hint(loader: Any) -> None:
    with pytest.raises(UsageError) as caught:
        windows(loader, 4, at_most(2))
    assert caught.value.hint
    with pytest.raises(UsageError):
        loader_length(loader, 4)


@pytest.mark.parametrize("loader", [[], iter(()), DataLoader(Numbers(3), batch_size=4, drop_last=True)])
def test_an_empty_loader_says_that_it_gave_no_batch_at_all(loader: Any) -> None:
    with pytest.raises(UsageError, match="no batch at all"):
        list(windows(loader, 4, at_most(2)))


def test_a_target_below_one_and_a_split_that_does_not_sum_raise() -> None:
    with pytest.raises(UsageError):
        windows([], 0, at_most(2))
    with pytest.raises(UsageError, match="sum to 3"):
        list(windows(batches_of([4]), 4, lambda samples: (2, 1)))


def test_loader_length_knows_samplers_and_drop_last_and_touches_no_random_state() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    loader = DataLoader(Numbers(10), batch_size=4, shuffle=True, generator=generator, drop_last=True)
    assert loader_length(loader, 3) == 3
    few = RandomSampler(range(100), replacement=True, num_samples=7, generator=generator)
    assert loader_length(DataLoader(Numbers(100), batch_size=4, sampler=few), 3) == 3
    explicit = BatchSampler(few, 4, drop_last=True)
    assert loader_length(DataLoader(Numbers(100), batch_sampler=explicit), 4) == 1
    assert torch.equal(generator.get_state(), before)


def test_loader_length_of_an_iterable_dataset_is_what_it_says_or_unknown() -> None:
    class Sized(Stream):
        def __len__(self) -> int:
            return self.numbers.n

    assert loader_length(DataLoader(Stream(10), batch_size=4), 3) is None
    assert loader_length(DataLoader(Sized(10), batch_size=4), 3) == 4
    assert loader_length(DataLoader(Sized(10), batch_size=4, drop_last=True), 3) == 3
    assert loader_length(DataLoader(Sized(10), batch_size=None), 3) is None
    assert loader_length(iter(()), 3) is None


class WorkerRows(Dataset[Any]):
    """Gives, beside each sample, the process that loaded it."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, os.getpid()


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_persist_from_epoch_to_epoch_where_the_loader_says_so(persistent: bool) -> None:
    loader = DataLoader(WorkerRows(), batch_size=4, num_workers=1, persistent_workers=persistent)
    workers, epochs = set(), []
    for target, sizes in ((6, (3, 3)), (4, (2, 2)), (6, (3, 3))):
        found = list(windows(loader, target, lambda samples, sizes=sizes: sizes))
        epochs.append([int(i) for window in found for piece in window.pieces for i in piece[0]])
        assert all(window.sizes == sizes for window in found)
        workers |= {int(pid) for window in found for piece in window.pieces for pid in piece[1]}
        if target == 4:  # an epoch that is left in the middle, while samples are on their way
            next(windows(loader, target, lambda samples, sizes=sizes: sizes))
    assert epochs == [list(range(12))] * 3
    assert len(workers) == (1 if persistent else 3)
