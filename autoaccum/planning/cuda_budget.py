"""Read what a CUDA plan may reserve; notice where it shrank."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..budget import Budget, BudgetItem
from ..devices.cuda.budget import FRACTION
from ..devices.cuda.device import CudaDevice
from ..errors import UsageError
from ..units import show_bytes
from .resolved_request import ResolvedRequest

if TYPE_CHECKING:
    from .predictor_cuda import CudaPredictor

COLLECTIVES = "collectives"
# A communicator's buffers, made at its first collective by cudaMalloc: 544 MiB between two A100s with NVLink, 688 among
# three or four (github.com/NVIDIA/nccl/issues/964)
NCCL_BYTES = 688 << 20


def read_budget(device: CudaDevice, request: ResolvedRequest) -> Budget:
    """Read the budget, less NCCL's buffers where ranks train together.

    They are kept free unless a headroom is named, or a limit on torch's own memory binds.

    Raises:
        UsageError: A size can't be read, or nothing is left.
    """
    found = device.read_budget(request.budget, request.headroom)
    if request.world_size == 1 or request.headroom is not None or found.binding_constraint == FRACTION:
        return found
    if found.bytes <= NCCL_BYTES:
        raise UsageError(
            f"NCCL's buffers, {show_bytes(NCCL_BYTES)}, leave nothing of {show_bytes(found.bytes)}.",
            f"They are kept free for {request.world_size} ranks; the limit that binds is {found.binding_constraint}.",
            "Name a headroom that suffices for them: headroom='200MiB', or 0 where ranks use Gloo.",
        )
    why = f"for NCCL's buffers, which {request.world_size} ranks allocate at their first collective"
    terms = (*found.terms, BudgetItem(COLLECTIVES, NCCL_BYTES, why))
    kept = found.headroom_bytes + NCCL_BYTES
    return replace(found, bytes=found.bytes - NCCL_BYTES, headroom_bytes=kept, terms=terms)


def lost_memory(predictor: CudaPredictor) -> bool:
    """Read the budget again; return whether less is available than before.

    A run may load kernels that no recording needed, since cuDNN chooses by size; and other processes may have grown.
    """
    now = read_budget(predictor.device, predictor.request)
    if now.bytes >= predictor.budget.bytes:
        return False
    predictor.budget = now
    predictor.forget()
    return True
