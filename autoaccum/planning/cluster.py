"""Describe the GPUs of a cluster to plan for. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError
from ..units import check_count

FSDP, DDP = WAYS = ("fsdp", "ddp")
MAX_RANKS = 65_536


@dataclass(frozen=True)
class Cluster:
    """Equal GPUs that train together, one rank each.

    Attributes:
        ranks: Number of GPUs.
        parallel: "fsdp" to shard parameters, gradients and optimizer state over the ranks by FSDP2; "ddp" for a whole
            model on each; None where the workload's function spreads the model itself.
    """

    ranks: int
    parallel: str | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UsageError: One is invalid.
        """
        check_count("--gpus", self.ranks, most=MAX_RANKS, example=8)
        if self.parallel not in (None, *WAYS):
            raise UsageError(
                f"--parallel {self.parallel} is not known.",
                "fsdp shards parameters, gradients and optimizer state over the ranks; ddp has all of them on each.",
                f"Give --parallel {' or '.join(WAYS)}.",
            )
