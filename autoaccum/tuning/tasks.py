"""What tuning asks of child processes: a recording of one configuration, and the winner's plan."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from ..configuration import Configuration
from ..errors import AutoaccumError, DoesNotFit
from ..plan import Plan
from ..processes import function_pipe
from ..processes.child import Say


def record(
    *,
    say: Say,
    workload: str | None,
    values: Mapping[str, Any] | None,
    sizes: list[int],
    **asked: Any,
) -> dict[str, Any]:
    """Records a configuration; what it tells of every micro-batch, or why it can't be had.

    Args:
        say: Called with what is being done.
        workload: Its source; None for the function that this process was handed.
        values: The configuration; None leaves the workload as it is.
        sizes: Micro-batches whose peaks have to be known.
        **asked: Target, memory, headroom, malloc, device and GPU.

    Returns:
        See `memory.recorded_plan`; with `values` None also the `facts` of the workload.
    """
    from .memory import recorded_plan

    facts: dict[str, Any] = {}
    try:
        plan = _plan(say, workload, values, sizes=tuple(sizes), verify=False, facts=facts, **asked)
        told = recorded_plan(plan)
        wrong = _checkpointing_differs(workload, values, asked)
        return {**told, **({"why": wrong} if wrong else {}), "facts": facts}
    except DoesNotFit as error:
        return {"why": error.what, "missing_bytes": error.missing_bytes, "facts": facts}
    except AutoaccumError as error:
        if values is None:
            raise
        return {"why": f"it can't be had: {error.what}", "facts": facts}
    except Exception as error:  # whatever a kernel or the user's model says to that precision, layout or compiler
        if values is None:
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        return {"why": f"it can't be had: {type(error).__name__}: {first}", "facts": facts}


def plan(*, say: Say, workload: str | None, values: Mapping[str, Any], **asked: Any) -> dict[str, Any]:
    """The winner's plan: recorded anew, solved, verified by its window, and its gradient tested."""
    found = _plan(say, workload, values, sizes=(), verify=True, facts={}, **asked)
    return {"plan": found.to_json()}


def _plan(
    say: Say,
    source: str | None,
    values: Mapping[str, Any] | None,
    *,
    sizes: tuple[int, ...],
    verify: bool,
    facts: dict[str, Any],
    target_batch: int,
    memory: str | None,
    headroom: str | None,
    malloc: str,
    device: str,
    gpu: str | None,
    max_micro_batch: int | None = None,
) -> Plan:
    from ..planning.fit import plan_in, setting_for
    from ..planning.request import read_request
    from ..processes.workload_source import load_workload
    from ..workload import Workload

    stack = ExitStack()  # never left: the process ends with what was configured

    def change(workload: Workload) -> Workload:
        changed: Workload = _changed(stack, workload, values, facts)
        return changed

    def progress(text: str) -> None:
        say({"say": text})

    if device == "cuda":
        from ..devices.cuda.gpu_specs import find_gpu
        from ..planning.new_process import plan_on_gpu

        return plan_on_gpu(
            source, gpu=find_gpu(gpu) if gpu is not None else None, target_batch=target_batch, memory=memory,
            headroom=headroom, max_micro_batch=max_micro_batch, verify=verify, progress=progress, change=change,
            sizes=sizes, check=verify, timing_seconds=0.0,
        )  # fmt: skip
    workload = change(load_workload(source))
    request = read_request(workload, target_batch, memory, headroom, max_micro_batch, None, 0, 1)
    request = replace(request, histories=("new_process",), sizes=sizes, timing_seconds=0.0)  # tuning times on its own
    setting = replace(setting_for(next(workload.model.parameters()).device), progress=progress)
    return plan_in(setting, workload, request, verify=verify, check=verify, malloc=malloc)


def _changed(stack: ExitStack, workload: Any, values: Mapping[str, Any] | None, facts: dict[str, Any]) -> Any:
    from ..data.infer_sample import infer_sample
    from .apply import configured

    if workload.sample is None:
        workload = replace(workload, sample=infer_sample(workload.model)[0])
    if values is None:
        facts |= facts_of(workload)
        return workload
    return stack.enter_context(configured(workload, Configuration.from_values(values), function_pipe.functions().extra))


def _checkpointing_differs(
    source: str | None, values: Mapping[str, Any] | None, asked: Mapping[str, Any]
) -> str | None:
    """Why checkpointing isn't to be had for this model; tested where there is something to compute with."""
    if values is None or not values.get("checkpointing") or asked["gpu"] is not None:
        return None
    from ..processes.workload_source import load_workload
    from .blocks import gradient_differs

    found = _changed(ExitStack(), load_workload(source, asked["device"]), {**values, "checkpointing": 0}, {})
    if asked["device"] == "cuda":
        found.model.to("cuda")
    differs = gradient_differs(found, values["checkpointing"])
    return f"checkpointing would change what is trained: {differs}" if differs is not None else None


def facts_of(workload: Any) -> dict[str, Any]:
    """What the choices depend on."""
    import torch

    from ..window import norms
    from ..window.context import open_context
    from ..window.fingerprint import fingerprint
    from .apply import implementations, plain
    from .blocks import find_blocks

    context = open_context(replace(workload, scheduler=None))
    blocks = find_blocks(workload.model)
    merges = blocks is not None and workload.batchnorm == norms.MERGED and bool(context.norms)
    return {
        "plain": plain(workload).values(),
        "optimizer": type(context.optimizer).__name__,
        "implementations": implementations(context.optimizer),
        "blocks": None if blocks is None else f"{len(blocks.modules)} {blocks.kind} in {blocks.path or 'the model'}",
        "merges": merges,
        "images": any(tensor.dim() == 4 for tensor in workload.model.parameters()),
        "loader": callable(workload.loader) or isinstance(workload.loader, torch.utils.data.DataLoader),
        "least": norms.least_micro_batch(context.norms, workload.batchnorm),
        "fingerprint": {k: v for k, v in fingerprint(context).items() if k in ("model", "loss", "optimizer")},
    }
