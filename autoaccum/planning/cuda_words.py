"""Describe predictions for a CUDA device: a plan's reasons, notes and remedies."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from ..budget import Budget
from ..devices.cuda.allocator_rules import AllocatorRules
from ..phases import PHASE_TITLES
from ..ranks.sharded import sharded_modules
from ..simulation.solver import Split
from ..torch_compat import allocator_settings, local_bytes
from ..units import show_bytes
from .more_ranks import least_ranks

if TYPE_CHECKING:
    from .predictor_cuda import CudaPredictor


RANKS_A_NODE = 8  # GPUs of a node, as they are rented


def reasons(budget: Budget) -> dict[str, str]:
    """Return the reasons for baseline, input, history and budget, in reserved bytes."""
    return {
        "baseline_bytes": "reserved for the model's parameters and buffers before training",
        "input_bytes": "none: samples wait on the host, and those of one micro-batch at a time are in its peak",
        "history_bytes": "fragments of what this process had on the device before",
        "budget_bytes": f"what the allocator may reserve ({budget.binding_constraint}), less the headroom",
    }


def notes(predictor: CudaPredictor, split: Split) -> list[str]:
    """Return notes about retries, the plain loop, cuDNN and the virtual GPU."""
    found = [text for text in (predictor.rules_remark, ignored_settings()) if text]
    history, capacity = predictor.request.histories[0], predictor.budget.bytes
    in_lanes = predictor.subject.context.runs_in_lanes and len(split) > 1  # what was replayed here is without lanes
    retries = () if in_lanes else predictor.replayed(split, history, capacity, kept=predictor.keeps(split)).retries
    if any(retries):
        found.append(
            f"The allocator reaches the budget in the first windows and releases its cache ({sum(retries)} times in "
            "all). This costs milliseconds and does not happen after them. torch may log 'memory allocation failed "
            "with OOM' each time, though the allocation then succeeds."
        )
    if not in_lanes and not predictor.sums_wide(split) and not predictor.fits_in(split, "new_process", kept=True):
        peak = predictor.peak_with(split, "new_process", kept=True)
        found.append(
            f"For the Runner: a loop written by hand would reserve {show_bytes(peak)} with these micro-batches, "
            "which does not fit."
        )
    if torch.backends.cudnn.benchmark:
        found.append(
            "cudnn.benchmark is on: the first run at each size tries algorithms whose workspaces are not in these "
            "figures, which are of later runs. A shorter last window is a new size."
        )
    if not predictor.device.computes:
        found.append(
            "Real allocator on a virtual GPU, not measured on one: kernels compute nothing, so time and exactness "
            "are unknown, and workspaces of cuDNN's convolutions are counted as set there (docs/virtual-gpu.md)."
        )
        found += _recurrent_note(predictor)
    return found


def _recurrent_note(predictor: CudaPredictor) -> list[str]:
    """Note what a real GPU showed of recurrent nets."""
    if not any(isinstance(module, torch.nn.RNNBase) for module in predictor.subject.context.model.modules()):
        return []
    return [
        "Workspaces of recurrent nets are those of cuDNN 6 and 7. With cuDNN 9.19 on an H200, an LSTM's were half as "
        "large again, and its windows reserved 10 % more than is predicted here: plan on the GPU itself, or with a "
        "headroom of 10 %."
    ]


def rules_remark(rules: AllocatorRules) -> str:
    """Describe the allocator's rule if torch's version doesn't give it."""
    if rules.by_version:
        return ""
    return (
        f"torch {torch.__version__} is not a version whose allocator is known. Of free blocks of one size it takes "
        f"that with the {rules.tie_rule}, {rules.reason}."
    )


def ignored_settings() -> str:
    """Name the variable of allocator settings that torch ignores, if any."""
    text, used = os.environ.get("PYTORCH_ALLOC_CONF"), os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    counts = allocator_settings().get("PYTORCH_CUDA_ALLOC_CONF", "")
    if not text or counts == text or (counts and not used):  # or set since, by the program
        return ""
    why = f"PYTORCH_CUDA_ALLOC_CONF={used} is set too, and counts" if used else f"torch {torch.__version__} ignores it"
    return f"PYTORCH_ALLOC_CONF={text} has no effect: {why}. Set PYTORCH_CUDA_ALLOC_CONF instead."


def shortfall(predictor: CudaPredictor, split: Split) -> str:
    """Return what a split needs unlimited, and where the budget fails."""
    kept, histories = predictor.keeps(split), predictor.request.histories
    needed = max(predictor.replayed(split, history, None, kept=kept).peak_reserved_bytes for history in histories)
    text = f"would need {show_bytes(predictor.as_compiled(needed))}"
    for capacity in (predictor.usable_bytes, predictor.budget.bytes):
        for history in histories:
            found = predictor.replayed(split, history, predictor.as_uncompiled(capacity), kept=kept)
            if found.out_of_memory is not None:
                where = PHASE_TITLES.get(found.out_of_memory, found.out_of_memory)
                return f"{text} (within {show_bytes(capacity)} memory runs out: {where})"
            if not found.fits:
                return f"{text} (within {show_bytes(capacity)} every window empties the allocator's cache)"
    return text


def sharding(predictor: CudaPredictor, needed_bytes: int) -> list[str]:
    """Return over how many devices the static memory needs sharding."""
    if sharded_modules(predictor.subject.context.model):
        return _more_ranks(predictor, needed_bytes)
    static = predictor.static_bytes
    for devices in (2, 4, 8, 16, 32, 64):
        if needed_bytes - static + static // devices <= predictor.budget.bytes:
            return [
                f"sharding over {devices} such devices (an estimate: parameters, gradients and optimizer "
                f"state are {show_bytes(static)} of it)"
            ]
    return []


def _more_ranks(predictor: CudaPredictor, needed_bytes: int) -> list[str]:
    """Return from how many ranks on a sharded model would fit.

    Shards shrink with the ranks: parameters, their gradients and the optimizer's state. Gathered blocks and activations
    don't.
    """
    model, ranks = predictor.subject.context.model, predictor.request.world_size
    buffers = sum(local_bytes(buffer) for buffer in model.buffers())
    shards = predictor.static_bytes - buffers
    room = predictor.budget.bytes - (needed_bytes - shards)
    guess = -(-shards * ranks // room) if room > 0 else 2 * ranks
    found, how = least_ranks(predictor, guess), "its smallest window replayed with their shards"
    if found is None:
        found, how = guess if room > 0 else 0, "an estimate"
    if not found:
        return [
            f"a smaller sample or activation checkpointing: what no number of ranks shares, gathered blocks and "
            f"activations, is {show_bytes(needed_bytes - shards)}"
        ]
    nodes = -(-found // RANKS_A_NODE) * RANKS_A_NODE
    whole = f", {nodes} in whole nodes of {RANKS_A_NODE}" if found > RANKS_A_NODE and nodes > found else ""
    return [
        f"{found} such GPUs in place of {ranks}{whole} ({how}: of the shards of parameters, gradients and optimizer "
        f"state, each rank then has {show_bytes(shards * ranks // found)} in place of {show_bytes(shards)})"
    ]
