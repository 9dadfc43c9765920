"""Record one configuration, or plan the winner, in a child process."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from ..configuration import Configuration
from ..errors import AutoaccumError, DoesNotFit, UsageError
from ..plan import Plan
from ..processes.child import Say
from .request import refuse_groups


def record(
    *,
    say: Say,
    workload: str | None,
    values: Mapping[str, Any] | None,
    sizes: list[int],
    **asked: Any,
) -> dict[str, Any]:
    """Record a configuration: peaks for every micro-batch, or why it doesn't work.

    Args:
        say: Called with progress.
        workload: The workload's source; None for the function that this process was given.
        values: The configuration; None leaves the workload as it is.
        sizes: Micro-batches whose peaks are needed.
        **asked: From `TuningRequest.planning_values`.

    Returns:
        See `fit_check.recorded_plan`; and the `facts` of the workload, if `values` is None.
    """
    from .fit_check import recorded_plan

    facts: dict[str, Any] = {}
    try:
        plan = _plan(say, workload, values, sizes=tuple(sizes), verify=False, facts=facts, **asked)
        recorded = recorded_plan(plan)
        wrong = _checkpointing_differs(workload, values, asked)
        return {**recorded, **({"why": wrong} if wrong else {}), "facts": facts}
    except DoesNotFit as error:
        return {"why": error.what, "missing_bytes": error.missing_bytes, "facts": facts}
    except AutoaccumError as error:
        if values is None:
            raise
        return {"why": f"it doesn't work: {error.what}", "facts": facts}
    except Exception as error:  # a kernel or the user's model may fail in that precision, layout or compiler
        if values is None:
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        return {"why": f"it doesn't work: {type(error).__name__}: {first}", "facts": facts}


def plan(*, say: Say, workload: str | None, values: Mapping[str, Any], **asked: Any) -> dict[str, Any]:
    """Plan the winner: record it anew, solve, verify, and test its gradient."""
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
    from ..planning.fit import plan_workload
    from ..planning.request import PlanRequest
    from ..processes.workload_source import load_workload
    from ..workload import Workload

    stack = ExitStack()  # never closed: the process ends configured

    def change(workload: Workload) -> Workload:
        changed: Workload = _changed(stack, workload, values, facts)
        return changed

    def progress(text: str) -> None:
        say({"say": text})

    request = PlanRequest(
        target_batch=target_batch, budget=memory, headroom=headroom, max_micro_batch=max_micro_batch, verify=verify,
        check=verify, malloc=malloc, timing_seconds=0.0, train_in_new_process=True, sizes=sizes,
    )  # fmt: skip
    if device == "cuda":
        from ..devices.cuda.gpu_specs import find_gpu
        from ..planning.new_process import plan_on_gpu

        stand_in = find_gpu(gpu) if gpu is not None else None
        return plan_on_gpu(source, request, gpu=stand_in, progress=progress, change=change)
    return plan_workload(change(load_workload(source)), request, progress=progress)


def _changed(stack: ExitStack, workload: Any, values: Mapping[str, Any] | None, facts: dict[str, Any]) -> Any:
    from ..data.sample import with_sample
    from .apply import configured

    refuse_groups(workload.samples_per_group, "tune")
    workload, _ = with_sample(workload)
    if values is None:
        facts |= facts_of(workload)
        return workload
    return stack.enter_context(configured(workload, Configuration.from_values(values)))


def _checkpointing_differs(
    source: str | None, values: Mapping[str, Any] | None, asked: Mapping[str, Any]
) -> str | None:
    """Return why checkpointing changes the training; None if not tested."""
    if values is None or not values.get("checkpointing") or asked["gpu"] is not None:
        return None
    from ..processes.workload_source import load_workload
    from .checkpointing import gradient_differs

    found = _changed(ExitStack(), load_workload(source, asked["device"]), {**values, "checkpointing": 0}, {})
    if asked["device"] == "cuda":
        found.model.to("cuda")
    differs = gradient_differs(found, values["checkpointing"])
    return f"checkpointing would change what is trained: {differs}" if differs is not None else None


def facts_of(workload: Any) -> dict[str, Any]:
    """Return the facts that the available choices depend on, as JSON values."""
    import torch

    from ..window import norms
    from ..window.blocks import find_blocks
    from ..window.context import open_context
    from ..window.fingerprint import fingerprint
    from .apply import implementations, plain

    context = open_context(replace(workload, scheduler=None))
    if context.runs_in_lanes:
        raise UsageError(
            "batchnorm='exact' isn't tuned: the memory of windows in lanes is measured, and tune predicts it.",
            hint="Plan it (autoaccum plan), or tune with batchnorm='frozen'.",
        )
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
