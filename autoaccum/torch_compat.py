"""Reach the private names of torch that are used.

No other file of the package uses a private name of torch; tests/test_torch_compat.py reads the sources for them, and
calls each function here under 2.6.0, 2.9.1, 2.11.0, 2.12.1, 2.14.1 and 2.15.0, which have all names, unless a docstring
describes what is done instead. Where a torch lacks one, `UnsupportedTorch` names the version and the name.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm as InstanceNorm
from torch.nn.modules.loss import _Loss as Loss
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm as SpectralNorm
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map

from .errors import AutoaccumError

__all__ = [
    "BUFFERS",
    "MODULES",
    "PARAMETERS",
    "BatchNorm",
    "ConvNd",
    "InstanceNorm",
    "Loss",
    "NormBase",
    "SpectralNorm",
    "TorchDispatchMode",
    "is_lazy",
    "is_traceable_wrapper_subclass",
    "tree_leaves",
    "tree_map",
]

# Keys of a module's attributes (torch/nn/modules/module.py), unchanged since torch 1.0.
PARAMETERS, BUFFERS, MODULES = "_parameters", "_buffers", "_modules"

Entry = dict[str, Any]


class UnsupportedTorch(AutoaccumError):
    """The installed torch lacks a name that is needed."""


def _find(owner: Any, path: str, purpose: str) -> Any:
    """Return the object at a dotted path.

    Raises:
        UnsupportedTorch: There is none in this torch.
    """
    found = owner
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            raise UnsupportedTorch(
                f"torch {torch.__version__} has no {owner.__name__}.{path}.",
                f"autoaccum uses it to {purpose}.",
                "Install a torch that autoaccum is tested with: pip install 'torch>=2.6'.",
            )
    return found


# The CUDA caching allocator: torch/cuda/memory.py, torch/csrc/cuda/Module.cpp


def clear_cublas_workspaces() -> None:
    """Give cuBLAS's workspaces back to the caching allocator.

    Nothing before CUDA is used. From 2.15 on there are none, unless TORCH_CUBLAS_WORKSPACE_CACHE=1.
    """
    clear = _find(torch, "_C._cuda_clearCublasWorkspaces", "release cuBLAS's workspaces")
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        clear()


def is_history_on() -> bool:
    """Return whether the allocator records its history."""
    is_enabled = _find(torch, "_C._cuda_isHistoryEnabled", "leave a history that the user records as it is")
    return torch.cuda.is_initialized() and bool(is_enabled())  # type: ignore[no-untyped-call]


def start_history(max_events: int | None = None) -> None:
    """Record the allocator's history from now on.

    Without stack frames.

    Args:
        max_events: Events that are kept, the latest ones; None for torch's own limit.
    """
    record = _find(torch.cuda, "memory._record_memory_history", "record allocations")
    torch.cuda.init()  # type: ignore[no-untyped-call]
    record("all", context=None, **({} if max_events is None else {"max_entries": max_events}))


def stop_history() -> None:
    """Stop recording the allocator's history, and drop it."""
    _find(torch.cuda, "memory._record_memory_history", "record allocations")(None)


def read_history(index: int) -> list[Entry]:
    """Return the events of a device's history, oldest first.

    Args:
        index: The device's number.

    Returns:
        Dicts with the action, address, size in bytes and stream.
    """
    trace: list[Entry] = _find(torch.cuda, "memory._snapshot", "read recorded allocations")()["device_traces"][index]
    return trace


def allocator_settings() -> dict[str, Any]:
    """Return the caching allocator's settings as it parsed them.

    Where a snapshot has no settings, those are returned that the environment
    variables name, as text.
    """
    snapshot = _find(torch.cuda, "memory._snapshot", "read the allocator's settings")()
    found: dict[str, Any] | None = snapshot.get("allocator_settings")
    if found is not None:
        return found
    text = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF") or ""
    return {"PYTORCH_CUDA_ALLOC_CONF": text}


# The profiler: torch/csrc/autograd/init.cpp, torch/profiler


def is_profiler_on() -> bool:
    """Return whether a profiler watches this thread."""
    return bool(_find(torch, "_C._autograd._profiler_enabled", "keep out of the way of the user's profiler")())


def end_inherited_profiler() -> None:
    """End the profiler that a forked copy inherited in this thread.

    Kineto before 2.12 cancels a trace that is running before it starts another, and asks the thread that starts for its
    profiler: "Can't disable Kineto profiler when it's not running". Later ones leave it alone, and so does this.
    `_disable_profiler` is in all versions.
    """
    if is_profiler_on() and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):
        _find(torch, "_C._autograd._disable_profiler", "keep out of the way of the user's profiler")()


def profiler_events(profiler: torch.profiler.profile) -> Iterator[Any]:
    """Yield every event of a finished profile, in any order.

    Yields:
        Nodes of Kineto's event tree: `tag.name`, `name`, `start_time_ns`, `end_time_ns`, `extra_fields`.
    """
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    pending = list(_find(results, "experimental_event_tree", "read the CPU's allocations")())
    while pending:
        node = pending.pop()
        pending.extend(node.children)
        yield node


# Modes: torch/overrides.py, torch/utils/_python_dispatch.py


def active_modes() -> list[str]:
    """Return the modes that see every operation, without the default device's."""
    functions = _find(torch.overrides, "_get_current_function_mode_stack", "see what changes operations")()
    dispatch = torch.utils._python_dispatch
    operations = _find(dispatch, "_get_current_dispatch_mode_stack", "see what changes operations")()
    names = [type(mode).__name__ for mode in (*functions, *operations)]
    return [name for name in names if name != "DeviceContext"]


# Tensors: torch/_tensor.py, torch/storage.py


def storage_id(storage: torch.UntypedStorage) -> int:
    """Return the address of a storage's implementation.

    The same for all objects that stand for it.
    """
    return int(storage._cdata)


def write_count(tensor: torch.Tensor) -> int:
    """Return how often a tensor was written to in place.

    As autograd counts it; -1 for inference tensors.
    """
    return -1 if tensor.is_inference() else tensor._version


def sparse_parts(tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Return the indices and values of a COO tensor by name.

    It need not be coalesced.
    """
    return [("_indices", tensor._indices()), ("_values", tensor._values())]


def gradient_hooks(tensor: torch.Tensor) -> list[Any]:
    """Return the hooks that see a tensor's gradient before it is accumulated."""
    return list((tensor._backward_hooks or {}).values())


def accumulation_hooks(parameter: torch.Tensor) -> list[Any]:
    """Return the hooks that run after a parameter's gradient was accumulated."""
    return list((getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values())


def hooks_of_users(model: nn.Module, optimizer: Any) -> list[Any]:
    """Return a model's and an optimizer step's hooks, without torch's own."""
    steps = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    tables = [getattr(optimizer, name, None) or {} for name in steps]
    tables += [table for module in model.modules() for table in hook_tables(module)]
    found = [hook for table in tables for hook in table.values() if callable(hook)]
    found += [hook for p in model.parameters() for hook in (*gradient_hooks(p), *accumulation_hooks(p))]
    return [hook for hook in found if (_module_of(hook) or "torch").partition(".")[0] != "torch"]


def _module_of(hook: Any) -> str | None:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return getattr(hook, "__module__", None)


def local_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors of this process that a tensor consists of.

    Itself, if it is one; of a DTensor the part that is here. `__tensor_flatten__` of a DTensor names its mesh, too.
    """
    if type(tensor) in (torch.Tensor, nn.Parameter) or not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return [plain for part in parts if isinstance(part, torch.Tensor) for plain in local_tensors(part)]


def local_bytes(tensor: torch.Tensor) -> int:
    """Return a tensor's bytes in this process.

    `nbytes` of a DTensor counts the parts of all ranks.
    """
    return sum(each.nbytes for each in local_tensors(tensor))


# Modules: torch/nn/modules


def forward_pre_hooks(module: nn.Module) -> list[Any]:
    """Return the hooks that run before a module's forward."""
    return list(module._forward_pre_hooks.values())


def hook_tables(module: nn.Module) -> list[dict[int, Any]]:
    """Return every dict of a module that holds hooks by their numbers."""
    return [table for name, table in vars(module).items() if name.endswith("_hooks") and isinstance(table, dict)]


def unbatched_dimensions(norm: InstanceNorm) -> int:
    """Return the dimensions of an instance normalization's sample."""
    return int(norm._get_no_batch_dim())  # type: ignore[no-untyped-call]


# The compiler: torch/_dynamo, torch/_inductor


def load_compiler() -> None:
    """Import torch's compiler, which takes about a second."""
    importlib.import_module("torch._dynamo")


def is_compiler_loaded() -> bool:
    """Return whether torch's compiler was imported; without it, nothing is compiled."""
    return "torch._dynamo" in sys.modules


def is_compiled_function(function: Any) -> bool:
    """Return whether a function came from torch.compile."""
    return hasattr(function, "_torchdynamo_orig_callable")


def memory_fraction(index: int) -> float:
    """Return the part of a device's memory that torch may reserve.

    Before torch 2.11 asking for it, or setting it, leaves the asked device as the current one
    (torch/csrc/cuda/Module.cpp): the current device is put back.
    """
    with torch.cuda.device(index):
        return float(torch.cuda.get_per_process_memory_fraction(index))


def set_memory_fraction(fraction: float, index: int) -> None:
    """Set the part of a device's memory that torch may reserve.

    As in `memory_fraction`, the current device stays.
    """
    with torch.cuda.device(index):
        torch.cuda.set_per_process_memory_fraction(fraction, index)


def is_compiled_wrapper(module: nn.Module) -> bool:
    """Return whether a module came from torch.compile and wraps another."""
    return getattr(module, "_orig_mod", None) is not None


def compiled_call(module: nn.Module) -> Any:
    """Return what `module.compile()` made of a module's call, or None."""
    return getattr(module, "_compiled_call_impl", None)


def restore_compiled_call(module: nn.Module, before: Any) -> None:
    """Undo `module.compile()`.

    Args:
        module: The module.
        before: What `compiled_call` returned before.
    """
    if before is None:
        vars(module).pop("_compiled_call_impl", None)  # the class has None
    else:
        module._compiled_call_impl = before


def compiler_backends(module: nn.Module) -> list[Any]:
    """Return what a compiled module calls to compile graphs.

    Empty where it is not compiled.
    """
    callback = getattr(getattr(module, "dynamo_ctx", None), "callback", None) if is_compiled_wrapper(module) else None
    return [backend for backend in (callback, compiled_call(module)) if backend is not None]


def wrapped_backends(backend: Any) -> list[Any]:
    """Return the backends that a compiler backend keeps in attributes.

    `_torchdynamo_orig_backend` is in 2.9.1 and later; `_torchdynamo_orig_callable`, which 2.6.0 has in its place, and
    `_inner_convert` are in all. A name that a version lacks is left out.
    """
    names = ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable", "compiler_fn", "_inner_convert", "backend")
    return [inner for name in names if (inner := getattr(backend, name, None)) is not None]


# Process groups: torch/distributed


def default_store() -> Any:
    """Return the store of the default process group's ranks."""
    return _find(torch.distributed, "distributed_c10d._get_default_store", "name a rank that is gone")()


def reset_reducer(wrapper: nn.parallel.DistributedDataParallel) -> None:
    """Let a DistributedDataParallel's reducer expect no backward.

    A forward with gradients, whose backward never came, leaves it expecting one: it would reduce in the next backward.
    """
    _find(wrapper.reducer, "_reset_state", "leave out DistributedDataParallel's own reduction")()


def uses_mixed_precision(wrapper: nn.parallel.DistributedDataParallel) -> bool:
    """Return whether a DistributedDataParallel casts parameters itself."""
    return getattr(wrapper, "mixed_precision", None) is not None


def communication_hooks(wrapper: nn.parallel.DistributedDataParallel) -> list[Any]:
    """Return the hooks that were to reduce a DistributedDataParallel's gradients."""
    return list(getattr(wrapper, "_comm_hooks", ()))
