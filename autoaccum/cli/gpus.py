"""Read the options that name GPUs which are not here. No torch."""

from __future__ import annotations

import typer

from ..errors import UsageError
from ..planning.cluster import DDP, WAYS, Cluster
from ..planning.unequal import GpuKind
from .completion import choices

GPUS = typer.Option(None, help="So many of these GPUs train together, one rank each.")
PARALLEL = typer.Option(
    None,
    help="How a bare model is spread over them: fsdp (FSDP2's fully_shard) or ddp.",
    autocompletion=choices(*WAYS),
)


def read_gpus(named: list[str] | None, gpus: int | None, parallel: str | None) -> tuple[list[GpuKind], Cluster | None]:
    """Return the kinds of GPUs, and their cluster.

    Args:
        named: Each `--gpu`: NAME or NAME:COUNT.
        gpus: `--gpus`.
        parallel: `--parallel`.

    Returns:
        The kinds, none without `--gpu`; and the cluster of all of them, None for one process.

    Raises:
        UsageError: They don't go together.
    """
    kinds = [_kind(each) for each in named or []]
    if not kinds:
        if gpus is not None or parallel is not None:
            option = "--gpus" if gpus is not None else "--parallel"
            raise UsageError(
                f"{option} was given without --gpu.",
                "It is about GPUs that are not here; on those that are, torchrun starts the ranks.",
                "Name the GPU: --gpu h100-80gb --gpus 8 --parallel fsdp.",
            )
        return [], None
    total = sum(kind.count for kind in kinds)
    if gpus is not None and (len(kinds) > 1 or kinds[0].count not in (1, gpus)):
        raise UsageError(
            f"--gpus is {gpus}, and --gpu names {total}.", hint="Give the numbers once: --gpu h100-80gb --gpus 8."
        )
    total = gpus if gpus is not None else total
    if len({kind.name for kind in kinds}) > 1 and parallel != DDP:
        raise UsageError(
            f"{' and '.join(kind.name for kind in kinds)} are different GPUs, and --parallel is {parallel}.",
            "Shares of different sizes need a whole model on each GPU; FSDP2's ranks work in step, so the smallest GPU "
            "decides for all.",
            f"Add --parallel ddp; or plan the smallest for all: --gpu {kinds[-1].name} --gpus {total}.",
        )
    if total == 1 and parallel is None and gpus is None:
        return [GpuKind(kinds[0].name, 1)], None
    cluster = Cluster(total, parallel)
    return (kinds if len(kinds) > 1 else [GpuKind(kinds[0].name, total)]), cluster


def _kind(text: str) -> GpuKind:
    """Read NAME or NAME:COUNT."""
    name, colon, count = text.partition(":")
    if colon and not (count.isdigit() and 0 < len(count) < 8 and int(count)):
        raise UsageError(
            f"--gpu {text!r} has no number behind its colon.", hint="Write it like h100-80gb:6, or the name alone."
        )
    return GpuKind(name, int(count) if colon else 1)
