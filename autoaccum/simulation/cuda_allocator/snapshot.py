"""Hold a CUDA caching allocator's state before the first event."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from .addresses import edge_of

State = Literal["live", "held", "free"]
_STATES: dict[str, State] = {
    "active_allocated": "live",
    "active_pending_free": "held",
    "active_awaiting_free": "held",
    "inactive": "free",
}


class CudaBlock(NamedTuple):
    """Hold a piece of a segment.

    Attributes:
        bytes: Its size, slack included.
        state: Handed out; given back while another stream still uses it (`record_stream`); or free.
    """

    bytes: int
    state: State


@dataclass(frozen=True)
class CudaSegment:
    """Hold memory the driver gave in one piece.

    Attributes:
        address: Where it begins.
        stream: Whose it is.
        small: Whether it belongs to the pool of blocks up to 1 MiB.
        expandable: Whether it is mapped page by page.
        private: Whether it belongs to a CUDA graph or a `MemPool`: reserved, and nobody else's to use.
        blocks: From its beginning to its end, without gaps.
    """

    address: int
    stream: int
    small: bool
    expandable: bool
    private: bool
    blocks: tuple[CudaBlock, ...]

    @property
    def bytes(self) -> int:
        """The segment's size."""
        return sum(block.bytes for block in self.blocks)


@dataclass(frozen=True)
class AllocatorState:
    """Hold what one device's allocator holds at the start.

    Attributes:
        segments: By address.
        outermost: The lowest and the highest address that any memory was seen at, as (lowest, end of the highest);
            None where no more is known than from the segments.
    """

    segments: tuple[CudaSegment, ...] = ()
    outermost: tuple[int, int] | None = None

    @staticmethod
    def from_snapshot(
        segments: Iterable[Mapping[str, Any]], device: int = 0, outermost: tuple[int, int] | None = None
    ) -> AllocatorState:
        """Read `torch.cuda.memory_snapshot()`.

        Of an expandable segment a snapshot shows mapped pages only: what was unmapped below the lowest of them is not
        known and taken as none, and neither is the age of blocks, by which the garbage collection goes.

        Args:
            segments: The list of dicts.
            device: The device's index; the others' segments are passed over.
            outermost: As in the state.
        """
        found = [_segment(segment) for segment in segments if segment.get("device", device) == device]
        return AllocatorState(tuple(sorted(found, key=lambda segment: segment.address)), outermost)

    def ranges(self) -> list[tuple[int, int]]:
        """Return ranges in use, as (address, bytes), without expandable segments."""
        return [(segment.address, segment.bytes) for segment in self.segments if not segment.expandable]

    def edge(self, down: bool) -> int:
        """Return where addresses begin: at the bottom or at the top."""
        low, high = self.outermost or (0, 0)
        return edge_of([*self.ranges(), *([(low, high - low)] if self.outermost else [])], down, HIGHEST if down else 0)

    @property
    def reserved_bytes(self) -> int:
        """The value of `memory_reserved`."""
        return sum(segment.bytes for segment in self.segments)

    @property
    def allocated_bytes(self) -> int:
        """The value of `memory_allocated`."""
        return sum(b.bytes for segment in self.segments for b in segment.blocks if b.state == "live")


EMPTY = AllocatorState()
HIGHEST = 1 << 58  # where addresses that go down begin, if nothing is known of them


def _segment(segment: Mapping[str, Any]) -> CudaSegment:
    return CudaSegment(
        address=segment["address"],
        stream=segment["stream"],
        small=segment["segment_type"] == "small",
        expandable=bool(segment.get("is_expandable", False)),
        private=tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0),
        blocks=tuple(CudaBlock(block["size"], _STATES[block["state"]]) for block in segment["blocks"]),
    )
