"""Read the CUDA caching allocator's settings and round sizes as it does.

Read from c10/core/AllocatorConfig.h and .cpp, c10/cuda/CUDAAllocatorConfig.h and c10/cuda/CUDACachingAllocator.cpp;
each rule names its function or constant there. No torch here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...errors import UsageError
from .blocks import UNLIMITED_BYTES
from .ties import LATEST_KNOWN, OLDEST_SEGMENT, TieRule

KiB, MiB = 1 << 10, 1 << 20
MIN_BLOCK_BYTES = 512  # kMinBlockSize: every size is rounded up to a multiple of it
MAX_SMALL_BYTES = MiB  # kSmallSize: rounded sizes up to here live in the small pool
SMALL_SEGMENT_BYTES = 2 * MiB  # kSmallBuffer; also the pages of a small pool's expandable segment
MIN_LARGE_BYTES = 10 * MiB  # kMinLargeAlloc: below it a large segment is
LARGE_SEGMENT_BYTES = 20 * MiB  # large_segment_size(), and from it on the size rounded up to
LARGE_ROUNDING_BYTES = 2 * MiB  # kRoundLarge
_NO_SPLIT_LIMIT = 1 << 60  # kRoundLarge's numeric limit, and anything near it
ROUNDUP_INTERVALS = 16  # kRoundUpPowerOfTwoIntervals: from 1 MiB (and less) to 32 GiB (and more), by powers of two


@dataclass(frozen=True)
class CudaRules:
    """Hold the allocator's settings and the device's capacity.

    Attributes:
        capacity_bytes: What the driver can hand out in all, what the allocator holds already included; None for any
            amount.
        max_split_size_bytes: Blocks from here on are neither split nor given to smaller requests; None for no limit.
        max_non_split_rounding_bytes: How much larger than the request such a block may be.
        roundup_power2_divisions: Steps between powers of two that sizes are rounded up to, by interval: the first for
            sizes below 2 MiB, the second below 4 MiB, and so on, 16 in all; empty, or 0, for none.
        garbage_collection_threshold: Part of `allowed_bytes` above which unused large segments are given back; 0 for
            never.
        allowed_bytes: What `set_per_process_memory_fraction` allows; None where it wasn't called. Without it there is
            no garbage collection either.
        refuses_above_allowed: Whether more than `allowed_bytes` is refused, as by the allocator; see `with_capacity`.
        expandable_segments: Whether memory is mapped page by page into one segment for each stream and pool.
        large_segment_bytes: Segments for large requests below 10 MiB, and the pages of a large expandable segment.
        device_bytes: The device's memory, of which an expandable segment spans 9/8; None for no end.
        expandable_reserve_bytes: What an expandable segment spans at most; None for as much as it may.
        tie_rule: Which of several free blocks of one size is taken.
        addresses_down: Whether later memory lies below earlier memory, as on a GPU under Linux.
    """

    capacity_bytes: int | None = None
    max_split_size_bytes: int | None = None
    max_non_split_rounding_bytes: int = LARGE_SEGMENT_BYTES
    roundup_power2_divisions: tuple[int, ...] = ()
    garbage_collection_threshold: float = 0.0
    allowed_bytes: int | None = None
    refuses_above_allowed: bool = True
    expandable_segments: bool = False
    large_segment_bytes: int = LARGE_SEGMENT_BYTES
    device_bytes: int | None = None
    expandable_reserve_bytes: int | None = None
    tie_rule: TieRule = OLDEST_SEGMENT
    addresses_down: bool = False

    def with_capacity(self, capacity_bytes: int | None) -> CudaRules:
        """Return the rules where so many bytes can be reserved.

        What a fraction allows in this process is no limit to a larger amount: it is asked what a window would take if
        it had that much. Garbage collection still begins at its part of `allowed_bytes`.

        Args:
            capacity_bytes: What the allocator may reserve in all; None for any amount.
        """
        within = capacity_bytes is not None and capacity_bytes <= (self.allowed_bytes or 0)
        return replace(self, capacity_bytes=capacity_bytes, refuses_above_allowed=within)

    def expandable_span(self, page: int) -> int:
        """Return the addresses of an expandable segment of such pages (ExpandableSegment's constructor)."""
        span = UNLIMITED_BYTES if self.device_bytes is None else self.device_bytes + self.device_bytes // 8
        if self.expandable_reserve_bytes is not None:
            span = min(span, self.expandable_reserve_bytes)  # clamp_reserve_bytes
        return -(-span // page) * page

    @staticmethod
    def from_settings(
        text: str,
        *,
        device_bytes: int | None = None,
        capacity_bytes: int | None = None,
        version: tuple[int, int] = LATEST_KNOWN,
    ) -> CudaRules:
        """Parse the text of PYTORCH_CUDA_ALLOC_CONF or PYTORCH_ALLOC_CONF.

        Options that don't change which bytes are reserved (pinned memory, locks) are ignored.

        Args:
            text: The variable's text, like "max_split_size_mb:64,expandable_segments:True".
            device_bytes: The device's memory, which `per_process_memory_fraction` is a part of.
            capacity_bytes: As in the rules.
            version: The torch that parses it, as (major, minor).

        Raises:
            UsageError: For an option that is unknown, or known and not modelled, or whose value PyTorch would refuse.
        """
        found: dict[str, Any] = {"device_bytes": device_bytes, "capacity_bytes": capacity_bytes}
        for name, value in _options(text):
            _check_known(name, version)
            if name in _READERS:
                field, read = _READERS[name]
                found[field] = _read(name, value, read)
            elif name == "roundup_power2_divisions":
                found[name] = _read(name, value, lambda text: _divisions(text, version))
            elif name in _FRACTIONS:
                found |= _part(name, value, device_bytes)
            else:
                _check_harmless(name, value)
        rules = CudaRules(**found)
        if (rules.max_split_size_bytes or rules.large_segment_bytes) < rules.large_segment_bytes:
            raise _refused("max_split_size_mb", f"{(rules.max_split_size_bytes or 0) // MiB}")
        return rules

    @staticmethod
    def from_snapshot(
        settings: Mapping[str, Any], *, device_bytes: int | None = None, version: tuple[int, int] = LATEST_KNOWN
    ) -> CudaRules:
        """Read the allocator's own report of its current settings.

        Args:
            settings: `torch.cuda.memory._snapshot()["allocator_settings"]`. What has a value of its own there is taken
                from it, the rest from the text that was set last.
            device_bytes: As for `from_settings`.
            version: As for `from_settings`.

        Raises:
            UsageError: As `from_settings`.
        """
        text = settings.get("PYTORCH_CUDA_ALLOC_CONF") or settings.get("PYTORCH_ALLOC_CONF") or ""
        found = CudaRules.from_settings(text, device_bytes=device_bytes, version=version)
        own: dict[str, Any] = {}
        if "max_split_size" in settings:  # as large as can be, or -1, where there is none
            size = settings["max_split_size"]
            own["max_split_size_bytes"] = size if 0 < size < _NO_SPLIT_LIMIT else None
        if "garbage_collection_threshold" in settings:
            own["garbage_collection_threshold"] = float(settings["garbage_collection_threshold"])
        if "expandable_segments" in settings:
            own["expandable_segments"] = bool(settings["expandable_segments"])
        if "roundup_power2_divisions" in settings:
            divisions = settings["roundup_power2_divisions"]
            steps = tuple(int(divisions[key]) for key in sorted(divisions, key=int))
            own["roundup_power2_divisions"] = steps if any(steps) else ()
        return replace(found, **own)


def round_size(size: int, divisions: tuple[int, ...] = ()) -> int:
    """Round a request: to 512 bytes, or between powers of two (round_size)."""
    if size < MIN_BLOCK_BYTES:
        return MIN_BLOCK_BYTES
    if divisions:
        steps = divisions[min(max(size.bit_length() - MiB.bit_length(), 0), ROUNDUP_INTERVALS - 1)]
        if steps > 1 and size > MIN_BLOCK_BYTES * steps:  # roundup_power2_next_division
            power = 1 << (size.bit_length() - 1)
            step = power // steps
            return -(-size // step) * step
    return -(-size // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES


def segment_bytes(size: int, large_segment_bytes: int = LARGE_SEGMENT_BYTES) -> int:
    """Return the bytes asked of cudaMalloc for a rounded size (get_allocation_size)."""
    if size <= MAX_SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < MIN_LARGE_BYTES:
        return large_segment_bytes
    return -(-size // LARGE_ROUNDING_BYTES) * LARGE_ROUNDING_BYTES


# -- the settings' text: ConfigTokenizer, and a parse... function of AllocatorConfig.cpp for each option


def _options(text: str) -> list[tuple[str, str]]:
    plain = re.sub(r"\s", "", text)
    options = []
    for part in re.split(r",(?![^\[]*\])", plain) if plain else []:
        name, colon, value = part.partition(":")
        if not (name and colon and value):
            raise UsageError(
                f"The allocator setting {part!r} isn't of the form option:value.",
                f"It stands in {text!r}.",
                "Write it as PYTORCH_CUDA_ALLOC_CONF=option:value,option:value.",
            )
        options.append((name, value))
    return options


def _read(name: str, value: str, read: Callable[[str], Any]) -> Any:
    try:
        return read(value)
    except ValueError:
        raise _refused(name, value) from None


def _refused(name: str, value: str) -> UsageError:
    return UsageError(
        f"The allocator setting {name}:{value} can't be used.",
        "PyTorch would refuse it too.",
        "See 'Memory management' in PyTorch's CUDA notes for the values that it takes.",
    )


def _megabytes(value: str) -> int:
    if int(value) < LARGE_SEGMENT_BYTES // MiB:
        raise ValueError
    return int(value) * MiB


def _large_segment(value: str) -> int:
    if int(value) * MiB <= MIN_LARGE_BYTES:
        raise ValueError
    return int(value) * MiB


def _flag(value: str) -> bool:
    return {"True": True, "False": False}[value] if value in ("True", "False") else bool(int(""))


def _threshold(value: str) -> float:
    if not 0 < float(value) < 1:
        raise ValueError
    return float(value)


def _fraction(value: str) -> float:
    if not 0 <= float(value) <= 1:
        raise ValueError
    return float(value)


def _steps(value: str) -> int:
    steps = int(value)
    if steps < 0 or steps & (steps - 1):
        raise ValueError
    return steps


def _divisions(value: str, version: tuple[int, int]) -> tuple[int, ...]:
    """Parse one number for all, or [megabytes:steps, ..., >:steps] (parseRoundUpPower2Divisions).

    The first pair holds for all smaller sizes too, ">" for all larger than the pair before it; what lies between two
    pairs that are not neighbours has none. Up to torch 2.9 ">" replaces the pair before it as well.
    """
    if not value.startswith("["):
        if int(value) == 0:
            raise ValueError
        return (_steps(value),) * ROUNDUP_INTERVALS
    table = [0] * ROUNDUP_INTERVALS
    last = 0
    for place, pair in enumerate(value.strip("[]").split(",")):
        bound, _, steps = pair.partition(":")
        if bound == ">":
            first = last + (version >= (2, 10))
            table[first:] = [_steps(steps)] * (ROUNDUP_INTERVALS - first)
            continue
        if _steps(bound) == 0:
            raise ValueError
        last = min(int(bound).bit_length() - 1, ROUNDUP_INTERVALS - 1)
        if place == 0:
            table[:last] = [_steps(steps)] * last
        table[last] = _steps(steps)
    return tuple(table)


_READERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "max_split_size_mb": ("max_split_size_bytes", _megabytes),
    "max_non_split_rounding_mb": ("max_non_split_rounding_bytes", _megabytes),
    "garbage_collection_threshold": ("garbage_collection_threshold", _threshold),
    "expandable_segments": ("expandable_segments", _flag),
    "large_segment_size_mb": ("large_segment_bytes", _large_segment),
}
_FRACTIONS = ("per_process_memory_fraction", "expandable_segments_reserve")
# They don't affect the layout. A reserve by class holds for streams that C++ code has put into a class.
_HARMLESS = ("pinned_", "release_lock_on_", "graph_capture_record_stream_reuse", "expandable_segments_reserve_by_class")
_HARMLESS_VALUES = {"backend": "native", "throw_on_cudamalloc_oom": "False"}
# The first version of torch that has an option, where 2.6 has not; each was set in 2.6, 2.9, 2.11, 2.12, 2.14 and 2.15.
# No version has `expandable_segments_handle_type`, though an error message of 2.14 names it.
_SINCE = {
    "large_segment_size_mb": (2, 10),  # or 2.11: 2.10 was not tried
    "per_process_memory_fraction": (2, 10),
    "graph_capture_record_stream_reuse": (2, 9),
    "pinned_reserve_segment_size_mb": (2, 10),
    "pinned_free_catch_all": (2, 12),
    "throw_on_cudamalloc_oom": (2, 12),
    "pinned_max_round_threshold_mb": (2, 14),  # or 2.13
    "pinned_max_cached_size_mb": (2, 14),
    "expandable_segments_reserve": (2, 15),
    "expandable_segments_reserve_by_class": (2, 15),
}


def _check_known(name: str, version: tuple[int, int]) -> None:
    since = _SINCE.get(name, version)
    if since > version:
        raise UsageError(
            f"torch {version[0]}.{version[1]} has no allocator setting {name}.",
            f"It came with torch {since[0]}.{since[1]}.",
            f"Leave {name} out of PYTORCH_CUDA_ALLOC_CONF and PYTORCH_ALLOC_CONF, or install a newer torch.",
        )


def _part(name: str, value: str, device_bytes: int | None) -> dict[str, int]:
    """Return what a fraction of the device allows, by field."""
    if name == "per_process_memory_fraction":
        fraction = _read(name, value, _fraction)
        return {} if fraction == 1 else {"allowed_bytes": int(fraction * _needed(name, value, device_bytes))}
    try:
        gigabytes = value[-1:] in ("G", "g")
        number = float(value[:-1] if gigabytes else value)
    except ValueError:
        return {}  # parseReserveSpec warns, and keeps the default
    if not 0 < number < math.inf:
        return {}
    unit = 1 << 30 if gigabytes else _needed(name, value, device_bytes)
    return {"expandable_reserve_bytes": int(min(number * unit, UNLIMITED_BYTES))}


def _check_harmless(name: str, value: str) -> None:
    if name.startswith(_HARMLESS) or _HARMLESS_VALUES.get(name) == value:
        return
    known = name in _HARMLESS_VALUES
    raise UsageError(
        f"The allocator setting {name}:{value} isn't modelled." if known else f"There is no allocator setting {name}.",
        "It changes the reserved bytes in a way that the replay doesn't model." if known else f"It was set to {value}.",
        f"Leave {name} out of PYTORCH_CUDA_ALLOC_CONF and PYTORCH_ALLOC_CONF.",
    )


def _needed(name: str, value: str, device_bytes: int | None) -> int:
    """Return the device's memory, of which a setting is a fraction."""
    if device_bytes is None:
        raise UsageError(
            f"The allocator setting {name}:{value} needs the device's memory.",
            "The setting is a fraction of it.",
            "Give device_bytes.",
        )
    return device_bytes
