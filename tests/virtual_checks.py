"""What is real and what is faked on the virtual GPU, as checks that run on it; test_virtual.py starts them.

Checks that can share a process form a group, which has one GPU and one environment. `virtual_checks.py GROUP...` runs
the groups' checks in order and prints a line of JSON for each. Several groups run in a process each, forked from this
one, which has imported torch and used no GPU.
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pynvml
import pytest
import torch
from allocator_text import KEEPS_WORKSPACES, VERSION, reset_settings, set_settings
from torch import nn
from torch.utils.checkpoint import checkpoint

from autoaccum.devices.cuda.allocator_rules import find_rules, self_test
from autoaccum.devices.cuda.recorder import record
from autoaccum.devices.virtual import VirtualGpu, control
from autoaccum.errors import UsageError
from autoaccum.simulation.cuda_allocator.allocator import CachingAllocator, CudaRules
from autoaccum.simulation.cuda_allocator.ties import tie_rule_of
from autoaccum.simulation.recording import Event, Recording

MIB, GIB = 2**20, 2**30
Check = Callable[[], None]


@dataclass
class Group:
    gpu: VirtualGpu
    env: dict[str, str]
    checks: dict[str, Check] = field(default_factory=dict)

    @property
    def can_be_forked(self) -> bool:
        """Whether nothing of its environment is read while torch and these checks are imported."""
        return set(self.env) <= {"CUDA_VISIBLE_DEVICES"} and "torch_compile" not in self.checks


GROUPS: dict[str, Group] = {}


def check(group: str) -> Callable[[Check], Check]:
    def add(body: Check) -> Check:
        GROUPS[group].checks[body.__name__] = body
        return body

    return add


def _group(name: str, env: dict[str, str] | None = None, /, **gpu: Any) -> str:
    GROUPS[name] = Group(VirtualGpu(**gpu), env or {})
    return name


# A process takes a while, so settings that don't touch each other's checks share one.
PLAIN = _group("plain")
SMALL = HUGE = _group("small", memory_bytes=2 * GIB, context_bytes=256 * MIB, convolution_workspace="20GiB")
NEIGHBOUR = ZERO = _group(
    "neighbour", memory_bytes=2 * GIB, context_bytes=128 * MIB, other_bytes=512 * MIB, copies="zero"
)
TWO = ALL = _group("two", devices=2, copies="all")
SWAPPED = _group("swapped", {"CUDA_VISIBLE_DEVICES": "2,0"}, devices=3)
NONE = _group("none", {"CUDA_VISIBLE_DEVICES": ""})
HOPPER = SCALED = _group(
    "hopper", {"TORCH_CUBLAS_WORKSPACE_CACHE": "1"}, compute_capability="9.0", multiprocessors=132,
    name="A name with spaces", convolution_workspace="0.5x",
)  # fmt: skip
DOWNWARD = FIXED = _group("downward", addresses="down", convolution_workspace="3MiB")
EXPANDABLE = STUBBORN = _group(
    "expandable", {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, memory_bytes=2 * GIB, context_bytes=0,
    convolution_workspace="20GiB", convolution_fallback=False,
)  # fmt: skip
LATE = _group("late", memory_bytes=8 * GIB, trial_workspace_bytes=GIB, kernel_bytes=2 * MIB, lag_launches=40)
ASYNC = _group("async", {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, memory_bytes=2 * GIB)
COMPILED = _group("compiled")
RECORDED = _group("recorded", memory_bytes=4 * GIB)


def grab(size: int, device: str = "cuda") -> Any:
    return torch.empty(size, dtype=torch.uint8, device=device)


def nvml(physical: int = 0) -> tuple[Any, Any]:
    pynvml.nvmlInit()
    return pynvml, pynvml.nvmlDeviceGetHandleByIndex(physical)


# -- the limit, and who sees what


@check(PLAIN)
def the_context_is_taken_at_first_use() -> None:
    library, device = nvml()
    assert control.is_virtual() and torch.cuda.device_count() == 1
    assert library.nvmlDeviceGetMemoryInfo(device).free == 16 * GIB
    assert library.nvmlDeviceGetComputeRunningProcesses(device) == []
    assert torch.cuda.mem_get_info() == (16 * GIB - 512 * MIB, 16 * GIB)
    assert library.nvmlDeviceGetMemoryInfo(device).free == 16 * GIB - 512 * MIB
    assert [process.pid for process in library.nvmlDeviceGetComputeRunningProcesses(device)] == [os.getpid()]


@check(SMALL)
def memory_ends_where_it_says() -> None:
    assert torch.cuda.mem_get_info() == (2 * GIB - 256 * MIB, 2 * GIB)
    held = grab(GIB)
    text = "Tried to allocate 1024.00 MiB. GPU 0 has a total capacity of 2.00 GiB of which 768.00 MiB is free"
    with pytest.raises(torch.cuda.OutOfMemoryError, match=text):
        grab(GIB)
    assert torch.cuda.memory_stats()["num_ooms"] == 1
    del held
    grab(GIB)  # the cached gigabyte serves again
    assert torch.cuda.max_memory_allocated() == GIB
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] == 2 * GIB - 256 * MIB


@check(SMALL)
def allocations_are_rounded_to_2_mib() -> None:
    before = torch.cuda.mem_get_info()[0]
    held = grab(30 * MIB + 1)  # large ones: the caching allocator rounds to 2 MiB too
    assert before - torch.cuda.mem_get_info()[0] == 32 * MIB == control.stats().used_bytes
    del held
    torch.cuda.empty_cache()
    assert control.stats().used_bytes == 0 and control.stats().peak_bytes >= 32 * MIB
    control.reset_peak()
    assert control.stats().peak_bytes == 0


@check(SMALL)
def the_fraction_is_kept() -> None:
    torch.cuda.set_per_process_memory_fraction(0.25)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        grab(700 * MIB)
    grab(400 * MIB)
    torch.cuda.set_per_process_memory_fraction(1.0)


@check(NEIGHBOUR)
def another_process_takes_its_part() -> None:
    library, device = nvml()

    def free() -> int:
        info = library.nvmlDeviceGetMemoryInfo(device)
        assert (info.free, info.total) == torch.cuda.mem_get_info()
        return int(info.free)

    held = grab(100 * MIB)
    assert free() == (2048 - 128 - 512 - 100) * MIB
    found = {p.pid: p.usedGpuMemory for p in library.nvmlDeviceGetComputeRunningProcesses(device)}
    assert found == {os.getpid(): 228 * MIB, 1: 512 * MIB}
    control.set_other(0, 1772 * MIB)  # it grows while we run
    assert free() == 48 * MIB and control.stats().other_bytes == 1772 * MIB
    with pytest.raises(torch.cuda.OutOfMemoryError):
        grab(64 * MIB)
    control.set_other(0, 0)
    assert grab(64 * MIB).numel() and held.numel()
    assert library.nvmlDeviceGetUUID(device) == f"GPU-{torch.cuda.get_device_properties(0).uuid}"


@check(PLAIN)
def allocations_fail_when_asked_to() -> None:
    control.fail_next(2)  # PyTorch retries one after emptying its cache
    with pytest.raises(torch.cuda.OutOfMemoryError):
        grab(40 * MIB)
    assert control.stats().failures == 2
    assert grab(40 * MIB).numel()


# -- PyTorch's own allocators


@check(PLAIN)
def memory_history() -> None:
    torch.cuda.memory._record_memory_history()
    grab(5 * MIB)
    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    assert any(event["action"] == "alloc" and event["size"] == 5 * MIB for event in trace)
    torch.cuda.memory._record_memory_history(enabled=None)


@check(EXPANDABLE)
def expandable_segments() -> None:
    first, second = grab(300 * MIB), grab(300 * MIB)
    assert torch.cuda.memory_snapshot()[0]["is_expandable"] and torch.cuda.mem_get_info()[0] == 1448 * MIB
    del first, second
    held = grab(1200 * MIB)  # grows the one segment
    assert len(torch.cuda.memory_snapshot()) == 1 and torch.cuda.memory_reserved() == 1200 * MIB
    with pytest.raises(torch.cuda.OutOfMemoryError):
        grab(1200 * MIB)
    del held
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] == 2 * GIB and control.stats().used_bytes == 0


@check(ASYNC)
def malloc_async() -> None:
    held = grab(GIB)
    assert torch.cuda.memory_allocated() == GIB == held.numel()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        grab(GIB)


# -- copies


@check(PLAIN)
def copies_are_real() -> None:
    x = torch.randn(1000, 37)
    y = x.cuda()
    assert torch.equal(y.cpu(), x) and torch.equal(y.clone().cpu(), x)
    pinned = x.pin_memory()
    assert pinned.is_pinned() and not x.is_pinned()
    assert torch.equal(pinned.to("cuda", non_blocking=True).cpu(), x)


@check(PLAIN)
def scalars_read_as_zero() -> None:
    assert (torch.ones(1000).cuda() + 1).sum().item() == 0  # a kernel's result, whatever its memory held
    assert torch.tensor(5.0).cuda().item() == 0
    assert torch.zeros(10, device="cuda").nonzero().shape == (0, 1)


@check(ALL)
def scalars_are_copied_when_asked() -> None:
    assert torch.tensor(5.0).cuda().item() == 5


@check(ZERO)
def nothing_is_copied_when_asked() -> None:
    assert torch.ones(1000).cuda().cpu().sum() == 0


# -- several devices, and which of them CUDA shows


@check(TWO)
def two_devices() -> None:
    assert torch.cuda.device_count() == 2
    x = torch.arange(10.0).to("cuda:1")
    assert torch.cuda.memory_allocated(0) == 0 and torch.cuda.memory_allocated(1) > 0
    assert control.stats(0).used_bytes == 0 < control.stats(1).used_bytes
    assert torch.equal(x.to("cuda:0").cpu(), torch.arange(10.0))


@check(SWAPPED)
def visible_devices_are_in_their_order() -> None:
    library, second = nvml(2)
    assert torch.cuda.device_count() == 2 and library.nvmlDeviceGetCount() == 3
    assert library.nvmlDeviceGetUUID(second) == f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    before = [torch.cuda.mem_get_info(logical)[0] for logical in (0, 1)]
    control.set_other(2, GIB)
    assert [torch.cuda.mem_get_info(logical)[0] for logical in (0, 1)] == [before[0] - GIB, before[1]]
    grab(100 * MIB, "cuda:1")
    assert [control.stats(physical).used_bytes for physical in (0, 1, 2)] == [100 * MIB, 0, 0]
    assert control.stats(1).free_bytes == 16 * GIB  # no context there


@check(SWAPPED)
def visible_devices_by_uuid() -> None:
    library, _ = nvml()
    uuids = [library.nvmlDeviceGetUUID(library.nvmlDeviceGetHandleByIndex(i)) for i in range(3)]
    assert len({uuid[:6] for uuid in uuids}) == 3
    expected = {
        "0,1": [0, 1],
        " 1, 0": [1, 0],
        f"{uuids[1]},{uuids[0]}": [1, 0],
        f"{uuids[2][:8]},1": [2, 1],  # a unique beginning suffices
        "GPU-" + uuids[1][4:].upper(): [1],
        "GPU-": [],  # begins all three
        "0,7,1": [0],  # the list ends at what is no device
        "1,GPU-00000000,0": [1],
        "-1": [],
        "0,0": [],
        f"0,{uuids[0]}": [],
        "MIG-1": [],
        "": [],
    }
    source = (
        "from ctypes import *; cuda = CDLL('libcuda.so.1'); n = c_int(); cuda.cuDeviceGetCount(byref(n))\n"
        "for i in range(n.value): b = (c_ubyte * 16)(); cuda.cuDeviceGetUuid_v2(b, i); print(bytes(b).hex())"
    )
    plain = [uuid.removeprefix("GPU-").replace("-", "") for uuid in uuids]
    for setting, devices in expected.items():
        env = os.environ | {"CUDA_VISIBLE_DEVICES": setting}
        out = subprocess.run([sys.executable, "-Sc", source], env=env, capture_output=True, text=True, check=True)
        assert [plain.index(line) for line in out.stdout.split()] == devices, setting


@check(NONE)
def no_device() -> None:
    assert control.is_virtual() and not torch.cuda.is_available() and torch.cuda.device_count() == 0


# -- what PyTorch asks of libraries


def workspace_of_a_product() -> tuple[int, int]:
    """What cuBLAS has beside the product during it, and afterwards."""
    torch._C._cuda_clearCublasWorkspaces()
    a = torch.zeros(64, 64, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    product = a @ a
    during, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    return during - before - product.nbytes, after - before - product.nbytes


@check(PLAIN)
def blas_workspace_at_8_0() -> None:
    size = 8 * MIB + 128 * 1024  # PyTorch's default: two of 4 MiB and eight of 16 KiB
    assert workspace_of_a_product() == (size, size if KEEPS_WORKSPACES else 0)


@check(HOPPER)
def blas_workspace_at_9_0() -> None:
    assert KEEPS_WORKSPACES and workspace_of_a_product() == (32 * MIB, 32 * MIB)
    assert torch.cuda.get_device_name() == "A name with spaces"
    properties = torch.cuda.get_device_properties(0)
    assert (properties.major, properties.minor, properties.multi_processor_count) == (9, 0, 132)


@check(HOPPER)
def attention_through_cudnn() -> None:
    q = torch.zeros(2, 8, 128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.CUDNN_ATTENTION):
        out = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert "Cudnn" in type(out.grad_fn).__name__
    out.sum().backward()
    assert q.grad is not None


@check(PLAIN)
def attention_is_chosen_by_type() -> None:
    def chosen(dtype: torch.dtype) -> str:
        q = torch.zeros(2, 8, 128, 64, device="cuda", dtype=dtype, requires_grad=True)
        return type(nn.functional.scaled_dot_product_attention(q, q, q).grad_fn).__name__

    assert "Flash" in chosen(torch.bfloat16) and "Efficient" in chosen(torch.float32)


def convolution() -> tuple[Any, Any]:
    conv = nn.Conv2d(8, 8, 3, padding=1).cuda()
    return conv, torch.zeros(16, 8, 64, 64, device="cuda")


@check(PLAIN)
def a_convolution_has_no_workspace() -> None:
    conv, x = convolution()
    y = conv(x)
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated() and y.numel()


@check(FIXED)
def a_convolution_has_a_fixed_workspace() -> None:
    conv, x = convolution()
    y = conv(x)
    assert torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated() == 3 * MIB and y.numel()


@check(SCALED)
def a_convolution_has_a_workspace_of_its_size() -> None:
    conv, x = convolution()
    y = conv(x)
    tensors = x.nbytes + y.nbytes + conv.weight.nbytes
    assert torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated() == (tensors // 2 + 511) // 512 * 512


@check(HUGE)
def a_convolution_falls_back() -> None:
    conv, x = convolution()
    conv(x).sum().backward()
    assert torch.cuda.memory_stats()["num_ooms"] > 0  # PyTorch caught it


@check(STUBBORN)
def a_convolution_without_fallback() -> None:
    conv, x = convolution()
    with pytest.raises(RuntimeError, match="unable to find an engine") as error:
        conv(x)
    assert not isinstance(error.value, torch.cuda.OutOfMemoryError)


# -- the rest of a training step


@check(PLAIN)
def streams_and_events() -> None:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    with torch.cuda.stream(torch.cuda.Stream()):
        grab(MIB).record_stream(torch.cuda.current_stream())
    after.record()
    assert before.elapsed_time(after) >= 0 and after.query()


@check(PLAIN)
def graphs_have_their_pools() -> None:
    model, x = nn.Linear(8, 8).cuda(), torch.zeros(4, 8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x)
    graph.replay()


@check(PLAIN)
def mixed_precision_training() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.1), nn.ReLU(), nn.LayerNorm(64)).cuda()
    scaler = torch.amp.GradScaler()
    optimizer = torch.optim.Adam(model.parameters(), foreach=True)
    for _ in range(2):
        with torch.autocast("cuda", torch.float16):
            loss = checkpoint(model, torch.randn(8, 64, device="cuda"), use_reentrant=False).sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)


@check(PLAIN)
def layers_and_functions() -> None:
    ids = torch.randint(0, 9, (4, 5), device="cuda")
    nn.Embedding(9, 3).cuda()(ids).sum().backward()
    image = torch.zeros(2, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.MaxPool2d(2), nn.ConvTranspose2d(8, 3, 2)).cuda()
    net(image).sum().backward()
    line = torch.zeros(1000, device="cuda")
    line.sort(), line.cumsum(0), line.topk(3), (line + 1).multinomial(2)
    torch.cuda.set_rng_state(torch.cuda.get_rng_state())


@check(PLAIN)
def recurrent_nets_without_cudnn() -> None:
    with torch.backends.cudnn.flags(enabled=False):
        nn.LSTM(4, 4).cuda()(torch.zeros(3, 2, 4, device="cuda"))[0].sum().backward()


@check(PLAIN)
def recurrent_nets_through_cudnn() -> None:
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        for how in ({"num_layers": 2, "bidirectional": True, "dropout": 0.1, "batch_first": True}, {"bias": False}):
            net = kind(20, 32, **how).half().cuda()
            net(torch.zeros(3, 7, 20, device="cuda", dtype=torch.half, requires_grad=True))[0].sum().backward()
            assert all(parameter.grad is not None for parameter in net.parameters())
    packed = nn.utils.rnn.pack_sequence([torch.zeros(n, 20, device="cuda") for n in (5, 3)])
    projecting = nn.LSTM(20, 32, 2, proj_size=8).cuda()
    assert projecting(packed)[0].data.shape == (8, 8)
    assert sum(p.numel() for p in projecting.parameters()) == projecting._flat_weights[0].untyped_storage().nbytes() / 4


def recurrent_sizes(net: nn.RNNBase, mode: int, steps: int, batch: int, *, packed: bool = True) -> tuple[int, int]:
    """The workspace and the reserve space that cuDNN asks for, in bytes."""
    lines = [steps * batch] if packed else [steps, batch]
    x = torch.zeros(*lines, net.input_size, device="cuda")
    state = torch.zeros(net.num_layers * (1 + net.bidirectional), batch, net.hidden_size, device="cuda")
    cell = state.clone() if isinstance(net, nn.LSTM) else None
    torch.cuda.reset_peak_memory_stats()
    found = torch.ops.aten._cudnn_rnn(
        x, net._flat_weights, 2 + 2 * net.bias, None, state, cell, mode, net.hidden_size, 0, net.num_layers, False, 0.0,
        True, net.bidirectional, [batch] * steps if packed else [], None,
    )  # fmt: skip
    kept = torch.cuda.memory_stats()
    return kept["requested_bytes.all.peak"] - kept["requested_bytes.all.current"], found[3].nbytes


@check(PLAIN)
def recurrent_nets_have_the_published_sizes() -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert recurrent_sizes(nn.LSTM(123, 320, 4).cuda(), 2, 500, 50)[1] == 736_000_000
        assert recurrent_sizes(nn.GRU(123, 320, 4).cuda(), 3, 500, 50)[1] == 864_000_000
        net = nn.GRU(672, 800, bidirectional=True, bias=False).cuda()
        assert recurrent_sizes(net, 3, 326, 64) == (313_344_000, 801_177_600)
        net = nn.GRU(800, 800, bidirectional=True, bias=False).cuda()
        assert recurrent_sizes(net, 3, 326, 64)[0] == 315_801_600
        padded, _ = recurrent_sizes(nn.RNN(512, 512, 2, nonlinearity="relu").cuda(), 0, 20, 64, packed=False)
        assert 21_496_576 <= padded == 26_214_400


@check(PLAIN)
def kernels_compiled_at_run_time() -> None:
    square = torch.cuda.jiterator._create_jit_fn("template <typename T> T square(T x) { return x * x; }")
    before = control.stats().launches
    square(torch.zeros(10, device="cuda"))
    assert control.stats().launches > before


@check(PLAIN)
def torchs_own_triton_kernels() -> None:
    out = torch.bmm(torch.zeros(4, 8, 1, device="cuda"), torch.zeros(4, 1, 8, device="cuda"))  # an outer product
    assert out.shape == (4, 8, 8)


@check(COMPILED)
def torch_compile() -> None:
    model = torch.compile(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64)).cuda())
    model(torch.randn(8, 64, device="cuda")).sum().backward()


@check(PLAIN)
def what_is_not_modelled_is_loud() -> None:
    with pytest.raises(RuntimeError, match="cusolver"):
        torch.linalg.svd(torch.zeros(4, 4, device="cuda"))
    with pytest.raises(RuntimeError, match="not modelled by the virtual GPU"):
        lengths = torch.full((2,), 5, dtype=torch.int32)
        scores = torch.zeros(5, 2, 4, device="cuda", requires_grad=True)
        nn.functional.ctc_loss(scores, torch.ones(6, dtype=torch.int32), lengths, torch.full_like(lengths, 3))
    with pytest.raises(RuntimeError, match="CUFFT_NOT_SUPPORTED"):
        torch.fft.fft(torch.zeros(8, device="cuda"))


# -- what a GPU does later than at once


def outside() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


@check(LATE)
def kernels_are_loaded_at_their_first_launch() -> None:
    x = grab(MIB).float()
    x.relu_(), x.abs_()
    before = outside()
    x.relu_(), x.abs_()
    assert outside() == before
    x.sqrt_(), x.exp_()
    assert outside() == before + 4 * MIB


@check(LATE)
def where_a_kernel_has_no_room_its_launch_fails() -> None:
    x = torch.zeros(1000, device="cuda")
    control.set_other(0, control.stats().free_bytes - MIB)
    try:
        with pytest.raises(RuntimeError, match="CUDA error: out of memory"):
            x.erf_()
        x.relu_()
    finally:
        control.set_other(0, 0)
    x.erf_()


@check(LATE)
def a_block_that_a_stream_holds_comes_back_when_its_work_is_done() -> None:
    side, x = torch.cuda.Stream(), torch.zeros(1000, device="cuda")

    def place() -> int:
        return grab(30 * MIB).data_ptr()

    for wait in (torch.cuda.synchronize, lambda: [x.relu_() for _ in range(40)]):
        held = grab(30 * MIB)
        at = held.data_ptr()
        x.relu_()
        held.record_stream(side)
        del held
        assert place() != at
        wait()
        kept = [grab(30 * MIB), grab(30 * MIB)]
        assert at in [block.data_ptr() for block in kept]
        del kept


@check(LATE)
def a_benchmark_of_cudnns_tries_a_large_workspace_once_for_each_size() -> None:
    net = nn.Conv2d(3, 8, 3).cuda()

    def peak(samples: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        net(torch.zeros(samples, 3, 8, 8, device="cuda"))
        return torch.cuda.max_memory_reserved()

    with torch.backends.cudnn.flags(enabled=True, benchmark=False):
        assert peak(2) < GIB // 4
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        assert [peak(samples) > GIB for samples in (4, 4, 3, 4)] == [True, False, True, False]


# -- the recorder, and how torch reads its settings


def trained(on_phase: Any) -> None:
    """A step of a model that is there from before, and of one that isn't."""
    x = torch.zeros(64, 1000, device="cuda")
    for name in ("first", "later"):
        with on_phase(name):
            nn.Sequential(nn.Linear(1000, 3000), nn.ReLU(), nn.Linear(3000, 10)).cuda()(x).sum().backward()


def recorded(run: Any = trained) -> Recording:
    return record(run, micro_batch=64)


def sizes(recording: Recording) -> list[int]:
    return [event.bytes for phase in recording.phases for event in phase.events]


def assert_replays(recording: Recording, phases: int) -> None:
    """That a replay from the recording's start comes to what the allocator has now."""
    assert recording.start is not None and len(recording.phases) == phases
    allocator = CachingAllocator(CudaRules(), recording.start)
    peaks = [allocator.run(phase) for phase in recording.phases]
    assert allocator.reserved_bytes == torch.cuda.memory_reserved()
    assert max(peak.peak_reserved_bytes for peak in peaks) == torch.cuda.max_memory_reserved()
    assert max(peak.peak_allocated_bytes for peak in peaks) == torch.cuda.max_memory_allocated()
    assert allocator.allocated_bytes == torch.cuda.memory_allocated()


@check(RECORDED)
def a_recording_leaves_nothing_switched_on() -> None:
    first = recorded()
    assert not torch._C._cuda_isHistoryEnabled()
    assert torch.cuda.memory._snapshot()["device_traces"][0] == []
    with pytest.raises(KeyError):
        recorded(lambda on_phase: {}["nothing"])
    assert not torch._C._cuda_isHistoryEnabled()
    assert [phase.name for phase in first.phases] == ["first", "later"]


@check(RECORDED)
def workspaces_are_recorded_though_they_were_there_before() -> None:
    torch.zeros(64, 64, device="cuda") @ torch.zeros(64, 64, device="cuda")
    assert torch.cuda.memory_allocated() > 8 * MIB or not KEEPS_WORKSPACES
    assert sum(size > 8 * MIB and size % 1024 == 0 for size in sizes(recorded())) >= 1


@check(RECORDED)
def the_users_own_history_is_read_and_kept() -> None:
    plain = recorded()
    torch.cuda.memory._record_memory_history("all", max_entries=100_000)
    held = grab(5 * MIB)
    before = len(torch.cuda.memory._snapshot()["device_traces"][0])
    found = recorded()
    after = torch.cuda.memory._snapshot()["device_traces"][0]
    assert torch._C._cuda_isHistoryEnabled() and len(after) > before + len(sizes(found)) and after[0]["frames"]
    assert sizes(found) == sizes(plain) != []
    torch.cuda.memory._record_memory_history(None)
    del held


@check(RECORDED)
def a_history_that_is_too_short_is_an_error() -> None:
    can_skip = "skip_actions" in inspect.signature(torch.cuda.memory._record_memory_history_impl).parameters
    skipping = ("alloc", "free_requested", "free_completed") if can_skip else ()  # torch 2.6 to 2.9 record all kinds
    for most, more in ((50, {}), (1, {}), *((100_000, {"skip_actions": [kind]}) for kind in skipping)):
        torch.cuda.memory._record_memory_history("all", context=None, max_entries=most, **more)
        grab(5 * MIB)
        with pytest.raises(UsageError, match=r"kept \d+ of \d\d allocations.*\n.*\n.*max_entries"):
            recorded()
        assert torch._C._cuda_isHistoryEnabled()
        torch.cuda.memory._record_memory_history(None)


@check(RECORDED)
def a_history_needs_no_entries_of_snapshots() -> None:
    plain = recorded()
    if "skip_actions" not in inspect.signature(torch.cuda.memory._record_memory_history_impl).parameters:
        return  # torch 2.6 to 2.9 record all kinds
    torch.cuda.memory._record_memory_history("all", context=None, max_entries=100_000, skip_actions=["snapshot"])
    held = grab(5 * MIB)
    assert recorded().phases == plain.phases
    torch.cuda.memory._record_memory_history(None)
    del held


@check(RECORDED)
def a_replay_goes_on_from_what_was_there_and_may_free_it() -> None:
    held = [grab(size) for size in (300, 30 * MIB, 3 * MIB, 700_000, 9 * MIB)]
    del held[1], held[2]
    torch.cuda.reset_peak_memory_stats()

    def run(on_phase: Any) -> None:
        with on_phase("first"):
            held[1] = grab(12 * MIB)  # frees the 3 MiB, which were there before
            held.pop()  # and the 9
        trained(on_phase)

    found = recorded(run)
    assert sum(event.block < 0 for phase in found.phases for event in phase.events) == 2
    assert_replays(found, 3)


@check(RECORDED)
def streams_are_distinguished_and_a_block_in_use_by_another_is_held() -> None:
    side = torch.cuda.Stream()
    torch.cuda.reset_peak_memory_stats()

    def run(on_phase: Any) -> None:
        with on_phase("first"):
            near = grab(30 * MIB)
            with torch.cuda.stream(side):
                far = grab(40 * MIB)
            near.record_stream(side)
            del near
            with torch.cuda.stream(side):
                del far
            held = grab(30 * MIB)
            held.record_stream(side)
            del held
            grab(35 * MIB)

    found = recorded(run)
    streams = {event.stream for phase in found.phases for event in phase.events if event.bytes}
    assert streams == {0, side.cuda_stream}
    assert_replays(found, 1)


@check(RECORDED)
def a_replay_needs_no_segment_events() -> None:
    real = torch.cuda.memory._snapshot

    def without_segments(*arguments: Any) -> Any:
        found = real(*arguments)
        kinds = {entry["action"] for entry in found["device_traces"][0]}
        assert {"segment_alloc", "alloc", "free_completed"} <= kinds
        traces = [[e for e in trace if not e["action"].startswith("segment")] for trace in found["device_traces"]]
        return found | {"device_traces": traces}

    torch.cuda.memory._snapshot = without_segments
    try:
        torch.cuda.reset_peak_memory_stats()
        found = recorded()
    finally:
        torch.cuda.memory._snapshot = real
    assert_replays(found, 2)
    assert all(isinstance(event, Event) for phase in found.phases for event in phase.events)


@check(DOWNWARD)
def later_memory_lies_below_and_of_equal_blocks_that_by_the_versions_rule_is_taken() -> None:
    old, held, new = (grab(30 * MIB) for _ in range(3))
    places = [block.data_ptr() for block in (old, held, new)]
    assert places == sorted(places, reverse=True)
    del old, new
    assert grab(30 * MIB).data_ptr() == (places[2] if VERSION <= (2, 11) else places[0])
    torch.cuda.empty_cache()
    assert [grab(30 * MIB).data_ptr(), held.data_ptr()] == places[:2]  # the gap at the top comes first


@check(RECORDED)
def of_blocks_of_one_size_the_allocator_takes_that_by_its_versions_rule() -> None:
    low, old = grab(30 * MIB), grab(30 * MIB)
    del low
    torch.cuda.empty_cache()  # leaves room below the old one
    above, new = grab(40 * MIB), grab(30 * MIB)
    lower, place = new.data_ptr(), old.data_ptr()
    assert lower < place < above.data_ptr()
    del old, new
    assert grab(30 * MIB).data_ptr() == (lower if VERSION <= (2, 11) else place)
    del above
    torch.cuda.empty_cache()
    first, _held, last = grab(4 * MIB), grab(12 * MIB), grab(4 * MIB)
    place, end = first.data_ptr(), last.data_ptr()
    assert place < end < place + 20 * MIB
    del first, last
    # In 2.12 the last is what was left of the segment's own block, whose counter is the lowest.
    assert grab(4 * MIB).data_ptr() == (end if VERSION == (2, 12) else place)


@check(RECORDED)
def a_test_on_the_device_finds_the_rule_of_torchs_version() -> None:
    for _ in range(2):
        found = self_test(0)
        assert found.tie_rule == tie_rule_of(torch.__version__) and found.addresses_down is False, found
        cached = [grab(size * MIB) for size in (34, 34, 1, 90)]  # the second time memory is in pieces
        del cached[0], cached[1]
    before = torch.cuda.memory_allocated()
    self_test(0)
    assert torch.cuda.memory_allocated() == before


@check(DOWNWARD)
def a_test_on_the_device_finds_the_rule_where_addresses_go_down() -> None:
    found = self_test(0)
    assert found.tie_rule == tie_rule_of(torch.__version__) and found.addresses_down is True, found


@check(RECORDED)
def a_test_in_expandable_segments_tells_only_a_counter_per_block_apart() -> None:
    torch.cuda.empty_cache()
    set_settings("expandable_segments:True")
    found = self_test(0)
    reset_settings()
    assert found.tie_rule == ("oldest block" if VERSION == (2, 12) else None) and found.addresses_down is None, found


@check(RECORDED)
def a_test_without_room_says_so_and_the_latest_rule_is_taken() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99.0.dev20270101+cu130")
        free, _ = torch.cuda.mem_get_info()
        control.set_other(0, free - 100 * MIB)
        before = torch.cuda.memory_stats()["num_ooms"]
        short = find_rules.__wrapped__(0)
        assert torch.cuda.memory_stats()["num_ooms"] == before
        control.set_other(0, 0)
        roomy = find_rules.__wrapped__(0)
    assert not short.by_version and short.tie_rule == "oldest segment" and "170 MiB" in short.reason
    assert not roomy.by_version and roomy.tie_rule == tie_rule_of(torch.__version__) and "test" in roomy.reason


@check(RECORDED)
def settings_are_read_as_torch_reads_them() -> None:
    texts = (
        "expandable_segments:False", "max_split_size_mb:21", " max_split_size_mb : 64 , expandable_segments : True ",
        "roundup_power2_divisions:4", "roundup_power2_divisions:[256:1,512:2,>:4]", "garbage_collection_threshold:0.5",
        "roundup_power2_divisions:[64:8,128:2,256:4,512:2,1024:4,>:1]", "roundup_power2_divisions:[1:4,1024:8]",
        "roundup_power2_divisions:[>:2]", "roundup_power2_divisions:[1048576:8,>:2]", "roundup_power2_divisions:1",
        "pinned_use_background_threads:True", "backend:native,max_split_size_mb:25", "roundup_power2_divisions:[2:0]",
    )  # fmt: skip
    for text in texts:
        set_settings(text)
        real = torch.cuda.memory._snapshot()["allocator_settings"]
        said = CudaRules.from_settings(text, version=VERSION)
        assert (said.max_split_size_bytes or -1) == real["max_split_size"], text
        assert said.garbage_collection_threshold == real["garbage_collection_threshold"], text
        assert (said.roundup_power2_divisions or (0,) * 16) == tuple(real["roundup_power2_divisions"].values()), text
        if "expandable" in text:
            assert said.expandable_segments == real["expandable_segments"], text
    newer = (
        "throw_on_cudamalloc_oom:False", "expandable_segments_reserve:0.5", "expandable_segments_reserve:none",
        "expandable_segments_reserve_by_class:[a:0.5,b:40G]", "pinned_max_cached_size_mb:64",
        "pinned_max_round_threshold_mb:64", "pinned_free_catch_all:True", "graph_capture_record_stream_reuse:True",
        "pinned_reserve_segment_size_mb:3", "large_segment_size_mb:20", "per_process_memory_fraction:1.0",
        "expandable_segments_handle_type:posix_fd",
    )  # fmt: skip
    for text in newer:  # each is known to both, or to neither
        known = True
        try:
            set_settings(text)
        except (RuntimeError, ValueError):
            known = False
        try:
            CudaRules.from_settings(text, version=VERSION, device_bytes=GIB)
        except UsageError as error:
            assert not known, error
        else:
            assert known, text
    refused = (
        "max_split_size_mb:19", "roundup_power2_divisions:3", "roundup_power2_divisions:0", "bogus:1", "backend:none",
        "roundup_power2_divisions:[3:4]", "expandable_segments:true", "garbage_collection_threshold:1.0",
        "large_segment_size_mb:10", "large_segment_size_mb:40,max_split_size_mb:25", "max_non_split_rounding_mb:19",
    )  # fmt: skip
    for text in refused:
        with pytest.raises(UsageError):
            CudaRules.from_settings(text, version=VERSION)
        with pytest.raises((RuntimeError, ValueError)):
            set_settings(text)
    set_settings("expandable_segments_reserve:1.0" if VERSION >= (2, 15) else "expandable_segments:False")
    reset_settings()


@check(RECORDED)
def recording_costs_little() -> None:
    sys.path.insert(0, __file__.rsplit("/tests/", 1)[0])
    from benchmarks.record_cost import cost, seconds_per_event

    seconds_per_event()
    assert cost(None) < 0.5e-6
    assert cost("all") < 1.5e-6


# -- running them


def _outcome(body: Check) -> str:
    try:
        body()
    except BaseException as error:
        return "".join(traceback.format_exception(error))
    return ""


def main(groups: list[str]) -> None:
    """Runs the groups' checks; a group's exit code follows them."""
    import torch._dynamo  # noqa: F401  as the first optimizer does

    warnings.simplefilter("ignore")
    gc.collect()
    gc.freeze()  # or the collection after each check would go through all that torch has
    if len(groups) == 1:
        return run(groups[0])
    for group in groups:
        child = os.fork()
        if not child:
            for name in [name for name in os.environ if name.startswith(("AUTOACCUM_GPU_", "CUDA_"))]:
                del os.environ[name]
            os.environ.update(GROUPS[group].gpu.settings() | GROUPS[group].env)
            control.read_settings()
            return run(group)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"group": group, "ending": os.waitstatus_to_exitcode(status)}), flush=True)


def run(group: str) -> None:
    """Runs the group's checks; ends right after a backward(), as short scripts do (see source/ending.c)."""
    for name, body in GROUPS[group].checks.items():
        print(json.dumps({"group": group, "check": name, "error": _outcome(body)}), flush=True)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    if torch.cuda.is_available():
        nn.Linear(4, 4).cuda()(torch.zeros(2, 4, device="cuda")).sum().backward()


if __name__ == "__main__":
    main(sys.argv[1:])
