"""Order the backward of lanes, and say where it is.

Autograd runs nodes in reverse order of creation, by a counter that each thread has for itself. Lanes are of one thread
and make their nodes stretch by stretch, so in the backward a lane goes back all the way to the meeting before the next
lane does, and what it holds in between is freed first. Only the loss of all lanes is made last and would go back first,
to the end of every lane: its nodes are numbered below all others. Where a window is recorded, each stretch is announced
by the node of it that runs first, and each meeting by its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .torch_internals import edges, next_sequence_number, sequence_number, set_sequence_number

UNCOUNTED = 2**63  # from here on: nodes that accumulate gradients, which always run first


OnStretch = Callable[[str, int, int], None]
FORWARD, MEETING, LOSS, START_BACK, BACKWARD, MEETING_BACK, END = (
    "forward", "meeting", "loss", "start back", "backward", "meeting back", "end",
)  # fmt: skip
ALL = -1  # the lane of what all lanes share


class BackwardOrder:
    """What was created where, in one window.

    Args:
        is_on: Whether anybody is to know; else nothing is noted.
    """

    def __init__(self, *, is_on: bool) -> None:
        self._is_on = is_on
        self._begins: list[int] = []  # of all stretches, in their order, by autograd's counter
        self._stretches: list[tuple[int, int]] = []  # their parts and lanes
        self._parts: dict[int, int] = {}
        self._loss_begins = 0
        self._ends: list[Any] = []
        self._meetings: list[list[Any]] = []

    def mark(self, lane: int) -> None:
        """Note that a lane begins, or goes on after a meeting."""
        if not self._is_on:
            return
        part = self._parts.get(lane, -1) + 1
        self._parts[lane] = part
        self._begins.append(next_sequence_number())
        self._stretches.append((part, lane))

    def met(self, given: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> None:
        """Note a meeting.

        Args:
            given: What each lane brought that may have a graph.
            made: What the meeting made of these.
        """
        for tensor in given:
            self.add_end(tensor)
        if self._is_on:
            self._meetings.append([tensor.grad_fn for tensor in made if tensor.grad_fn is not None])

    def add_end(self, tensor: torch.Tensor) -> None:
        """Note a tensor that a lane's graph leads to."""
        if self._is_on and tensor.grad_fn is not None:
            self._ends.append(tensor.grad_fn)

    def end_forward(self) -> None:
        """Note that all lanes have ended, and their loss follows."""
        self._loss_begins = next_sequence_number()

    def let_lanes_go_first(self, loss: torch.Tensor) -> None:
        """Number the nodes that made a loss of lanes below all others."""
        pending, seen = [loss.grad_fn], set[Any]()
        while pending:
            node = pending.pop()
            if node is None or node in seen or not self._loss_begins <= (number := sequence_number(node)) < UNCOUNTED:
                continue
            seen.add(node)
            set_sequence_number(node, number - self._loss_begins)
            pending.extend(inner for inner, _ in node.next_functions)

    def watch(self, on_stretch: OnStretch | None) -> None:
        """Announce stretches and meetings in the backward, and forget them.

        Args:
            on_stretch: Called with its name, the meetings before it and its lane.
        """
        if on_stretch is None:
            return
        seen: set[Any] = set()
        for number, nodes in enumerate(self._meetings):
            for node in nodes:
                seen.add(node)
                if edges(node) is not None:  # else nothing used the meeting
                    node.register_prehook(partial(_note, on_stretch, MEETING_BACK, number, ALL))
        for (part, lane), (_, node) in self._heads(seen).items():
            node.register_prehook(partial(_note, on_stretch, BACKWARD, part, lane))
        self._meetings, self._ends = [], []

    def _heads(self, seen: set[Any]) -> dict[tuple[int, int], tuple[int, Any]]:
        """Return the number and node that runs first, by part and lane."""
        heads: dict[tuple[int, int], tuple[int, Any]] = {}
        pending = self._ends
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            following = edges(node)
            if following is None or (number := sequence_number(node)) >= UNCOUNTED:
                continue
            at = bisect_right(self._begins, number) - 1
            if at >= 0 and number >= heads.get(self._stretches[at], (0, None))[0]:  # else it is from before the window
                heads[self._stretches[at]] = number, node
            pending.extend(inner for inner, _ in following if inner is not None)
        return heads


def _note(on_stretch: OnStretch, name: str, part: int, lane: int, _gradients: Any) -> None:
    on_stretch(name, part, lane)
