"""Hold a configuration: the choices beside the split. Imports no torch."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import UsageError
from .units import MAX_SAMPLES
from .workload import PRECISIONS

AS_IT_IS = "as it is"
LARGEST = "largest"  # the largest micro-batch that fits: the fewest accumulation steps
IMPLEMENTATIONS = ("loop", "foreach", "fused")
NO_MEMORY = ("micro_batch", "loader_workers")  # choices that share another's recording


@dataclass(frozen=True)
class Configuration:
    """Hold the choices of how an effective batch is trained.

    Attributes:
        precision: "fp32", "bf16" or "fp16" autocast; "as it is" leaves the workload's.
        checkpointing: 0: none; n: the activations of every n-th block are dropped and computed again in backward.
        channels_last: Whether weights of convolutions, and so images, are laid out with their channels last.
        optimizer: How the optimizer's step is implemented: "loop", "foreach" or "fused"; "as it is" leaves it.
        expandable_segments: The CUDA caching allocator's setting.
        compile: Whether the model is compiled (`torch.compile`).
        loader_workers: Processes that load data; None leaves the workload's.
        micro_batch: The largest micro-batch, or "largest": the largest that fits.
    """

    precision: str = AS_IT_IS
    checkpointing: int = 0
    channels_last: bool = False
    optimizer: str = AS_IT_IS
    expandable_segments: bool = False
    compile: bool = False
    loader_workers: int | None = None
    micro_batch: int | str = LARGEST

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Configuration:
        """Read a flat mapping of choices.

        Raises:
            UsageError: A name or a value is invalid.
        """
        unknown = [name for name in values if name not in NAMES]
        if unknown:
            raise UsageError(
                f"A configuration has no choice named {unknown[0]!r}.", hint=f"Its choices are {', '.join(NAMES)}."
            )
        for name, value in values.items():
            check_choice(name, value)
        return cls(**values)

    def values(self) -> dict[str, Any]:
        """Return the choices as a flat mapping, for JSON and `from_values`."""
        return asdict(self)

    def of_memory(self) -> dict[str, Any]:
        """Return the choices that change a micro-batch's memory."""
        return {name: value for name, value in self.values().items() if name not in NO_MEMORY}

    def words(self) -> dict[str, str]:
        """Describe each choice that isn't the default, by name, without the micro-batch."""
        texts = {
            "precision": "" if self.precision == AS_IT_IS else self.precision,
            "checkpointing": checkpointing_words(self.checkpointing) if self.checkpointing else "",
            "channels_last": "channels last" if self.channels_last else "",
            "optimizer": "" if self.optimizer == AS_IT_IS else f"{self.optimizer} optimizer",
            "expandable_segments": "expandable segments" if self.expandable_segments else "",
            "compile": "compiled" if self.compile else "",
            "loader_workers": "" if self.loader_workers is None else f"{self.loader_workers} loader workers",
        }
        return {name: text for name, text in texts.items() if text}

    def sentence(self) -> str:
        """Describe the choices in one line."""
        return ", ".join(self.words().values()) or "as the workload is"

    def numerics(self, plain: Configuration) -> dict[str, str]:
        """Return the choices that change numbers against the plain ones, explained."""
        changed = {
            "precision": f"autocast in {self.precision}: other numbers, not only another rounding",
            "optimizer": f"the {self.optimizer} optimizer: the same formula, its operations rounded in another order",
            "channels_last": "channels last: other kernels, so sums are rounded in another order",
            "compile": "compiled: fused kernels, so results are rounded in another order",
        }
        mine, others = self.values(), plain.values()
        return {name: text for name, text in changed.items() if mine.get(name) != others.get(name)}


NAMES = tuple(each.name for each in fields(Configuration))


def checkpointing_words(every: int) -> str:
    """Describe a checkpointing choice."""
    if every == 0:
        return "no checkpointing"
    return "checkpointing every block" if every == 1 else f"checkpointing every {ordinal(every)} block"


def sentence(values: Mapping[str, Any]) -> str:
    """Describe a configuration in one line, without its micro-batch.

    Unknown names are shown unchanged: the text of a plan from another version must not fail.
    """
    words = Configuration.from_values({name: value for name, value in values.items() if name in NAMES}).words()
    words.setdefault("checkpointing", checkpointing_words(0))
    words |= {name: f"{name} {value}" for name, value in values.items() if name not in NAMES}
    return ", ".join(words.values())


def ordinal(n: int) -> str:
    """Return an ordinal, such as 2nd."""
    return f"{n}{'th' if 10 < n % 100 < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"


def check_choice(name: str, value: Any) -> None:
    """Refuse an invalid choice.

    Raises:
        UsageError: The value is not allowed; its hint lists those that are.
    """
    number = isinstance(value, int) and not isinstance(value, bool)
    allowed: dict[str, tuple[bool, str]] = {
        "precision": (value in (*PRECISIONS, AS_IT_IS), ", ".join(PRECISIONS)),
        "checkpointing": (number and value >= 0, "0 for none, 1 for every block, n for every n-th"),
        "optimizer": (value in (*IMPLEMENTATIONS, AS_IT_IS), ", ".join(IMPLEMENTATIONS)),
        "micro_batch": (
            value == LARGEST or (number and 1 <= value <= MAX_SAMPLES),
            f"a number of samples, or {LARGEST!r}",
        ),
        "loader_workers": (value is None or (number and value >= 0), "a number of processes"),
        **{
            flag: (isinstance(value, bool), "yes or no") for flag in ("channels_last", "expandable_segments", "compile")
        },
    }
    holds, could = allowed[name]
    if not holds:
        raise UsageError(f"{name} cannot be {value!r}.", hint=f"Use one of: {could}.")


def allocator_settings(present: Mapping[str, str]) -> dict[str, str]:
    """Return the allocator's variable with expandable segments added.

    PYTORCH_CUDA_ALLOC_CONF counts in every version of torch, and before PYTORCH_ALLOC_CONF, which torch 2.9 and older
    ignore on CUDA (pytorch issue 183387; 2.10 was not tried).
    """
    version = tuple(int(number) for number in importlib.metadata.version("torch").split(".")[:2])
    old, new = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
    text = present.get(old) or (present.get(new) if version >= (2, 10) else "") or ""
    name = new if present.get(new) and not present.get(old) and version >= (2, 11) else old
    others = [part for part in text.split(",") if part and not part.startswith("expandable_segments:")]
    return {name: ",".join([*others, "expandable_segments:True"])}
