"""Implement `autoaccum fits`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import DoesNotFit, UsageError
from ..planning.request import PlanRequest
from ..units import check_memory, parse_target, show_bytes
from .completion import choices
from .completion import gpus as complete_gpus
from .gpus import GPUS, PARALLEL, read_gpus

if TYPE_CHECKING:
    from ..planning.cluster import Cluster
    from .architectures.description import Description

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def fits(
    gpu: str = typer.Option(
        ..., help="The GPU, like rtx-4090 (doctor --gpus lists them).", autocompletion=complete_gpus
    ),
    target_batch: str = typer.Option(..., help="Samples in an optimizer step, or 4M-tokens."),
    gpus: int = GPUS,
    parallel: str = PARALLEL,
    config: Path = typer.Option(None, help="A transformers model's config.json, or its folder."),
    timm: str = typer.Option(None, help="Or the name of timm's model, like vit_base_patch16_224."),
    torchvision: str = typer.Option(None, help="Or the name of torchvision's classifier, like resnet50."),
    length: int = typer.Option(None, help="Tokens of the longest sample."),
    image_size: int = typer.Option(None, help="Pixels of an image's side. Left out: the model's own."),
    lora: int = typer.Option(None, help="Train LoRA adapters of this rank on all linear layers."),
    dtype: str = typer.Option(
        None,
        help="Of the parameters: fp32, bf16 or fp16. Left out: the configuration's.",
        autocompletion=choices("fp32", "bf16", "fp16"),
    ),
    precision: str = typer.Option(
        None, help="Autocast: bf16 or fp16. Left out: none.", autocompletion=choices("bf16", "fp16")
    ),
    checkpointing: bool = typer.Option(False, "--checkpointing", help="Compute activations again in backward."),
    packed: bool = typer.Option(False, "--packed", help="Samples are full: no attention mask."),
    memory: str = typer.Option(None, help="Memory limit of the process. Left out: all that an idle GPU has."),
    refresh: bool = typer.Option(False, "--refresh", help="Ask anew, even where this was asked before."),
    json: bool = typer.Option(False, "--json", help="Print the answer's JSON alone."),
) -> None:
    """Answer whether a training fits on a GPU that isn't here.

    Builds the model without weights, plans it on a virtual GPU, and answers in one line: exit code 0 where it fits, 3
    where it doesn't.
    """
    samples, tokens = parse_target(target_batch, "--target-batch")
    (kind,), cluster = read_gpus([gpu], gpus, parallel)
    check_memory(memory, None)
    description = _description(
        {"config": config, "timm": timm, "torchvision": torchvision}, length=length, image_size=image_size, lora=lora,
        dtype=dtype, precision=precision, checkpointing=checkpointing, packed=packed,
    )  # fmt: skip
    request = PlanRequest(
        target_batch=samples, target_tokens=tokens, budget=memory, check=False, train_in_new_process=True,
        explained=False,
    )  # fmt: skip
    answer = _answer(description, request, kind.name, cluster, refresh=refresh)
    if json:
        from ..files.json_text import to_json

        print(to_json(answer, indent=2))
    else:
        print(_sentence(answer))
        print(f"assumed: {'; '.join(answer['assumed'])}", file=sys.stderr)
    if not answer["fits"]:
        raise typer.Exit(DoesNotFit.exit_code)


def _description(named: dict[str, Any], **options: Any) -> Description:
    """Return what is asked about.

    Raises:
        UsageError: None or several architectures are named, or the configuration can't be used.
    """
    from .architectures.config_file import read_config
    from .architectures.description import CONFIG, Description

    given = {family: value for family, value in named.items() if value is not None}
    if len(given) != 1:
        raise UsageError(
            f"{' and '.join(f'--{each}' for each in given)} were named." if given else "No architecture was named.",
            hint="Give one of --config FILE, --timm NAME, --torchvision NAME.",
        )
    family, value = next(iter(given.items()))
    content = read_config(value) if family == CONFIG else {}
    return Description(family=family, name=str(value), config=content, **options)


def _answer(
    description: Description, request: PlanRequest, gpu: str, cluster: Cluster | None, *, refresh: bool
) -> dict[str, Any]:
    """Return the answer kept for the question, or a new one.

    No code of the user's is in it, so its words, the installed packages and the files that were read for the kept
    answer are all that it depends on: nothing is imported to look.
    """
    from ..devices.cuda.gpu_specs import find_gpu
    from ..planning.cache import OFF, USE, key_of, look_up, mode_of, surroundings

    mode = mode_of(refresh=refresh)
    question = {
        "fits": asdict(description),
        "request": asdict(request),
        "gpu": asdict(find_gpu(gpu)),
        "cluster": None if cluster is None else asdict(cluster),
        **surroundings(),
    }
    key = "" if mode == OFF else key_of(question)
    entry = look_up(key) if mode == USE else None
    if entry is None:
        return _ask(description, request, gpu, cluster, key)
    print(f"answered {entry.origin}", file=sys.stderr)
    return entry.answer


def _ask(description: Description, request: PlanRequest, gpu: str, cluster: Cluster | None, key: str) -> dict[str, Any]:
    """Plan in a child process, which keeps the answer."""
    from ..devices.virtual import planning_environment
    from ..processes.child import call
    from .terminal import progress

    environment = {**(planning_environment(gpu) or {}), **OFFLINE}
    arguments = {
        "description": asdict(description),
        "request": asdict(request),
        "gpu": gpu,
        "cluster": None if cluster is None else asdict(cluster),
        "key": key,
    }
    with progress("planning") as say:
        return call("cli.tasks:fits", arguments, on_message=say, env=environment)


def _sentence(answer: dict[str, Any]) -> str:
    """Return the answer in one line."""
    of = f"{answer['architecture']}, {_count(answer['parameters'])} parameters" + (
        f", {_count(answer['trained_parameters'])} trained" if answer["lora"] else ""
    )
    on = answer["gpu"] if answer["ranks"] == 1 else f"{answer['ranks']} x {answer['gpu']}"
    if not answer["fits"]:
        return f"no: {of} on {on}, {answer['sample']}: {answer['why']}"
    steps = answer["accumulation_steps"]
    each = f" on each of {answer['ranks']} ranks" if answer["ranks"] > 1 else ""
    return (
        f"yes: {of} on {on}: {answer['target_batch']} = {steps} micro-batch{'es' * (steps > 1)}{each} of at most "
        f"{answer['micro_batch']} ({answer['sample']}); peak {show_bytes(answer['predicted_peak_bytes'])} of "
        f"{show_bytes(answer['budget_bytes'])}, real allocator on a virtual GPU"
    )


def _count(parameters: int) -> str:
    """Return a number of parameters, such as 8.03 B."""
    return f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"
