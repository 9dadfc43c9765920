"""Train a window's micro-batches in lanes, with one backward for all."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from ...data import tree
from ...devices.registry import get_device
from ...errors import UsageError
from ...torch_compat import write_count
from ...workload import Batch
from .. import loss_terms
from .. import norms as batchnorm
from ..cached_representations import joined
from ..context import TrainingContext, autocast, encode, forward
from ..loss_form import LossKind
from ..micro_batch import Course, backward, keywords, part_of_window, release_workspaces
from .backward_order import ALL, END, FORWARD, LOSS, MEETING, START_BACK, BackwardOrder
from .baton import run_lanes
from .host_store import HostStore
from .interception import LaneMode, Meetings, RecomputingMode
from .random_states import RandomStates
from .thread_state import ThreadState
from .torch_internals import run_backward


def train_in_lanes(
    course: Course, pieces: Sequence[Batch], sizes: Sequence[int], total: Any, samples: int
) -> tuple[torch.Tensor | None, Any]:
    """Run forward and backward of a window whose samples interact.

    Args:
        course: What the window's micro-batches share.
        pieces: The micro-batches; none on a rank without samples.
        sizes: Samples in each.
        total: What the window counts, where that is known.
        samples: Samples in the window, on all ranks.

    Returns:
        The window's loss, detached, and what the window counts. Over ranks the loss is this one's part; None where
        nothing counts.

    Raises:
        UsageError: The lanes don't meet in the same order, or a normalization can't be met.
        StartOver: Another rank ran out of memory.
        RanksFailed: Another rank failed, or its lanes are at another meeting.
    """
    exchange = course.context.exchange
    if exchange is not None and not pieces:
        counted = exchange.attend()
        return None, total if counted is None else counted
    store = _host_store(course.context) if len(pieces) > 1 else None
    try:
        loss, total = _train(course, store, pieces, [size / samples for size in sizes], sizes, total)
    finally:
        if store is not None:
            store.end()
    release_workspaces(course.context)
    return loss, total


def _train(
    course: Course,
    store: HostStore | None,
    pieces: Sequence[Batch],
    shares: Sequence[float],
    sizes: Sequence[int],
    total: Any,
) -> tuple[torch.Tensor | None, Any]:
    context, form = course.context, course.form
    meetings = _meetings(context, sizes)
    if store is not None:
        store.move_gathered(meetings.gathered)
    before = _writes(context.norms)

    def run(piece: Batch, share: float) -> Any:
        if context.encode is not None:
            return encode(context, piece)
        return forward(context, piece, keywords(context, form, share, total))

    runs = [partial(run, piece, share) for piece, share in zip(pieces, shares, strict=True)]
    outs = _forward(course, store, meetings, runs, sizes)
    _refuse_unmet(context.norms, meetings, before)
    if context.encode is not None:
        loss: torch.Tensor | None = _loss_of_all(context, outs)
    else:
        if form.kind is LossKind.SUM:
            total = sum(loss_terms.count_of(out) for out in outs)
        if context.exchange is not None:
            found = context.exchange.end_forward(total if form.kind is LossKind.SUM else None)
            total = total if found is None else found
        loss = None
        for lane, (piece, share) in enumerate(zip(pieces, shares, strict=True)):
            _note(context, LOSS, 0, lane)
            part = part_of_window(context, form, piece, outs.pop(0), share, total)
            if part is not None:
                loss = part if loss is None else loss + part
    if store is not None:
        store.end_forward()
    _backward(context, meetings, loss)
    return None if loss is None else loss.detach(), total


def _meetings(context: TrainingContext, sizes: Sequence[int]) -> Meetings:
    """Return the meetings of a window to come."""
    order, absent = BackwardOrder(is_on=context.on_stretch is not None), context.absent_rows(sum(sizes))
    return Meetings(order, *_identities(context.norms), ranks=context.exchange, absent=absent)


def _backward(context: TrainingContext, meetings: Meetings, loss: torch.Tensor | None) -> None:
    """Run one backward for all lanes, through the meetings of all ranks."""
    if loss is not None or meetings.anchors:
        if loss is not None and context.exchange is None:  # over ranks a backward begins from meetings as well
            meetings.order.let_lanes_go_first(loss)
        meetings.order.watch(context.on_stretch)
        meetings.gate.open = True
        _note(context, START_BACK, 0)
        run = partial(run_backward, anchors=tuple(meetings.anchors))
        try:
            with RecomputingMode(meetings):
                if loss is not None:
                    backward(context, loss, run)
                else:
                    run(None)
            _note(context, END, 0)
        finally:
            del run
            meetings.forget()  # autograd's threads let go of the mode that holds it at a time of their own
    if context.exchange is not None:
        context.exchange.end_backward()


def _note(context: TrainingContext, name: str, part: int, lane: int = ALL) -> None:
    """Say where a window is, to what records it."""
    if context.on_stretch is not None:
        context.on_stretch(name, part, lane)


def _forward(
    course: Course, store: HostStore | None, meetings: Meetings, runs: Sequence[Callable[[], Any]], sizes: Sequence[int]
) -> list[Any]:
    """Run all forwards in lanes, and return what they return."""
    context = course.context
    draws = RandomStates(context.device, len(runs))
    turns = Counter[int]()  # by lane: its meetings so far

    @contextlib.contextmanager
    def turn(lane: int) -> Iterator[None]:
        _note(context, FORWARD, turns[lane], lane)
        if store is not None:
            store.enter(lane, turns[lane])
        turns[lane] += 1
        draws.enter(lane)
        course.norms.iterate(lane == 0)
        try:
            yield
        finally:
            release_workspaces(context)
            if lane == len(runs) - 1:
                _note(context, MEETING, turns[lane] - 1)

    def in_lane(lane: int, run: Callable[[], Any]) -> Any:
        meetings.order.mark(lane)
        with LaneMode(lane, meetings), contextlib.nullcontext() if store is None else store.moving(sizes[lane]):
            return run()

    works = [partial(in_lane, lane, run) for lane, run in enumerate(runs)]
    try:
        outs = run_lanes(works, meetings, turn, ThreadState(context.device))
    finally:
        draws.enter(0)  # the caller's draws go on
    for out in outs:
        for tensor in _tensors(out):
            meetings.order.add_end(tensor)
    meetings.order.end_forward()
    return outs


def _host_store(context: TrainingContext) -> HostStore | None:
    """Return what keeps saved tensors on the host; None on a CPU."""
    if context.device.type == "cpu":
        return None
    if context.host_store is None:
        copies = get_device(context.device).computes
        context.host_store = HostStore(context.device, context.host_memory_bytes, copies=copies)
    stay = (*context.model.parameters(), *context.model.buffers())
    context.host_store.begin(
        stay, context.moved_bytes_per_sample, context.autocast_dtype, context.moved_parts, recomputes=context.recomputes
    )
    return context.host_store


def _loss_of_all(context: TrainingContext, encoded: list[Any]) -> torch.Tensor:
    """Return the loss of the representations of all lanes, with its graph."""
    together = joined(encoded)
    encoded.clear()
    with autocast(context):
        return loss_terms.whole(loss_terms.check(context.loss(context.model, together)))


def _tensors(out: Any) -> list[torch.Tensor]:
    """Return the tensors that a lane returned: its loss, or its representations."""
    if isinstance(out, loss_terms.LossTerms):
        out = [out.sum, out.count, out.extra]
    return [leaf for _, leaf in tree.leaves(out) if isinstance(leaf, torch.Tensor)]


def _identities(norms: batchnorm.Norms) -> tuple[dict[int, str], frozenset[int]]:
    """Return modules' names by their tensors, and their counts of batches."""
    names: dict[int, str] = {}
    for name, module in (*norms.batch.items(), *norms.instance.items()):
        for tensor in (module.running_mean, module.weight):
            if tensor is not None:
                names.setdefault(id(tensor), name)
    modules = (*norms.batch.values(), *norms.instance.values())
    counts = (module.num_batches_tracked for module in modules)
    return names, frozenset(id(count) for count in counts if count is not None)


def _writes(norms: batchnorm.Norms) -> dict[str, int]:
    """Return how often each module's running statistics were written to."""
    found = {name: module.running_mean for name, module in norms.batch.items()}
    return {name: write_count(mean) for name, mean in found.items() if mean is not None}


def _refuse_unmet(norms: batchnorm.Norms, meetings: Meetings, before: dict[str, int]) -> None:
    """Refuse modules that took statistics of single micro-batches unseen.

    Raises:
        UsageError: Names one.
    """
    met = {identity for place in meetings.met for identity in place if isinstance(identity, int)}
    for name, writes in before.items():
        mean = norms.batch[name].running_mean
        if mean is not None and write_count(mean) != writes and id(mean) not in met:
            raise UsageError(
                f"{name or 'The model'} ({type(norms.batch[name]).__name__}) took the statistics of single "
                "micro-batches.",
                "It doesn't call torch.nn.functional.batch_norm, where the micro-batches of a window meet.",
                "Use batchnorm='frozen', 'merged' or 'per_micro_batch', or torch.nn.BatchNorm in its place.",
            )
