"""What is searched: choices for each part of a configuration, narrowed to what a workload and its device allow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast

from ..configuration import IMPLEMENTATIONS, LARGEST, NAMES, Configuration, check_choice
from ..errors import UsageError

LEAST_POWER, MOST_POWERS = 4, 6  # powers of two that are tried as micro-batches, beside the largest that fits
PLAIN_TYPES = (str, int, float, bool)

Choices = dict[str, tuple[Any, ...]]  # by name, in the order in which they are tried
Values = dict[str, Any]


@dataclass(frozen=True)
class SearchSpace:
    """The choices to search. Each field is a tuple of what may be chosen; one value alone fixes it.

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
        extra: Choices of your own: a name, what may be chosen (strings, numbers or booleans, the plain one first), and
            `apply(workload, choice)`, which returns the workload to train. Functions have to pickle: they are called
            in other processes.
    """

    precision: tuple[str, ...] | None = None
    checkpointing: tuple[int, ...] = (0, 1, 2)
    channels_last: tuple[bool, ...] = (False, True)
    optimizer: tuple[str, ...] = IMPLEMENTATIONS
    micro_batch: tuple[int | str, ...] | None = None
    expandable_segments: tuple[bool, ...] = (False, True)
    compile: tuple[bool, ...] = (False,)
    loader_workers: tuple[int, ...] | None = None
    extra: Mapping[str, tuple[tuple[Any, ...], Callable[[Any, Any], Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in NAMES:
            choices = getattr(self, name)
            if choices is not None:
                _check(name, choices)
                for choice in choices:
                    check_choice(name, choice)
        for name, pair in self.extra.items():
            if name in NAMES or not name.isidentifier():
                raise UsageError(
                    f"{name!r} can't name a choice of your own.", hint=f"It is none of {', '.join(NAMES)}."
                )
            if not (isinstance(pair, tuple) and len(pair) == 2 and callable(pair[1])):
                raise UsageError(f"extra[{name!r}] isn't (choices, function).", hint="Give ((1, 2), apply).")
            _check(name, pair[0])
            if not all(isinstance(choice, PLAIN_TYPES) for choice in pair[0]):
                raise UsageError(f"extra[{name!r}] has choices that aren't strings, numbers or booleans.")

    def to_values(self) -> dict[str, list[Any] | None]:
        """Its own choices as JSON; `extra` is left out."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "extra"}
        return {name: None if choices is None else list(choices) for name, choices in own.items()}


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
    """The choices that this workload has on this device.

    Args:
        space: What was asked for.
        facts: What a recording told of the workload (cli/tasks.py).
        target_batch: Samples in an optimizer step.
        on_cuda: Whether it is for a CUDA device.
        virtual: Whether that is a virtual GPU, on which nothing is computed.

    Returns:
        Choices by name, those that change most first; and what was left out, in words.
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
        left_out.append("expandable_segments: only CUDA's allocator has them")
    found["compile"] = narrowed("compile", not virtual, "nothing can be compiled for a virtual GPU", False)
    if space.loader_workers is not None:
        found["loader_workers"] = narrowed("loader_workers", facts["loader"], "the workload has no DataLoader", None)
    return {**found, **{name: pair[0] for name, pair in space.extra.items()}}, left_out


def micro_batches(target_batch: int, least: int) -> tuple[int | str, ...]:
    """The largest that fits, and powers of two below the target."""
    powers = [2**power for power in range(20) if max(LEAST_POWER, least) <= 2**power < target_batch]
    return (LARGEST, *powers[:MOST_POWERS])


def size_of(choices: Choices) -> int:
    """How many configurations there are."""
    return math.prod(len(each) for each in choices.values())


def combinations(choices: Choices) -> Iterator[Values]:
    """All of them, in order."""
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def plain_values(choices: Choices, plain: Mapping[str, Any]) -> Values:
    """What an untuned plan would be, as far as the choices have it."""
    wanted = Configuration.from_values({name: value for name, value in plain.items() if name in NAMES}).values()
    return {
        name: wanted[name] if name in wanted and wanted[name] in options else options[0]
        for name, options in choices.items()
    }


def neighbours(values: Values, choices: Choices) -> Iterator[Values]:
    """Those that differ in one choice."""
    for name, options in choices.items():
        for option in options:
            if option != values[name] or type(option) is not type(values[name]):
                yield {**values, name: option}


def read_space(texts: list[str]) -> SearchSpace:
    """A search space out of texts like "precision=fp32,bf16".

    Raises:
        UsageError: A name or a value that can't be.
    """
    asked: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if name not in NAMES or not equals or name in asked:
            said = "is given twice" if name in asked else "names nothing that can be varied"
            raise UsageError(f"--vary {text!r} {said}.", hint=f"--vary NAME=A,B with one of: {', '.join(NAMES)}.")
        asked[name] = tuple(_value(name, value.strip()) for value in values.split(",") if value.strip())
    return SearchSpace(**cast(Any, asked))


def _value(name: str, text: str) -> Any:
    if name in ("channels_last", "expandable_segments", "compile"):
        return {"yes": True, "true": True, "no": False, "false": False}.get(text.lower(), text)
    return int(text) if text.isdecimal() else text
