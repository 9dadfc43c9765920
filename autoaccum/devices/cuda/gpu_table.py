"""List real GPUs, so that virtual ones can stand in. No torch.

Total memory is CUDA's (`cudaMemGetInfo`, `torch.cuda.get_device_properties`), which is what the caching allocator
meets; nvidia-smi's is larger by what the driver keeps for itself. It differs from driver to driver by up to 1 %; what
stands here is on the low side of what was found. A figure's source is beside it: a thread, or words to search for.

Context: PyTorch's out-of-memory message says what this process holds and what of it torch allocated and reserved; the
rest is its context, with the kernels and libraries loaded by then. What stands here is the largest that was found of
runs on one device, without NCCL and CUDA graphs; the messages round to 10 MiB. Library memory comes on top, as a
reserve, whose size follows from training that was measured on three GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...units import parse_bytes

_MIB = 2**20
# Beyond what torch reserves, BERT's training held (mila-iqia/milabench, config/scaling: NVML's used memory, torch 2.6,
# CUDA 12.4; NVML counts the driver's own as used there, which is its total less CUDA's):
#   H100   1219 to 1221 MiB in each of its rows, less the driver's 480: 741, where messages report 666
#   H200   28 more than by the H100's figure, less what the driver holds there: 769, where messages report 670
#   L40S    875 in 8 of 8 rows, less the driver's 479 (totals of 46068 and 45589): 396, where messages report 517 to 524
# (and, measured by docs/on-gpu.md, torch 2.11, CUDA 13.0: H200 767 after GPT-2's training, 769 after ResNet-50's)
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


def _seen(*figures: str | int) -> str:
    return _PROPERTIES(_SEEN.format(*figures))


def _gpu(
    name: str,
    device_name: str,
    total_bytes: int,
    capability: str,
    multiprocessors: int,
    message: _Message,
    total: str,
    processor: str = "",
    *,
    of: str = "",
    bounds: bool = False,
) -> Gpu:
    """Make a row of the table.

    `processor`, if it has another source; `of` names another GPU of the message; `bounds`: training held less there.
    """
    library, source = (CUDNN_BYTES, _CUDNN) if bounds else (LIBRARY_BYTES, _LIBRARY)
    sources = Sources(total, processor or total, f"derived: {of}; {message}" if of else str(message), source)
    sizes = message.context_bytes, library
    return Gpu(name, device_name, total_bytes, capability, multiprocessors, *sizes, sources)


_ISSUE = "https://github.com/{}/issues/{}".format
_PULL = "https://github.com/{}/pull/{}".format
_QUERY = "deviceQuery: '{}'".format
_PROPERTIES = "get_device_properties: '{}'".format
_SEEN = "name='{}', major={}, minor={}, total_memory={}MB, multi_processor_count={}"
_CAPACITY = "out-of-memory message: 'total capacity of {}'".format
_GGML = "llama.cpp's log: 'NVIDIA {}, compute capability {}, VMM: yes, VRAM: {} MiB'".format
_LESS = "derived: nvidia-smi's '{}MiB', less the {} that its driver keeps of an {}".format
_CORES = "'{} CUDA cores', 128 in each: https://www.nvidia.com/en-us/{}".format

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
        of="h100-80gb's, which has more multiprocessors",
    ),
    _gpu(
        "h200", "NVIDIA H200", 143_156 * _MIB, "9.0", 132, _H200,
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
    _gpu(
        "rtx-3060", "NVIDIA GeForce RTX 3060", 11_931 * _MIB, "8.6", 28, _RTX_3090,
        _seen("NVIDIA GeForce RTX 3060", 8, 6, 11931, 28),
        of="rtx-3090's, of the same architecture, with more multiprocessors",
    ),
    _gpu(
        "rtx-3060-ti", "NVIDIA GeForce RTX 3060 Ti", 8_359_641_088, "8.6", 38, _RTX_3090,
        _QUERY("7972 MBytes (8359641088 bytes)") + ", driver of CUDA 12.2",
        _QUERY('"NVIDIA GeForce RTX 3060 Ti" ... (038) Multiprocessors'),
        of="rtx-3090's, of the same architecture, with more multiprocessors",
    ),
    _gpu(
        "rtx-3070", "NVIDIA GeForce RTX 3070", 8_197_111_808, "8.6", 46, _RTX_3090,
        _QUERY("7817 MBytes (8197111808 bytes)") + ", driver of CUDA 12.8",
        _QUERY('"NVIDIA GeForce RTX 3070" ... (046) Multiprocessors'),
        of="rtx-3090's, of the same architecture, with more multiprocessors",
    ),
    _gpu(
        "rtx-3070-ti", "NVIDIA GeForce RTX 3070 Ti", 7_840 * _MIB, "8.6", 48, _RTX_3090,
        _GGML("GeForce RTX 3070 Ti", 8.6, 7840),
        _CORES(6144, "geforce/graphics-cards/30-series/rtx-3070-3070ti/"),
        of="rtx-3090's, of the same architecture, with more multiprocessors",
    ),
    _gpu(
        "rtx-3080", "NVIDIA GeForce RTX 3080", 10_472_390_656, "8.6", 68, _RTX_3090,
        _QUERY("9987 MBytes (10472390656 bytes)") + ", driver of CUDA 12.0",
        _QUERY('"NVIDIA GeForce RTX 3080" ... (068) Multiprocessors'),
        of="rtx-3090's, of the same architecture, with more multiprocessors",
    ),
    _gpu(
        "rtx-3080-ti", "NVIDIA GeForce RTX 3080 Ti", 12_630_491_136, "8.6", 80, _RTX_3090,
        _QUERY("12045 MBytes (12630491136 bytes)") + ", driver of CUDA 11.4",
        _QUERY('"NVIDIA GeForce RTX 3080 Ti" ... (080) Multiprocessors'),
        of="rtx-3090's, of the same architecture, with more multiprocessors",
    ),
    _gpu(
        "rtx-3090-ti", "NVIDIA GeForce RTX 3090 Ti", 24_114 * _MIB, "8.6", 84, _A6000,
        _seen("NVIDIA GeForce RTX 3090 Ti", 8, 6, 24114, 84),
        of="a6000's, of the same chip",
    ),
    _gpu(
        "rtx-4060", "NVIDIA GeForce RTX 4060", 7_756 * _MIB, "8.9", 24, _L40S,
        _LESS(8188, 432, "rtx-4060-ti-16gb"),
        _CORES(3072, "geforce/graphics-cards/40-series/rtx-4060-4060ti/"),
        of="l40s's, of the same architecture, with more multiprocessors",
        bounds=True,
    ),
    _gpu(
        "rtx-4060-ti-8gb", "NVIDIA GeForce RTX 4060 Ti", 7_756 * _MIB, "8.9", 34, _L40S,
        _LESS(8188, 432, "rtx-4060-ti-16gb"),
        _QUERY('"NVIDIA GeForce RTX 4060 Ti" ... (034) Multiprocessors'),
        of="l40s's, of the same architecture, with more multiprocessors",
        bounds=True,
    ),
    _gpu(
        "rtx-4060-ti-16gb", "NVIDIA GeForce RTX 4060 Ti", 16_722_821_120, "8.9", 34, _L40S,
        _QUERY("15948 MBytes (16722821120 bytes)") + ", driver of CUDA 13.1",
        _QUERY('"NVIDIA GeForce RTX 4060 Ti" ... (034) Multiprocessors'),
        of="l40s's, of the same architecture, with more multiprocessors",
        bounds=True,
    ),
    _gpu(
        "rtx-4070", "NVIDIA GeForce RTX 4070", 11_866 * _MIB, "8.9", 46, _L40S,
        _GGML("GeForce RTX 4070", 8.9, 11866),
        _CORES(5888, "geforce/graphics-cards/40-series/rtx-4070-family/"),
        of="l40s's, of the same architecture, with more multiprocessors",
        bounds=True,
    ),
    _gpu(
        "rtx-4070-super", "NVIDIA GeForce RTX 4070 SUPER", 11_866 * _MIB, "8.9", 56, _L40S,
        _LESS(12282, 416, "rtx-4070"),
        _CORES(7168, "geforce/graphics-cards/40-series/rtx-4070-family/"),
        of="l40s's, of the same architecture, with more multiprocessors",
        bounds=True,
    ),
    _gpu(
        "rtx-4070-ti", "NVIDIA GeForce RTX 4070 Ti", 11_866 * _MIB, "8.9", 60, _L40S,
        _LESS(12282, 416, "rtx-4070") + "; 11.70 GiB in " + _ISSUE("Kwai-Kolors/Kolors", 11),
        _CORES(7680, "geforce/graphics-cards/40-series/rtx-4070-family/"),
        of="l40s's, of the same architecture, with more multiprocessors",
        bounds=True,
    ),
    _gpu(
        "rtx-4070-ti-super", "NVIDIA GeForce RTX 4070 Ti SUPER", 15_934 * _MIB, "8.9", 66, _L40S,
        _seen("NVIDIA GeForce RTX 4070 Ti SUPER", 8, 9, 15934, 66),
        of="l40s's, of the same architecture, with more multiprocessors",
        bounds=True,
    ),
    _gpu(
        "rtx-4080", "NVIDIA GeForce RTX 4080", 16_049 * _MIB, "8.9", 76, _L40S,
        _seen("NVIDIA GeForce RTX 4080", 8, 9, 16049, 76),
        of="l40s's, of the same architecture, with more multiprocessors",
        bounds=True,
    ),
    _gpu(
        "rtx-4080-super", "NVIDIA GeForce RTX 4080 SUPER", 16_852_844_544, "8.9", 80, _L40S,
        _QUERY("16072 MBytes (16852844544 bytes)") + ", driver of CUDA 12.4",
        _QUERY('"NVIDIA GeForce RTX 4080 SUPER" ... (080) Multiprocessors'),
        of="l40s's, of the same architecture, with more multiprocessors",
        bounds=True,
    ),
    _gpu(
        "rtx-5070", "NVIDIA GeForce RTX 5070", 11_766 * _MIB, "12.0", 48, _RTX_5090,
        _LESS(12227, 461, "rtx-5070-ti"),
        _CORES(6144, "geforce/graphics-cards/50-series/rtx-5070-family/"),
        of="rtx-5090's, of the same architecture, with more multiprocessors",
    ),
    _gpu(
        "rtx-5070-ti", "NVIDIA GeForce RTX 5070 Ti", 15_842 * _MIB, "12.0", 70, _RTX_5090,
        _GGML("GeForce RTX 5070 Ti", "12.0", 15842),
        _CORES(8960, "geforce/graphics-cards/50-series/rtx-5070-family/"),
        of="rtx-5090's, of the same architecture, with more multiprocessors",
    ),
    _gpu(
        "rtx-5080", "NVIDIA GeForce RTX 5080", 15_880 * _MIB, "12.0", 84, _RTX_5090,
        _GGML("GeForce RTX 5080", "12.0", 15880),
        _seen("NVIDIA GeForce RTX 5080", 12, 0, 16302, 84),
        of="rtx-5090's, of the same architecture, with more multiprocessors",
    ),
    _gpu(
        "rtx-6000-ada", "NVIDIA RTX 6000 Ada Generation", 45_496 * _MIB, "8.9", 142, _L40S,
        _ISSUE("DINGYANB/MTVCrafter", 21) + ": 44.43 GiB with error correction; without: 48622MB",
        _seen("NVIDIA RTX 6000 Ada Generation", 8, 9, 48622, 142),
        of="l40s's, of the same chip",
        bounds=True,
    ),
    _gpu(
        "rtx-pro-6000", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97_247 * _MIB, "12.0", 188, _RTX_5090,
        _GGML("RTX PRO 6000 Blackwell Workstation Edition", "12.0", 97247),
        _CORES(24064, "products/workstations/professional-desktop-gpus/rtx-pro-6000/"),
        of="rtx-5090's, of the same chip",
    ),
    _gpu(
        "rtx-2080-ti", "NVIDIA GeForce RTX 2080 Ti", 11_019 * _MIB, "7.5", 68, _T4,
        _seen("GeForce RTX 2080 Ti", 7, 5, 11019, 68),
        of="t4's, of the same architecture",
    ),
)  # fmt: skip
