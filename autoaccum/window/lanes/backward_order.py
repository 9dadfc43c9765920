"""Order the backward of lanes: meeting by meeting, lane by lane.

Autograd runs nodes in reverse order of creation, by a counter that each thread has for itself. By the counters of many
threads all lanes would go back abreast, one operation after the other, and hold the gradients of as many. With numbers
as one thread would have given them, a lane goes back all the way to the meeting before the next lane does, and what it
holds in between is freed first.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .torch_internals import edges, next_sequence_number, sequence_number, set_sequence_number

WIDTH = 2**32  # numbers for each lane between two meetings
UNCOUNTED = 2**63  # from here on: nodes that accumulate gradients, which always run first


OnStretch = Callable[[str, int, int], None]
FORWARD, MEETING, LOSS, START_BACK, BACKWARD, MEETING_BACK, END = (
    "forward", "meeting", "loss", "start back", "backward", "meeting back", "end",
)  # fmt: skip
ALL = -1  # the lane of what all lanes share


class BackwardOrder:
    """What was created where, in one window.

    Args:
        lanes: Number of lanes.
    """

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes
        self._bounds: list[list[int]] = [[] for _ in range(lanes)]
        self._ends: list[list[Any]] = [[] for _ in range(lanes)]
        self._meetings: list[list[Any]] = []
        self._heads: dict[tuple[int, int], tuple[int, Any]] = {}

    def mark(self, lane: int) -> None:
        """Note in a lane's thread that a meeting is over."""
        self._bounds[lane].append(next_sequence_number())

    def met(self, given: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> None:
        """Note a meeting.

        Args:
            given: What each lane brought that may have a graph.
            made: What the meeting made of these.
        """
        for lane, tensor in enumerate(given):
            self.add_end(lane, tensor)
        self._meetings.append([tensor.grad_fn for tensor in made if tensor.grad_fn is not None])

    def add_end(self, lane: int, tensor: torch.Tensor) -> None:
        """Note a tensor that a lane's graph leads to."""
        if tensor.grad_fn is not None:
            self._ends[lane].append(tensor.grad_fn)

    def apply(self, on_stretch: OnStretch | None = None, first: torch.Tensor | None = None) -> None:
        """Number all nodes anew, and forget them.

        Args:
            on_stretch: Called in the backward where a lane's stretch begins, and a meeting.
            first: The loss of the lanes, where the backward begins from meetings, too: its own nodes are numbered as
                after the last meeting, or a meeting that it doesn't reach would run before later ones.
        """
        seen: set[Any] = set()
        for number, nodes in enumerate(self._meetings):
            for node in nodes:
                seen.add(node)
                if edges(node) is None:  # nothing used the meeting
                    continue
                set_sequence_number(node, ((number + 1) * self._lanes) * WIDTH - 1)
                if on_stretch is not None:
                    node.register_prehook(partial(_note, on_stretch, MEETING_BACK, number, ALL))
        if first is not None:
            others = seen.union(*self._ends)
            _number_after(first.grad_fn, len(self._meetings) * self._lanes * WIDTH, others)
        for lane, (bounds, ends) in enumerate(zip(self._bounds, self._ends, strict=True)):
            self._number(lane, bounds, ends, seen)
        if on_stretch is not None:
            for (part, lane), (_, node) in self._heads.items():
                node.register_prehook(partial(_note, on_stretch, BACKWARD, part, lane))
        self._meetings = []
        self._heads = {}
        self._ends = [[] for _ in range(self._lanes)]

    def _number(self, lane: int, bounds: list[int], pending: list[Any], seen: set[Any]) -> None:
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            following = edges(node)
            if following is None or (number := sequence_number(node)) >= UNCOUNTED:
                continue
            part = bisect_right(bounds, number) - 1
            if part >= 0:  # else it is from before the window
                set_sequence_number(node, (part * self._lanes + lane) * WIDTH + number - bounds[part])
                if number >= self._heads.get((part, lane), (0, None))[0]:  # the one that runs first
                    self._heads[part, lane] = number, node
            pending.extend(inner for inner, _ in following if inner is not None)


def _number_after(root: Any, begin: int, seen: set[Any]) -> None:
    """Number the nodes between a root and those seen."""
    pending = [root]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        number = sequence_number(node)
        if number < UNCOUNTED:
            set_sequence_number(node, begin + number)
            pending.extend(inner for inner, _ in node.next_functions)


def _note(on_stretch: OnStretch, name: str, part: int, lane: int, _gradients: Any) -> None:
    on_stretch(name, part, lane)
