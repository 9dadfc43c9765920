"""Describe the training that `autoaccum fits` asks about. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import UsageError
from ...units import check_count
from ...workload import PRECISIONS

DTYPES = ("fp32", "bf16", "fp16")
CONFIG, TIMM, TORCHVISION = FAMILIES = ("config", "timm", "torchvision")


@dataclass(frozen=True)
class Description:
    """An architecture, and how it is to be trained.

    Attributes:
        family: "config" for a transformers configuration, "timm" or "torchvision".
        name: The configuration file, or the architecture's name there.
        config: The configuration's content; empty for the other families.
        length: Tokens of a sample; None for images.
        image_size: Pixels of a side; None for the architecture's own.
        lora: The rank of LoRA adapters on all linear layers; None to train all parameters.
        dtype: The parameters' dtype; None for the configuration's, or fp32.
        precision: The autocast; None for none.
        checkpointing: Whether activations are computed again in backward, block by block.
        packed: Whether samples are full, so that no attention mask is needed.
    """

    family: str
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    length: int | None = None
    image_size: int | None = None
    lora: int | None = None
    dtype: str | None = None
    precision: str | None = None
    checkpointing: bool = False
    packed: bool = False

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: One is invalid, or does not apply to the family.
        """
        for option, value in (("--length", self.length), ("--image-size", self.image_size), ("--lora", self.lora)):
            check_count(option, value)
        for option, chosen, known in (("--dtype", self.dtype, DTYPES), ("--precision", self.precision, PRECISIONS)):
            if chosen is not None and chosen not in known:
                raise UsageError(f"{option} {chosen} is not known.", hint=f"Give one of: {', '.join(known)}.")
        if self.family == CONFIG:
            return
        given = {"--length": self.length, "--lora": self.lora, "--packed": self.packed or None}
        wrong = next((option for option, value in given.items() if value is not None), None)
        if wrong is not None:
            raise UsageError(f"{wrong} is for --config; {self.name} takes images.", hint=f"Leave out {wrong}.")
