"""Find accesses of CUDA streams to the same memory that nothing orders.

A stream's clock counts what was launched on it, and on others as far as it waited for them by events. Two streams that
access the same bytes, one of them writing, race unless the later one's clock knows the earlier access. Memory counts by
address: a block that is given back and taken again too early is found, too. For a virtual GPU, which runs everything in
the order of its launch and so shows no race by its values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Clock = dict[int, int]


@dataclass(frozen=True)
class Access:
    """One operation's access to a range of a device's memory."""

    begin: int
    end: int
    stream: int
    number: int
    writes: bool
    name: str


class Races(TorchDispatchMode):
    """Watch all operations on a device, and the events between its streams.

    Attributes:
        found: What races, in words.
        copies: The streams of the copies between host and device.
        computing: The streams of everything else.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: list[str] = []
        self.copies: set[int] = set()
        self.computing: set[int] = set()
        self._clocks: defaultdict[int, Clock] = defaultdict(lambda: defaultdict(int))
        self._events: list[tuple[Any, Clock]] = []
        self._accesses: list[Access] = []
        record, wait = torch.cuda.Stream.record_event, torch.cuda.Stream.wait_event

        def recorded(stream: Any, event: Any = None) -> Any:
            made = record(stream, event)
            self._events.append((made, dict(self._clocks[stream.cuda_stream])))
            return made

        def waited(stream: Any, event: Any) -> None:
            wait(stream, event)
            known = next(clock for made, clock in reversed(self._events) if made is event)
            clock = self._clocks[stream.cuda_stream]
            for other, number in known.items():
                clock[other] = max(clock[other], number)

        monkeypatch.setattr(torch.cuda.Stream, "record_event", recorded)
        monkeypatch.setattr(torch.cuda.Stream, "wait_event", waited)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = list(_on_device((args, kwargs)))
        made = [tensor for tensor in _on_device(out) if all(tensor is not each for each in given)]
        if not given and not made:
            return out
        stream = torch.cuda.current_stream().cuda_stream
        leaves = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        is_copy = func is torch.ops.aten.copy_.default and any(leaf.device.type == "cpu" for leaf in leaves)
        (self.copies if is_copy else self.computing).add(stream)
        self._clocks[stream][stream] += 1
        written = _written(func, args)
        for tensor in given:
            self._access(tensor, stream, any(tensor is each for each in written), str(func))
        for tensor in made:
            if not func.is_view:
                self._access(tensor, stream, True, str(func))
        return out

    def _access(self, tensor: torch.Tensor, stream: int, writes: bool, name: str) -> None:
        begin = tensor.data_ptr()
        one = Access(begin, begin + tensor.nbytes, stream, self._clocks[stream][stream], writes, name)
        for other in self._accesses:
            alike = other.begin < one.end and one.begin < other.end and other.stream != stream
            if alike and (writes or other.writes) and self._clocks[stream][other.stream] < other.number:
                self.found.append(f"{name} after {other.name}")
        self._accesses.append(one)


def _on_device(tree: Any) -> Iterator[torch.Tensor]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda" and leaf.numel():
            yield leaf


def _written(func: Any, args: Any) -> list[Any]:
    """Return the arguments that an operation writes to."""
    schema = zip(func._schema.arguments, args, strict=False)
    return [value for each, value in schema if each.alias_info is not None and each.alias_info.is_write]
