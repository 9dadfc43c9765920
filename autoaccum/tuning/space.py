"""Define the choices to search, narrowed to workload and device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

from ..configuration import IMPLEMENTATIONS, LARGEST, NAMES, Configuration, check_choice
from ..errors import UsageError

MIN_POWER_OF_TWO, MAX_POWERS = 4, 6  # powers of two to try as micro-batches, beside the largest that fits

Choices = dict[str, tuple[Any, ...]]  # by name, in the order in which they are tried
Values = dict[str, Any]


@dataclass(frozen=True)
class SearchSpace:
    """Hold the choices to search.

    Each field is a tuple of choices; a single one fixes it.

    Attributes:
        precision: "fp32", "bf16", "fp16" autocast. None: all on CUDA; fp32 and bf16 on a CPU, where fp16 is mostly
            emulated.
        checkpointing: 0 for none, n for every n-th of the model's repeated blocks.
        channels_last: For models with convolutions of images.
        optimizer: "loop", "foreach", "fused": those of them that the optimizer has.
        micro_batch: Samples, or "largest". None: the largest that fits, and powers of two.
        expandable_segments: On CUDA.
        compile: `torch.compile`. Left out unless named: a compilation takes longer than most trials.
        loader_workers: Processes that load data. None: the workload's own. Windows are loaded in the timing where there
            are several choices.
    """

    precision: tuple[str, ...] | None = None
    checkpointing: tuple[int, ...] = (0, 1, 2)
    channels_last: tuple[bool, ...] = (False, True)
    optimizer: tuple[str, ...] = IMPLEMENTATIONS
    micro_batch: tuple[int | str, ...] | None = None
    expandable_segments: tuple[bool, ...] = (False, True)
    compile: tuple[bool, ...] = (False,)
    loader_workers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in NAMES:
            choices = getattr(self, name)
            if choices is not None:
                _check(name, choices)
                for choice in choices:
                    check_choice(name, choice)

    def to_values(self) -> dict[str, list[Any] | None]:
        """Return the choices as JSON values."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: None if choices is None else list(choices) for name, choices in own.items()}

    @staticmethod
    def from_values(values: Mapping[str, list[Any] | None]) -> SearchSpace:
        """Read what `to_values` returned."""
        given = {name: None if choices is None else tuple(choices) for name, choices in values.items()}
        return SearchSpace(**cast(Any, given))


def _check(name: str, choices: Any) -> None:
    if not isinstance(choices, tuple):
        raise UsageError(f"The choices for {name} are {type(choices).__name__}, not a tuple.", hint=f"{name}=(a, b)")
    if not choices:
        raise UsageError(
            f"The search space is empty: there is no choice for {name}.",
            hint=f"Give {name} one value to fix it, or leave it out for the default.",
        )
    if len(set(map(repr, choices))) < len(choices):
        raise UsageError(f"{name} has the same choice twice: {choices}.")


def choices_for(
    space: SearchSpace, facts: Mapping[str, Any], target_batch: int, *, on_cuda: bool, virtual: bool
) -> tuple[Choices, list[str]]:
    """Return a workload's choices on a device, and those left out.

    Args:
        space: The requested choices.
        facts: Facts about the workload (tasks.facts_of).
        target_batch: Samples in an optimizer step.
        on_cuda: Whether it is for a CUDA device.
        virtual: Whether that is a virtual GPU, which computes nothing.

    Returns:
        Choices by name, those with the largest effect first; and a line for each one left out.
    """
    plain, left_out = facts["plain"], []

    def narrowed(name: str, possible: bool, why: str, only: Any) -> tuple[Any, ...]:
        asked = getattr(space, name)
        if possible or asked == (only,):
            return tuple(asked)
        left_out.append(f"{name}: {why}")
        return (only,)

    found: Choices = {"precision": space.precision or (("fp32", "bf16", "fp16") if on_cuda else ("fp32", "bf16"))}
    found["micro_batch"] = space.micro_batch or micro_batches(target_batch, facts["least"])
    why = "no repeated blocks were found (a ModuleList or Sequential of children of one class)"
    if facts["blocks"] is not None and facts["merges"]:
        why = "batchnorm='merged' would count the statistics of a checkpointed block twice"
    allowed = facts["blocks"] is not None and not facts["merges"]
    found["checkpointing"] = narrowed("checkpointing", allowed, why, 0)
    named = tuple(each for each in space.optimizer if each in facts["implementations"])
    if named != space.optimizer:
        missing = ", ".join(each for each in space.optimizer if each not in named)
        left_out.append(f"optimizer: {facts['optimizer']} has no {missing}")
    found["optimizer"] = named or (plain["optimizer"],)
    found["channels_last"] = narrowed("channels_last", facts["images"], "no weights of four dimensions", False)
    if on_cuda:
        found["expandable_segments"] = tuple(space.expandable_segments)
    elif space.expandable_segments == (True,):
        left_out.append("expandable_segments: available on CUDA only")
    found["compile"] = narrowed("compile", not virtual, "nothing can be compiled for a virtual GPU", False)
    if space.loader_workers is not None:
        found["loader_workers"] = narrowed("loader_workers", facts["loader"], "the workload has no DataLoader", None)
    return found, left_out


def micro_batches(target_batch: int, min_size: int) -> tuple[int | str, ...]:
    """Return "largest", and powers of two below the target."""
    powers = [2**power for power in range(20) if max(MIN_POWER_OF_TWO, min_size) <= 2**power < target_batch]
    return (LARGEST, *powers[:MAX_POWERS])


def size_of(choices: Choices) -> int:
    """Return the number of configurations."""
    return math.prod(len(each) for each in choices.values())


def combinations(choices: Choices) -> Iterator[Values]:
    """Yield all configurations in order."""
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def plain_values(choices: Choices, plain: Mapping[str, Any]) -> Values:
    """Return the untuned configuration, as far as the choices contain it."""
    wanted = Configuration.from_values({name: value for name, value in plain.items() if name in NAMES}).values()
    return {
        name: wanted[name] if name in wanted and wanted[name] in options else options[0]
        for name, options in choices.items()
    }


def neighbours(values: Values, choices: Choices) -> Iterator[Values]:
    """Yield the configurations that differ in one choice."""
    for name, options in choices.items():
        for option in options:
            if option != values[name] or type(option) is not type(values[name]):
                yield {**values, name: option}


def read_space(texts: list[str]) -> SearchSpace:
    """Parse texts like "precision=fp32,bf16" into a search space.

    Raises:
        UsageError: A name or a value is not known.
    """
    asked: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if name not in NAMES or not equals or name in asked:
            fault = "is given twice" if name in asked else "names nothing that can be varied"
            raise UsageError(f"--vary {text!r} {fault}.", hint=f"--vary NAME=A,B with one of: {', '.join(NAMES)}.")
        asked[name] = tuple(_value(name, value.strip()) for value in values.split(",") if value.strip())
    return SearchSpace(**cast(Any, asked))


def _value(name: str, text: str) -> Any:
    if name in ("channels_last", "expandable_segments", "compile"):
        return {"yes": True, "true": True, "no": False, "false": False}.get(text.lower(), text)
    return int(text) if text.isdecimal() else text
