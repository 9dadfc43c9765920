"""Write a plan's numbers in the words of other tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...configuration import sentence
from ...plan import Plan
from .equal_steps import EqualSteps, equal_steps

Values = dict[str, Any]


@dataclass(frozen=True)
class Export:
    """A plan for another tool.

    Attributes:
        text: What the tool reads, ending in a line break.
        remarks: What the reader has to know besides.
    """

    text: str
    remarks: tuple[str, ...] = ()


def export(plan: Plan, target: str) -> Export:
    """Write a plan for one of `TARGETS`.

    Raises:
        UsageError: The tool knows one size only, and no equal sizes total the target.
    """
    if target in ("env", "json"):
        return _own(plan, target)
    equal = equal_steps(plan)
    return Export(_WRITERS[target](plan, equal), (*equal.remarks, *_remarks(plan, target)))


def _hugging_face(plan: Plan, equal: EqualSteps) -> str:
    return _json(
        {
            "per_device_train_batch_size": equal.micro_batch,
            "gradient_accumulation_steps": equal.accumulation_steps,
            **_autocast(plan, {"bf16": {"bf16": True}, "fp16": {"fp16": True}}),
        }
    )


def _accelerate(plan: Plan, equal: EqualSteps) -> str:
    precision = _autocast(plan, {each: {"mixed_precision": each} for each in ("bf16", "fp16")})
    return _json(
        {
            "Accelerator": {"gradient_accumulation_steps": equal.accumulation_steps, **precision},
            "DataLoader": {"batch_size": equal.micro_batch},
        }
    )


def _lightning(plan: Plan, equal: EqualSteps) -> str:
    precision = _autocast(plan, {each: {"precision": f"{each.replace('fp', '')}-mixed"} for each in ("bf16", "fp16")})
    ranks = {"devices": equal.world_size} if equal.world_size > 1 else {}
    return _json(
        {
            "Trainer": {"accumulate_grad_batches": equal.accumulation_steps, **ranks, **precision},
            "DataLoader": {"batch_size": equal.micro_batch},
        }
    )


def deepspeed_values(equal: EqualSteps) -> dict[str, int]:
    """Return DeepSpeed's three numbers, which multiply with the ranks."""
    return {
        "train_batch_size": equal.target_batch,
        "train_micro_batch_size_per_gpu": equal.micro_batch,
        "gradient_accumulation_steps": equal.accumulation_steps,
    }


def _deepspeed(plan: Plan, equal: EqualSteps) -> str:
    return _json(deepspeed_values(equal))


def _torchtitan(plan: Plan, equal: EqualSteps) -> str:
    return f"--training.local_batch_size {equal.micro_batch} --training.global_batch_size {equal.target_batch}\n"


_WRITERS: dict[str, Callable[[Plan, EqualSteps], str]] = {
    "hf": _hugging_face,
    "accelerate": _accelerate,
    "lightning": _lightning,
    "deepspeed": _deepspeed,
    "torchtitan": _torchtitan,
}
TARGETS = (*_WRITERS, "env", "json")


def _own(plan: Plan, target: str) -> Export:
    """Write the plan's own split, which may be uneven."""
    values: Values = {
        "target_batch": plan.target_batch,
        "world_size": plan.world_size,
        "micro_batch": plan.micro_batch,
        "accumulation_steps": plan.accumulation_steps,
        "split": list(plan.split),
        "uniform": min(plan.split) == max(plan.split),
        "autocast": _autocast_dtype(plan),
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "budget_bytes": plan.budget_bytes,
    }
    remarks = () if values["uniform"] else (
        f"The split is uneven: {plan.accumulation_steps} steps of {plan.micro_batch} would be "
        f"{plan.accumulation_steps * plan.micro_batch * plan.world_size} samples, not {plan.target_batch}."
        " Use `split`.",
    )  # fmt: skip
    if target == "json":
        return Export(_json(values), (*remarks, *_remarks(plan, target)))
    return Export("".join(f"AUTOACCUM_{name.upper()}={_shell(value)}\n" for name, value in values.items()), remarks)


def _shell(value: Any) -> str:
    """Return a value as a shell reads it unquoted."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)


def _autocast_dtype(plan: Plan) -> str:
    """Return the autocast that was planned for: "bf16", "fp16" or "none"."""
    planned = plan.provenance.fingerprint.get("precision", "")
    return {"torch.bfloat16": "bf16", "torch.float16": "fp16"}.get(planned, "none")


def _autocast(plan: Plan, options: dict[str, Values]) -> Values:
    """Return a tool's options for the planned autocast."""
    return options.get(_autocast_dtype(plan), {})


def _remarks(plan: Plan, target: str) -> tuple[str, ...]:
    """Return what else the tool has to be set to."""
    found = []
    if plan.schedule.configuration:
        found.append(f"The plan was tuned; set this in your script too: {sentence(plan.schedule.configuration)}.")
    if target in ("deepspeed", "torchtitan"):
        found.append(
            "The plan's memory is that of a process that shards nothing and casts as planned; this tool shards and "
            "casts by its own rules, so that its peak is another one."
        )
    return tuple(found)


def _json(values: Values) -> str:
    return json.dumps(values, indent=2) + "\n"
