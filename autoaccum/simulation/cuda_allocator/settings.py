"""Read the CUDA caching allocator's settings and round sizes as it does.

Read from c10/core/AllocatorConfig.h and .cpp, c10/cuda/CUDAAllocatorConfig.h and c10/cuda/CUDACachingAllocator.cpp;
each rule names its function or constant there. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...errors import UsageError

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
        expandable_segments: Whether memory is mapped page by page into one segment for each stream and pool.
        large_segment_bytes: Segments for large requests below 10 MiB, and the pages of a large expandable segment.
        device_bytes: The device's memory, of which an expandable segment spans 9/8; None for no end.
    """

    capacity_bytes: int | None = None
    max_split_size_bytes: int | None = None
    max_non_split_rounding_bytes: int = LARGE_SEGMENT_BYTES
    roundup_power2_divisions: tuple[int, ...] = ()
    garbage_collection_threshold: float = 0.0
    allowed_bytes: int | None = None
    expandable_segments: bool = False
    large_segment_bytes: int = LARGE_SEGMENT_BYTES
    device_bytes: int | None = None

    @staticmethod
    def from_settings(text: str, *, device_bytes: int | None = None, capacity_bytes: int | None = None) -> CudaRules:
        """Parse the text of PYTORCH_CUDA_ALLOC_CONF or PYTORCH_ALLOC_CONF.

        Options that don't change which bytes are reserved (pinned memory, locks) are ignored.

        Args:
            text: The variable's text, like "max_split_size_mb:64,expandable_segments:True".
            device_bytes: The device's memory, which `per_process_memory_fraction` is a part of.
            capacity_bytes: As in the rules.

        Raises:
            UsageError: For an option that is unknown, or known and not modelled, or whose value PyTorch would refuse.
        """
        found: dict[str, Any] = {"device_bytes": device_bytes, "capacity_bytes": capacity_bytes}
        for name, value in _options(text):
            if name in _READERS:
                field, read = _READERS[name]
                found[field] = _read(name, value, read)
            elif name == "per_process_memory_fraction":
                fraction = _read(name, value, _fraction)
                if fraction < 1.0:
                    found["allowed_bytes"] = _part_of(device_bytes, fraction)
            else:
                _check_harmless(name, value)
        rules = CudaRules(**found)
        if (rules.max_split_size_bytes or rules.large_segment_bytes) < rules.large_segment_bytes:
            raise _refused("max_split_size_mb", f"{(rules.max_split_size_bytes or 0) // MiB}")
        return rules

    @staticmethod
    def from_snapshot(settings: Mapping[str, Any], *, device_bytes: int | None = None) -> CudaRules:
        """Read the allocator's own report of its current settings.

        Args:
            settings: `torch.cuda.memory._snapshot()["allocator_settings"]`. What has a value of its own there is taken
                from it, the rest from the text that was set last.
            device_bytes: As for `from_settings`.

        Raises:
            UsageError: As `from_settings`.
        """
        text = settings.get("PYTORCH_CUDA_ALLOC_CONF") or settings.get("PYTORCH_ALLOC_CONF") or ""
        found = CudaRules.from_settings(text, device_bytes=device_bytes)
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


def _divisions(value: str) -> tuple[int, ...]:
    """Parse one number for all, or [megabytes:steps, ..., >:steps] (parseRoundUpPower2Divisions).

    The first pair holds for all smaller sizes too, ">" for all larger than the pair before it; what lies between two
    pairs that are not neighbours has none.
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
            table[last + 1 :] = [_steps(steps)] * (ROUNDUP_INTERVALS - last - 1)
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
    "roundup_power2_divisions": ("roundup_power2_divisions", _divisions),
    "garbage_collection_threshold": ("garbage_collection_threshold", _threshold),
    "expandable_segments": ("expandable_segments", _flag),
    "large_segment_size_mb": ("large_segment_bytes", _large_segment),
}
_HARMLESS = ("pinned_", "release_lock_on_", "graph_capture_record_stream_reuse")  # they don't affect the layout
_HARMLESS_VALUES = {"backend": "native", "throw_on_cudamalloc_oom": "False"}


def _check_harmless(name: str, value: str) -> None:
    if name.startswith(_HARMLESS) or _HARMLESS_VALUES.get(name) == value:
        return
    known = name in _HARMLESS_VALUES
    raise UsageError(
        f"The allocator setting {name}:{value} isn't modelled." if known else f"There is no allocator setting {name}.",
        "It changes the reserved bytes in a way that the replay doesn't model." if known else f"It was set to {value}.",
        f"Leave {name} out of PYTORCH_CUDA_ALLOC_CONF and PYTORCH_ALLOC_CONF.",
    )


def _part_of(device_bytes: int | None, fraction: float) -> int:
    """Return the bytes a fraction of the device allows (setMemoryFraction)."""
    if device_bytes is None:
        raise UsageError(
            f"The allocator setting per_process_memory_fraction:{fraction} needs the device's memory.",
            "The setting is a fraction of it.",
            "Give device_bytes.",
        )
    return int(fraction * device_bytes)
