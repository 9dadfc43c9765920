"""Describe real GPUs, so that a virtual one can stand in.

No torch here.

Total memory is CUDA's (`cudaMemGetInfo`, `torch.cuda.get_device_properties`), which is what the caching allocator
meets; nvidia-smi's is larger by what the driver keeps for itself. It differs from driver to driver by up to 1 %; what
stands here is on the low side of what was found. A figure's source is beside it: a thread, or words to search for.

Context: PyTorch's out-of-memory message says what this process holds and what of it torch allocated and reserved; the
rest is its context, with the kernels and libraries loaded by then. What stands here is the largest that was found of
runs on one device, without NCCL and CUDA graphs; the messages round to 10 MiB. Library memory comes on top, as a
reserve, whose size follows from training that was measured on three GPUs.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from ...errors import UsageError
from ...units import parse_bytes, show_bytes

_MIB = 2**20
# Beyond what torch reserves, BERT's training held (mila-iqia/milabench, config/scaling: NVML's used memory, torch 2.6,
# CUDA 12.4; NVML counts the driver's own as used there, which is its total less CUDA's):
#   H100   1219 to 1221 MiB in each of its rows, less the driver's 480: 741, where messages report 666
#   H200   28 more than by the H100's figure, less what the driver holds there: 769, where messages report 670
#   L40S    875 in 8 of 8 rows, less the driver's 479 (totals of 46068 and 45589): 396, where messages report 517 to 524
# and whisper's and ResNet-50's, with cuDNN, 15 to 17 more. The reserve is the most by which that exceeds messages,
# rounded up. Not for the L40S's chip: there messages, of 2026 and CUDA 13, report more than training with CUDA 12.4
# held. They count, since newer versions' contexts may be larger, and cuDNN's 17 alone comes on top, rounded up.
LIBRARY_BYTES = 128 * _MIB
_LIBRARY = "derived: H100, BERT and whisper training (mila-iqia/milabench, config/scaling), less context; rounded up"
CUDNN_BYTES = 32 * _MIB
_CUDNN = "derived: whisper and ResNet-50 training less BERT's (mila-iqia/milabench, config/scaling); rounded up"


@dataclass(frozen=True)
class Sources:
    """The sources of a GPU's figures; "derived: ..." where none is published.

    Attributes:
        total: Of the total memory.
        processor: Of compute capability and multiprocessors.
        context: Of the context.
        library: Of the libraries.
    """

    total: str
    processor: str
    context: str
    library: str = _LIBRARY


@dataclass(frozen=True)
class Gpu:
    """A real GPU.

    Attributes:
        name: As in `--gpu a100-40gb`.
        device_name: As the driver says it.
        total_bytes: What CUDA says it has.
        capability: Like "8.0".
        multiprocessors: How many.
        context_bytes: What a process holds there outside of torch's allocator.
        library_bytes: Kept for libraries beyond that.
        sources: Where each of these comes from.
    """

    name: str
    device_name: str
    total_bytes: int
    capability: str
    multiprocessors: int
    context_bytes: int
    library_bytes: int
    sources: Sources

    @property
    def capacity_bytes(self) -> int:
        """What torch's allocator may reserve on an idle GPU."""
        return self.total_bytes - self.context_bytes - self.library_bytes


def find_gpu(name: str) -> Gpu:
    """Find a GPU by its name or the driver's.

    However it is spelled.

    Raises:
        UsageError: There is none, or several.
    """
    wanted = _spelled(name)
    for gpu in GPUS:
        if wanted in (gpu.name, _spelled(gpu.device_name)):
            return gpu
    asked = _words(name)
    meant = [gpu for gpu in GPUS if asked and asked <= _words(gpu.name) | _words(gpu.device_name)]
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise UsageError(
            f"{name!r} may be any of {len(meant)} GPUs.",
            f"They are: {', '.join(f'{gpu.name} ({show_bytes(gpu.total_bytes)})' for gpu in meant)}.",
            f"Name one of them: --gpu {meant[0].name}.",
        )
    names = [gpu.name for gpu in GPUS]
    near = [known for known in names if wanted and wanted in known] or _of_the_series(asked)
    near = near or difflib.get_close_matches(wanted, names, n=4, cutoff=0.5)
    why = f"Near it are: {', '.join(near)}." if near else "Nothing in the table is near it."
    example = near[0] if near else "a100-40gb"
    raise UsageError(
        f"No GPU is known as {name!r}.",
        why,
        f"Name one like --gpu {example}, with --memory for a smaller one; `autoaccum doctor --gpus` lists all of them.",
    )


def list_gpus() -> str:
    """The table as text, with its sources."""
    lines = []
    for gpu in GPUS:
        sources = gpu.sources
        lines += [
            f"{gpu.name:<16}{gpu.device_name}: {show_bytes(gpu.total_bytes)}, compute capability {gpu.capability},"
            f" {gpu.multiprocessors} multiprocessors, context {show_bytes(gpu.context_bytes)},"
            f" libraries {show_bytes(gpu.library_bytes)}",
            f"    memory: {sources.total}",
            f"    processor: {sources.processor}",
            f"    context: {sources.context}",
            f"    libraries: {sources.library}",
        ]
    return "\n".join(lines)


def _words(name: str) -> frozenset[str]:
    """`RTX4090`, `4090` -> {4090}; `A100 80G` -> {a100, 80gb}."""
    words = (re.sub(r"^(rtx|gtx)(?=\d)", "", word) for word in re.split(r"[^a-z0-9]+", name.strip().lower()))
    sizes = (re.sub(r"^(\d+)(g|gb|gib)$", r"\1gb", word) for word in words)
    return frozenset(sizes) - {"", "nvidia", "tesla", "geforce", "rtx", "gtx", "quadro"}


def _of_the_series(asked: frozenset[str]) -> list[str]:
    """Return the GPUs whose number differs in its last digits: 3060, 3090."""
    series = {match[1] for word in asked if (match := re.match(r"(\d0)\d0(ti|super)?$", word))}
    return [gpu.name for gpu in GPUS if any(word.startswith(tuple(series)) for word in _words(gpu.name)) and series]


def _spelled(name: str) -> str:
    """`NVIDIA GeForce RTX 4090` -> rtx-4090."""
    words = re.split(r"[\s_-]+", name.strip().lower())
    return "-".join(word for word in words if word not in ("", "nvidia", "tesla", "geforce"))


@dataclass(frozen=True)
class _Message:
    """The figures of an out-of-memory message.

    Held by the process, allocated by torch, reserved but unallocated.
    """

    in_use: str
    allocated: str
    idle: str
    where: str = ""  # a thread; left out, its three sizes are words to search for

    @property
    def context_bytes(self) -> int:
        return parse_bytes(self.in_use) - parse_bytes(self.allocated) - parse_bytes(self.idle)

    def __str__(self) -> str:
        sizes = f"{self.in_use} memory in use - {self.allocated} allocated - {self.idle} reserved but unallocated"
        return f"out-of-memory message: {sizes}" + (f"; {self.where}" if self.where else "")


def _gpu(
    name: str,
    device_name: str,
    total_bytes: int,
    capability: str,
    multiprocessors: int,
    message: _Message,
    total: str,
    processor: str,
    *,
    of: str = "",
    bounds: bool = False,
) -> Gpu:
    """Make a row of the table.

    `of` names the GPU of the message where it is another one; `bounds`: training there was measured to hold less.
    """
    library, source = (CUDNN_BYTES, _CUDNN) if bounds else (LIBRARY_BYTES, _LIBRARY)
    sources = Sources(total, processor, f"derived: {of}; {message}" if of else str(message), source)
    sizes = message.context_bytes, library
    return Gpu(name, device_name, total_bytes, capability, multiprocessors, *sizes, sources)


_ISSUE = "https://github.com/{}/issues/{}".format
_PULL = "https://github.com/{}/pull/{}".format
_QUERY = "deviceQuery: '{}'".format
_PROPERTIES = "get_device_properties: '{}'".format
_CAPACITY = "out-of-memory message: 'total capacity of {}'".format

_H100 = _Message("72.18 GiB", "36.69 GiB", "34.84 GiB", "gpu-burn there: 81079 - 80484 MB = 595")
_H200 = _Message("139.60 GiB", "138.14 GiB", "824.86 MiB")
_B200 = _Message("168.34 GiB", "167.64 GiB", "4.62 MiB", "stas00/ml-engineering, debug")
_A100 = _Message("39.12 GiB", "25.48 GiB", "13.11 GiB", "with 80 GB: 78.93, 76.28, 2.14 GiB")
_L40S = _Message("44.28 GiB", "43.70 GiB", "69.68 MiB", "less in training: 875 MiB of NVML's used memory - 479")
_L4 = _Message("21.92 GiB", "21.56 GiB", "113.98 MiB")
_A10G = _Message("17.50 GiB", "17.00 GiB", "8.36 MiB")
_A40 = _Message("44.17 GiB", "43.36 GiB", "396.27 MiB")
_A6000 = _Message("46.43 GiB", "45.61 GiB", "509.17 MiB")
_T4 = _Message("14.55 GiB", "14.29 GiB", "119.36 MiB", "less in " + _ISSUE("Zheng-Chong/CatVTON", 133))
_V100 = _Message("31.72 GiB", "29.66 GiB", "1.68 GiB", "with 16 GB: 15.75, 14.89 GiB, 497.13 MiB")
_P100 = _Message("15.77 GiB", "15.44 GiB", "20.58 MiB")
_RTX_5090 = _Message("31.34 GiB", "30.74 GiB", "19.41 MiB", _ISSUE("Wan-Video/Wan2.1", 465))
_RTX_3090 = _Message("20.88 GiB", "20.51 GiB", "32.26 MiB")

GPUS = (
    _gpu(
        "h100-80gb", "NVIDIA H100 80GB HBM3", 85_017_755_648, "9.0", 132, _H100,
        _QUERY("81079 MBytes (85017755648 bytes)") + ", driver of CUDA 13.0",
        _PROPERTIES("name='NVIDIA H100 80GB HBM3', major=9, minor=0, total_memory=81089MB, multi_processor_count=132"),
    ),
    _gpu(
        "h100-pcie-80gb", "NVIDIA H100 PCIe", 81_008 * _MIB, "9.0", 114, _H100,
        _PROPERTIES("name='NVIDIA H100 PCIe', major=9, minor=0, total_memory=81008MB, multi_processor_count=114"),
        _PROPERTIES("name='NVIDIA H100 PCIe', major=9, minor=0, total_memory=81008MB, multi_processor_count=114"),
        of="h100-80gb's, which has more multiprocessors",
    ),
    _gpu(
        "h200", "NVIDIA H200", 143_156 * _MIB, "9.0", 132, _H200,
        _PROPERTIES("name='NVIDIA H200', major=9, minor=0, total_memory=143156MB, multi_processor_count=132"),
        _PROPERTIES("name='NVIDIA H200', major=9, minor=0, total_memory=143156MB, multi_processor_count=132"),
    ),
    _gpu(
        "gh200", "NVIDIA GH200 120GB", 101_468_602_368, "9.0", 132, _H200,
        _QUERY("96768 MBytes (101468602368 bytes)") + ", driver of CUDA 12.9 (GH200 480GB has 97280)",
        _QUERY('"NVIDIA GH200 120GB" ... (132) Multiprocessors'),
        of="h200's, of the same architecture",
    ),
    _gpu(
        "b200", "NVIDIA B200", 182_631 * _MIB, "10.0", 148, _B200,
        _PULL("pytorch/ao", 4002) + ": 178.35 GB; get_device_properties: 'total_memory=182631MB'",
        _PULL("pytorch/ao", 4002),
    ),
    _gpu(
        "a100-40gb", "NVIDIA A100-SXM4-40GB", 42_298_834_944, "8.0", 108, _A100,
        _PULL("bottlerocket-os/bottlerocket", 3873) + ": deviceQuery, driver of CUDA 12.2",
        _PULL("bottlerocket-os/bottlerocket", 3873),
    ),
    _gpu(
        "a100-80gb", "NVIDIA A100-SXM4-80GB", 81_049 * _MIB, "8.0", 108, _A100,
        _ISSUE("ekondis/mixbench", 47) + " (PCIe); SXM4: " + _QUERY("81051 MBytes (84987740160 bytes)"),
        _QUERY('"NVIDIA A100-SXM4-80GB" ... (108) Multiprocessors'),
        of="a100-40gb's, larger than its own",
    ),
    _gpu(
        "l40s", "NVIDIA L40S", 45_450 * _MIB, "8.9", 142, _L40S,
        _CAPACITY("44.39 GiB") + ", most of 2026; deviceQuery, an older driver, of CUDA 12.4: 45373 MBytes",
        _PROPERTIES("name='NVIDIA L40S', major=8, minor=9, total_memory=45589MB, multi_processor_count=142"),
        bounds=True,
    ),
    _gpu(
        "l4", "NVIDIA L4", 23_612_293_120, "8.9", 58, _L4,
        _QUERY("22518 MBytes (23612293120 bytes)") + ", driver of CUDA 12.0",
        _QUERY('"NVIDIA L4" ... (58) Multiprocessors'),
    ),
    _gpu(
        "a10g", "NVIDIA A10G", 22_513 * _MIB, "8.6", 80, _A10G,
        _CAPACITY("21.99 GiB") + " (get_device_properties under newer drivers: 22587MB)",
        _PROPERTIES("name='NVIDIA A10G', major=8, minor=6, total_memory=22587MB, multi_processor_count=80"),
    ),
    _gpu(
        "a10", "NVIDIA A10", 23_609_475_072, "8.6", 72, _A10G,
        _QUERY("22516 MBytes (23609475072 bytes)") + ", driver of CUDA 12.2",
        _PULL("karpathy/llm.c", 621),
        of=f"a10g's, of the same chip (less in {_ISSUE('zai-org/CogVLM', 236)})",
    ),
    _gpu(
        "a40", "NVIDIA A40", 45_399 * _MIB, "8.6", 84, _A40,
        _CAPACITY("44.34 GiB") + "; 45416 MiB in " + _ISSUE("pyscf/gpu4pyscf", 304),
        _ISSUE("pyscf/gpu4pyscf", 304),
    ),
    _gpu(
        "a6000", "NVIDIA RTX A6000", 48_665 * _MIB, "8.6", 84, _A6000,
        _CAPACITY("47.53 GiB"),
        _PROPERTIES("name='NVIDIA RTX A6000', major=8, minor=6, total_memory=48676MB, multi_processor_count=84"),
    ),
    _gpu(
        "t4", "Tesla T4", 14_909 * _MIB, "7.5", 40, _T4,
        _ISSUE("Zheng-Chong/CatVTON", 133) + ": 14.56 GiB; deviceQuery: '14918 MBytes (15642329088 bytes)'",
        _ISSUE("NVIDIA/DALI", 1813),
    ),
    _gpu(
        "v100-16gb", "Tesla V100-SXM2-16GB", 16_928_342_016, "7.0", 80, _V100,
        _QUERY("16144 MBytes (16928342016 bytes)") + ", driver of CUDA 12.4",
        _QUERY('"Tesla V100-SXM2-16GB" ... (080) Multiprocessors'),
        of="v100-32gb's, larger than its own",
    ),
    _gpu(
        "v100-32gb", "Tesla V100-SXM2-32GB", 32_486 * _MIB, "7.0", 80, _V100,
        _CAPACITY("31.73 GiB"),
        _QUERY('"Tesla V100-SXM2-32GB" ... (080) Multiprocessors'),
    ),
    _gpu(
        "p100", "Tesla P100-PCIE-16GB", 17_066_885_120, "6.0", 56, _P100,
        _QUERY("16276 MBytes (17066885120 bytes)"),
        _PROPERTIES("name='Tesla P100-PCIE-16GB', major=6, minor=0, total_memory=16280MB, multi_processor_count=56"),
    ),
    _gpu(
        "rtx-5090", "NVIDIA GeForce RTX 5090", 33_668_857_856, "12.0", 170, _RTX_5090,
        "torch's warning: 'total: 33668857856'; deviceQuery, driver of CUDA 12.8: 33677180928, "
        + _ISSUE("aikitoria/open-gpu-kernel-modules", 1),
        _ISSUE("NVIDIA/nccl", 1637),
    ),
    _gpu(
        "rtx-4090", "NVIDIA GeForce RTX 4090", 25_250_627_584, "8.9", 128, _L40S,
        _QUERY("24081 MBytes (25250627584 bytes)") + ", driver of CUDA 13.0",
        _QUERY('"NVIDIA GeForce RTX 4090" ... (128) Multiprocessors'),
        of="l40s's, of the same chip, larger than its own (504 MiB: 14.56, 13.86 GiB, 213.20 MiB)",
        bounds=True,
    ),
    _gpu(
        "rtx-3090", "NVIDIA GeForce RTX 3090", 24_131 * _MIB, "8.6", 82, _RTX_3090,
        _CAPACITY("23.57 GiB"),
        _QUERY('"NVIDIA GeForce RTX 3090" ... (082) Multiprocessors'),
    ),
)  # fmt: skip
