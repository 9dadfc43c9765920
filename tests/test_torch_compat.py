"""Private names of torch: used in torch_compat.py only, each function does what it promises, a missing name is said."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.device_mesh
import torch.distributed.tensor
from allocator_text import KEEPS_WORKSPACES
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

import autoaccum
from autoaccum import torch_compat as compat
from autoaccum.devices.virtual import VirtualGpu, available, environment
from autoaccum.processes.fork import in_copy

REASON = available()
# Their checks are in tests/test_lanes.py and tests/test_sharded.py; the last one runs before torch is imported.
OTHERS = ("window/lanes/torch_internals.py", "ranks/torch_internals.py", "processes/quick_imports.py")
ROOT = Path(autoaccum.__file__).parent
# Private attributes of torch's objects and modules, whatever they are read from.
NAMES = {
    "_C", "_dynamo", "_inductor", "_functorch", "_ops", "_prims", "_pytree", "_python_dispatch",
    "_snapshot", "_record_memory_history", "_set_memory_metadata", "_get_memory_metadata", "_set_allocator_settings",
    "_cdata", "_version", "_base", "_indices", "_values", "_backward_hooks", "_post_accumulate_grad_hooks",
    "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_pre_hooks",
    "_get_no_batch_dim", "_BatchNorm", "_NormBase", "_InstanceNorm", "_ConvNd", "_SpectralNorm",
    "_orig_mod", "_compiled_call_impl", "_torchdynamo_orig_callable", "_torchdynamo_orig_backend", "_inner_convert",
    "_in_backward_optimizers", "_optimizer_hook_handles", "_step_count", "_opt_called",
}  # fmt: skip


def private_names(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and name of each private name of torch in a source: imported, an attribute, or in a string."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            for each in node.names:
                name = f"{module}.{each.name}".strip(".")
                if (
                    name.startswith("torch.")
                    and "._" in name
                    and (not isinstance(node, ast.ImportFrom) or not node.level)
                ):
                    yield node.lineno, name
        elif isinstance(node, ast.Attribute) and (_of_torch(node) or (node.attr in NAMES and not _is_own(node))):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_private(node.value):
            yield node.lineno, node.value


def _is_private(text: str) -> bool:
    return text in NAMES or (text.startswith("torch._") and text.replace(".", "").isidentifier())


def _is_own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def _of_torch(node: ast.Attribute) -> bool:
    """Whether it is `torch. ... ._name`, or `nn. ... ._name`."""
    base: ast.expr = node
    while isinstance(base, ast.Attribute):
        base = base.value
    private = node.attr.startswith("_") and not node.attr.startswith("__")
    return private and isinstance(base, ast.Name) and base.id in ("torch", "nn")


def test_private_names_of_torch_are_used_in_two_files() -> None:
    found = [
        f"{path.relative_to(ROOT.parent)}:{line}: {name}"
        for path in sorted(ROOT.rglob("*.py"))
        if path not in (Path(compat.__file__), *(ROOT / name for name in OTHERS))
        for line, name in private_names(path.read_text())
    ]
    assert not found, "move these to autoaccum/torch_compat.py:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch._dynamo", "torch._dynamo"),
        ("from torch.utils._pytree import tree_map", "torch.utils._pytree.tree_map"),
        ("from torch.nn.modules.conv import _ConvNd", "torch.nn.modules.conv._ConvNd"),
        ("x = torch.cuda.memory._anything()", "_anything"),
        ("x = module._parameters", "_parameters"),
        ("x = getattr(module, '_orig_mod')", "_orig_mod"),
        ("x = 'torch._dynamo' in sys.modules", "torch._dynamo"),
        ("from ._torch import x; self._values; torch.cuda.memory_stats()", None),
    ],
)
def test_the_reader_of_sources_finds(source: str, name: str | None) -> None:
    assert [found for _, found in private_names(source)] == ([name] if name else [])


# Each function by its name, with a check. Those of the caching allocator run together, on the virtual GPU.


def check_is_profiler_on() -> None:
    assert not compat.is_profiler_on()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert compat.is_profiler_on()


def check_end_inherited_profiler() -> None:
    compat.end_inherited_profiler()
    numbers = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        numbers.append(in_copy(lambda: _profiled_events(), prepare=compat.end_inherited_profiler))
    assert numbers[0] > 0


def _profiled_events() -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.zeros(1000)
    return len(list(compat.profiler_events(profiler)))


def check_profiler_events() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        torch.zeros(1000)
    allocated = [e.extra_fields for e in compat.profiler_events(profiler) if e.tag.name == "Allocation"]
    assert any(fields.alloc_size == 4000 and fields.device.type == "cpu" for fields in allocated)


def check_active_modes() -> None:
    class Sees(torch.overrides.TorchFunctionMode):
        pass

    assert compat.active_modes() == []
    with torch.device("cpu"), Sees(), compat.TorchDispatchMode():
        assert compat.active_modes() == ["Sees", "TorchDispatchMode"]


def check_storage_id() -> None:
    one, other = torch.zeros(4), torch.zeros(4)
    same = compat.storage_id(one[2:].untyped_storage())
    assert same == compat.storage_id(one.untyped_storage()) != compat.storage_id(other.untyped_storage())


def check_write_count() -> None:
    tensor = torch.zeros(2)
    before = compat.write_count(tensor)
    tensor.add_(1)
    assert compat.write_count(tensor) == before + 1
    with torch.inference_mode():
        assert compat.write_count(torch.zeros(2)) == -1


def check_sparse_parts() -> None:
    tensor = torch.sparse_coo_tensor([[1, 1]], [2.0, 3.0], (3,), check_invariants=True)
    (_, indices), (_, values) = compat.sparse_parts(tensor)
    assert not tensor.is_coalesced() and indices.tolist() == [[1, 1]] and values.tolist() == [2, 3]


def check_gradient_hooks() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    assert compat.gradient_hooks(parameter) == []
    parameter.register_hook(torch.neg)
    assert compat.gradient_hooks(parameter) == [torch.neg]


def check_accumulation_hooks() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    assert compat.accumulation_hooks(parameter) == []
    parameter.register_post_accumulate_grad_hook(print)
    assert compat.accumulation_hooks(parameter) == [print]


def check_forward_pre_hooks() -> None:
    module = nn.Linear(1, 1)
    module.register_forward_pre_hook(print)
    assert compat.forward_pre_hooks(module) == [print]


def check_hooks_of_users() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nn.utils.parametrizations.weight_norm(model)
    assert compat.hooks_of_users(model, optimizer) == compat.hooks_of_users(model, None) == []
    model.register_forward_hook(print)
    optimizer.register_step_pre_hook(print)
    optimizer.register_step_post_hook(functools.partial(print, 1))
    assert len(compat.hooks_of_users(model, optimizer)) == 3


def check_hook_tables() -> None:
    module = nn.Linear(1, 1)
    module.register_forward_hook(print)
    module.register_forward_pre_hook(print)
    module.register_full_backward_hook(print)
    assert sum(print in table.values() for table in compat.hook_tables(module)) == 3


def check_unbatched_dimensions() -> None:
    assert [compat.unbatched_dimensions(norm(2)) for norm in (nn.InstanceNorm1d, nn.InstanceNorm2d)] == [2, 3]


def check_load_compiler() -> None:
    compat.load_compiler()
    assert compat.is_compiler_loaded()


def check_is_compiler_loaded() -> None:
    script = "import torch; from autoaccum.torch_compat import is_compiler_loaded; print(is_compiler_loaded())"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def eager(graph: Any, inputs: Any) -> Any:
    return graph


def check_is_compiled_function() -> None:
    assert compat.is_compiled_function(torch.compile(lambda x: x, backend=eager))
    assert not compat.is_compiled_function(eager)


def check_is_compiled_wrapper() -> None:
    module = nn.Linear(1, 1)
    assert compat.is_compiled_wrapper(torch.compile(module, backend=eager)) and not compat.is_compiled_wrapper(module)


def check_compiled_call() -> None:
    module = nn.Linear(1, 1)
    assert compat.compiled_call(module) is None
    module.compile(backend=eager)
    assert callable(compat.compiled_call(module))


def check_restore_compiled_call() -> None:
    module = nn.Linear(1, 1)
    for before in (None, print):
        compat.restore_compiled_call(module, before)
        assert compat.compiled_call(module) is before
    module.compile(backend=eager)
    compat.restore_compiled_call(module, None)
    assert compat.compiled_call(module) is None


def check_compiler_backends() -> None:
    module, called = nn.Linear(1, 1), nn.Linear(1, 1)
    called.compile(backend=eager)
    assert compat.compiler_backends(module) == []
    assert len(compat.compiler_backends(torch.compile(module, backend=eager))) == 1
    assert compat.compiler_backends(called) == [compat.compiled_call(called)]


def check_wrapped_backends() -> None:
    (outer,) = compat.compiler_backends(torch.compile(nn.Linear(1, 1), backend=eager))
    pending, seen = [outer], []
    while pending and len(seen) < 20:
        seen.append(pending.pop())
        pending += compat.wrapped_backends(seen[-1])
    assert eager in seen and compat.wrapped_backends(eager) == []


def check_local_tensors() -> None:
    plain = nn.Parameter(torch.zeros(3))
    assert compat.local_tensors(plain) == [plain]


def check_local_bytes() -> None:
    assert compat.local_bytes(torch.zeros(3)) == 12


@contextlib.contextmanager
def world_of_one() -> Iterator[Any]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield nn.parallel.DistributedDataParallel(nn.Linear(1, 1))
    finally:
        torch.distributed.destroy_process_group()


def check_default_store() -> None:
    with world_of_one():
        store = compat.default_store()
        store.set("key", b"value")
        assert store.check(["key"]) and not store.check(["another"])


def check_reset_reducer() -> None:
    with world_of_one() as wrapper:
        x = torch.ones(1, 1)
        wrapper(x)  # expects a backward from now on
        compat.reset_reducer(wrapper)
        with wrapper.no_sync():
            wrapper(x).sum().backward()
        wrapper(x).sum().backward()


def check_uses_mixed_precision() -> None:
    with world_of_one() as wrapper:
        assert not compat.uses_mixed_precision(wrapper)
        wrapper.mixed_precision = object()
        assert compat.uses_mixed_precision(wrapper)


def check_communication_hooks() -> None:
    with world_of_one() as wrapper:
        assert compat.communication_hooks(wrapper) == []
        wrapper.register_comm_hook(None, default_hooks.allreduce_hook)
        assert len(compat.communication_hooks(wrapper)) == 1


ON_GPU = ("clear_cublas_workspaces", "is_history_on", "start_history", "stop_history", "read_history")
ON_GPU += ("allocator_settings", "memory_fraction", "set_memory_fraction")
ON_GPU += ("allocator_settings",)


CHECKS: dict[str, Callable[[], None]] = {
    name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")
}


def test_each_function_has_a_check() -> None:
    functions = {
        name
        for name, value in vars(compat).items()
        if inspect.isfunction(value) and value.__module__ == compat.__name__ and not name.startswith("_")
    }
    assert functions == {*CHECKS, *ON_GPU}


@pytest.mark.parametrize("name", CHECKS)
def test_each_function_does_what_it_promises(name: str) -> None:
    CHECKS[name]()


SCRIPT = """
import json, torch
from autoaccum import torch_compat as compat
found = {"before": compat.is_history_on()}
compat.start_history(1000)
found["during"] = compat.is_history_on()
tensor = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
del tensor
found["events"] = [[e["action"], e["size"]] for e in compat.read_history(0)]
compat.stop_history()
found["after"] = compat.is_history_on()
torch.zeros(64, 64, device="cuda") @ torch.zeros(64, 64, device="cuda")
held = torch.cuda.memory_allocated()
compat.clear_cublas_workspaces()
found["workspaces"] = held - torch.cuda.memory_allocated()
found["settings"] = compat.allocator_settings()["max_split_size"]
compat.set_memory_fraction(0.5, 1)
found["fraction"] = compat.memory_fraction(1), compat.memory_fraction(0), torch.cuda.current_device()
print(json.dumps(found))
"""


@pytest.mark.skipif(REASON is not None, reason=REASON or "")
def test_functions_of_the_caching_allocator() -> None:
    env = environment(VirtualGpu(memory_bytes=4 * 2**30, devices=2)) | {
        "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"
    }
    out = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=env, check=True)
    found = json.loads(out.stdout)
    assert not found["before"] and found["during"] and not found["after"]
    kept = [event for event in found["events"] if event[0] in ("alloc", "free_completed")]
    assert kept == [["alloc", 1 << 20], ["free_completed", 1 << 20]]
    assert (found["workspaces"] >= 8 << 20) == KEEPS_WORKSPACES and found["settings"] == 64 << 20
    assert found["fraction"] == [0.5, 1.0, 0]


# A version that lacks a name.


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (torch._C, "_cuda_clearCublasWorkspaces", compat.clear_cublas_workspaces),
        (torch._C, "_cuda_isHistoryEnabled", compat.is_history_on),
        (torch.cuda.memory, "_record_memory_history", compat.start_history),
        (torch.cuda.memory, "_record_memory_history", compat.stop_history),
        (torch.cuda.memory, "_snapshot", lambda: compat.read_history(0)),
        (torch.cuda.memory, "_snapshot", compat.allocator_settings),
        (torch._C._autograd, "_profiler_enabled", compat.is_profiler_on),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_missing_name_is_an_error_with_torchs_version(
    owner: Any, name: str, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(owner, name, raising=False)
    with pytest.raises(compat.UnsupportedTorch, match=rf"torch {torch.__version__.split('+')[0]}.*{name}"):
        call()


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_snapshot_without_settings_leaves_those_of_the_environment(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", dict)
    monkeypatch.setenv(variable, "max_split_size_mb:64")
    assert compat.allocator_settings() == {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
